#!/bin/sh
# Builds the wheel twice, from copies of the tree in two directories, and fails unless both are the same bytes; installs
# it into an empty environment and uses it there; lists what it is made of and runs with (CycloneDX). All to dist/.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
build=$root/build/wheel
lister=cyclonedx-bom==7.5.0
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

fail() {
    echo "wheel: $*" >&2
    exit 1
}

# The time of everything in the wheel: that of the commit.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
rm -rf "$build"
mkdir -p dist
for copy in one another/place; do
    mkdir -p "$build/$copy"
    git ls-files -z | tar --null -T - -c | tar -x -C "$build/$copy"
done
for copy in one another/place; do
    echo "Building the wheel in $build/$copy"
    CXXFLAGS="-ffile-prefix-map=$build/$copy=." .venv/bin/python -m pip -q --disable-pip-version-check wheel \
        --no-deps --no-build-isolation --no-cache-dir -w "$build/$copy/dist" "$build/$copy"
done
wheel=$(basename "$build"/one/dist/*.whl)
cmp "$build/one/dist/$wheel" "$build/another/place/dist/$wheel" || fail "the same tree gave two different wheels"
cp "$build/one/dist/$wheel" dist/
# Nothing of this machine in it.
if .venv/bin/python -m zipfile -e "dist/$wheel" "$build/files" && grep -rlF "$root" "$build/files"; then
    fail "these files name the directory that they were built in"
fi

echo "Installing it into an empty environment"
"$python" -m venv --clear "$build/venv"
"$build/venv/bin/python" -m pip -qq --disable-pip-version-check install -c constraints.txt "dist/$wheel"
"$build/venv/bin/python" benchmarks/toy.py "$build/toy"
"$build/venv/bin/python" scripts/smoke_test.py "$build/toy" || fail "the installed wheel does not work"

[ -x build/sbom-venv/bin/cyclonedx-py ] || "$python" -m venv --clear build/sbom-venv
build/sbom-venv/bin/python -m pip -qq --disable-pip-version-check install "$lister"
build/sbom-venv/bin/cyclonedx-py environment --output-reproducible --of JSON -o "dist/${wheel%.whl}.cdx.json" \
    "$build/venv/bin/python"
sha256sum "dist/$wheel"
.venv/bin/python scripts/wheel_report.py "$build/one/dist/$wheel" "$build/another/place/dist/$wheel" \
    "dist/${wheel%.whl}.cdx.json"
