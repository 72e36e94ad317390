#!/bin/sh
# Writes requirements.lock: every package that .venv gets, with its version and the hashes of its files, for Linux and
# macOS and Python 3.11 and later. What only the CUDA build of torch needs goes to requirements-cuda.lock, a build of torch without CUDA to requirements-cpu.lock.
set -eu
cd "$(dirname "$0")/.."
venv=build/lock-venv
resolver=uv==0.13.9
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

pip() {
    "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"
}

[ -x "$venv/bin/uv" ] || "$python" -m venv --clear "$venv"
pip install "$resolver"
cat >build/lock.in <<EOF
scikit-build-core
nanobind
cmake
ninja
EOF
"$venv/bin/uv" pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
    --extra demo --extra serve --extra dev -c constraints.txt pyproject.toml build/lock.in -o build/all.lock

# The package indexes of some machines have a build of torch for processors alone, under the same version.
rm -rf build/lock-torch
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' build/all.lock)
"$venv/bin/python" -m pip -qq --disable-pip-version-check download --no-deps -d build/lock-torch "$torch"
for wheel in build/lock-torch/*+cpu-*.whl; do
    [ -f "$wheel" ] || continue
    version=$(basename "$wheel" | cut -d - -f 2)
    {
        echo "# The build of torch for processors alone, where it was found. Made by scripts/lock.sh."
        echo "torch==$version --hash=sha256:$(sha256sum "$wheel" | cut -d ' ' -f 1)"
    } >requirements-cpu.lock
done

# A block is a line that begins with a name, and the indented lines of its hashes.
awk -v cuda=requirements-cuda.lock -v rest=requirements.lock '
    BEGIN {
        print "# Made by scripts/lock.sh, with pyproject.toml and constraints.txt." > rest
        print "# What the CUDA build of torch needs beside requirements.lock. Made by scripts/lock.sh." > cuda
    }
    /^[a-z]/ { file = /^(nvidia|cuda|triton)/ ? cuda : rest }
    { print > file }
' build/all.lock
