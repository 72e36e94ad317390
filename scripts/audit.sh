#!/bin/sh
# Asks the index's advisory database about every package of the locks, in an environment of its own.
# Exit codes: 0 nothing known, 1 findings, 2 the database could not be asked.
set -eu
cd "$(dirname "$0")/.."
venv=build/audit-venv
package=pip-audit==2.10.1
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

[ -x "$venv/bin/pip-audit" ] || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip -qq --disable-pip-version-check install "$package"
report=build/audit.json
rm -f "$report"
code=0
"$venv/bin/pip-audit" --disable-pip --no-deps --progress-spinner off --format json --output "$report" \
    -r requirements.lock -r requirements-cuda.lock 2>build/audit.log || code=$?
if [ ! -s "$report" ]; then
    tail -n 3 build/audit.log >&2
    echo "audit: the advisory database gave no answer; nothing is known about the locked packages. Try again online." >&2
    exit 2
fi
"$venv/bin/python" scripts/audit_report.py "$report" || exit 1
exit "$code"
