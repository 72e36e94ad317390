#!/bin/sh
# Makes .venv in the current directory and installs fewbit into it, editable, with the files of requirements.lock.
# Missing system packages come through apt-get where that is possible, otherwise one line names them.
# Usage: make_venv.sh [PYTHON]
set -eu

fail() {
    echo "make_venv: $*" >&2
    exit 1
}

. "$(dirname "$0")/packages.sh"

recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

python=${1:-}
if [ -n "$python" ]; then
    recent "$python" || fail "$python is not Python 3.10 or later; name another one: make PYTHON=/path/to/python3"
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if recent "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.10 or later found; install one, or name it: make PYTHON=/path/to/python3"
fi

# Debian splits a Python into packages named after its version.
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
missing=
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing $version-venv"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing="$missing $version-dev"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$missing g++"
# shellcheck disable=SC2086  # a list of names
install_missing $missing

# An environment of another interpreter is made anew, one of this interpreter is kept and brought up to date.
wanted=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
found=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys.executable))' 2>/dev/null || true)
[ "$wanted" = "$found" ] || "$python" -m venv --clear .venv

pip() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"
}

echo "Installing fewbit into .venv with $("$python" --version) (some 2 GB; 6 GB where the package index has torch with CUDA)"
if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    # Nothing but the files whose hashes are listed. Some come as sources only; their build tools stay out of .venv, and
    # older versions of pip have to be told so.
    # Where the index has the build of torch for processors that is locked, it is taken: in the other one's place, pip
    # would prefer the larger one, whose hash the index tells before it is fetched.
    pip --no-deps --require-hashes -r requirements-cpu.lock 2>/dev/null || true
    pip --no-deps --require-hashes --use-pep517 -r requirements.lock
    needs_cuda='import importlib.metadata as m; print(any(n.startswith("nvidia") for n in m.requires("torch") or ()))'
    [ "$(.venv/bin/python -c "$needs_cuda")" = False ] || pip --no-deps --require-hashes -r requirements-cuda.lock
    pip --no-deps --no-build-isolation -e .
else
    # The lock is for later versions of Python. The build tools first: building without isolation keeps them, too, at
    # the versions of constraints.txt.
    pip -c constraints.txt scikit-build-core nanobind cmake ninja
    pip -c constraints.txt lm-eval
    pip -c constraints.txt --no-build-isolation -e '.[demo,serve,dev]'
fi
