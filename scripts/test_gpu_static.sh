#!/bin/sh
# Proves the Triton kernels as far as that goes without a GPU: runs them in Triton's interpreter, and compiles them.
# Triton goes into build/gpu-venv, which reads everything else from .venv, because it must not change what `make test` is.
set -eu
cd "$(dirname "$0")/.."
venv=build/gpu-venv
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! "$venv/bin/python" -c 'import triton' 2>/dev/null; then
    .venv/bin/python -m venv --without-pip --clear "$venv"
    own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # A .pth file here reads the .pth files there, too, so that the editable fewbit is found.
    echo "import site; site.addsitedir('$site')" >"$own/shared.pth"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target "$own" -c constraints.txt triton
fi
exec "$venv/bin/python" -m pytest -q tests/ops/test_triton.py tests/ops/test_gpu_static.py tests/ops/test_gpu_layouts.py
