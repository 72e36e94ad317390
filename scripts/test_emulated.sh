#!/bin/sh
# Builds the native extension with functions of SIMDe's in place of the instructions of AVX-512 and AVX-VNNI into
# build/emulated and runs the kernels' tests with it: on a machine that has AVX2 alone they show that the wider kernels
# give the reference's results, too. Missing headers come through apt-get where that is possible.
# Usage: test_emulated.sh [PYTEST ARGUMENT...], which name other tests.
set -eu

fail() {
    echo "test_emulated: $*" >&2
    exit 1
}

. "$(dirname "$0")/packages.sh"
missing=
[ -f /usr/include/simde/x86/avx512.h ] || missing=libsimde-dev
# shellcheck disable=SC2086  # a list of names
install_missing $missing
. "$(dirname "$0")/build_apart.sh"
build_apart "$PWD/build/emulated" -DCMAKE_BUILD_TYPE=None -DFEWBIT_EMULATE=ON

names='from fewbit import _native; print(*_native.available_isas(), *_native.emulated_isas())'
isas=$("$python" -c "$names")
for isa in avxvnni avx512 amx-emulated; do
    case " $isas " in
    *" $isa "*) ;;
    *) fail "the extension was built without $isa, see $build/build.log" ;;
    esac
done
echo "Emulated: $isas"
[ $# -gt 0 ] || set -- tests/native/test_*.py tests/ops tests/math tests/runtime/test_sampling.py tests/test_modules.py \
    tests/pipeline/test_calibrate.py
exec "$python" -m pytest -q -p no:cacheprovider -m "not slow" "$@"
