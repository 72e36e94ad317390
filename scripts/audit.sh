#!/bin/sh
# Asks the package index's advisory database about every package of the locks, with pip-audit in an environment of its
# own. Exit codes: 0 nothing known, 1 findings, 2 the database was not reached, or knew nothing of some packages.
set -eu
cd "$(dirname "$0")/.."
venv=build/audit-venv
auditor=pip-audit==2.10.1
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

[ -x "$venv/bin/pip-audit" ] || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip -qq --disable-pip-version-check install "$auditor"
rm -f build/audit.json
"$venv/bin/pip-audit" --disable-pip --no-deps --progress-spinner off --format json --output build/audit.json \
    -r requirements.lock -r requirements-cuda.lock 2>build/audit.log || true
[ -s build/audit.json ] || {
    tail -n 3 build/audit.log >&2
    echo "audit: the advisory database was not reached; nothing is known about the locked packages" >&2
    exit 2
}
exec "$venv/bin/python" scripts/audit_report.py build/audit.json
