#!/bin/sh
# Builds the native extension with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize and runs the
# kernels' tests with it, once per instruction set that this machine has.
# Usage: test_sanitize.sh [PYTEST ARGUMENT...], which name other tests than those of the kernels, the operators and
# the formats.
set -eu

fail() {
    echo "test_sanitize: $*" >&2
    exit 1
}

. "$(dirname "$0")/build_apart.sh"
build_apart "$PWD/build/sanitize" -DCMAKE_BUILD_TYPE=Debug -DFEWBIT_SANITIZE=ON

# The runtimes must be there before anything else: python itself is not linked with them, and AddressSanitizer looks
# for the function that throws exceptions when it starts.
preload=$(ldd "$extension" | awk '/libasan|libubsan|libstdc\+\+/ { print $3 }' | sort | tr '\n' ' ')
case $preload in
*libasan*) ;;
*) fail "the extension lacks libasan; this needs GCC on Linux: rm -r build/sanitize; make test-sanitize CXX=g++" ;;
esac

# No search for leaks: python and torch keep memory until they end, and that is all it would find. AddressSanitizer
# writes to files, because tests with subprocesses swallow stderr; UndefinedBehaviorSanitizer cannot beside it.
run() {
    env LD_PRELOAD="$preload" \
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:log_path=$build/report" \
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1" \
        "$@"
}

rm -f "$build"/report.*
isas=$(run "$python" -c 'from fewbit import _native; print(*_native.available_isas())') ||
    fail "the sanitized extension does not load"
failed=
# Parts that are malformed; with the widest also damaged files, whose crashes the sandbox reports. They encode, too.
hostile=tests/robustness/test_parts.py
for isa in $isas; do
    # Once is enough for tests that choose the instruction set themselves, and for those of the formats, which encode
    # much: minutes in sanitized portable code, where the conformance program tests the same kernels.
    case $isa in
    # Files by name: pytest would take the directory for check_sanitizers.py as well and then not collect that.
    portable) tests="tests/native/test_*.py tests/ops tests/runtime/test_sampling.py $hostile" ;;
    "${isas##* }") tests="tests/native/test_kernels.py tests/ops tests/formats $hostile tests/robustness/test_files.py" ;;
    *) tests="tests/native/test_kernels.py tests/ops $hostile" ;;
    esac
    [ $# -eq 0 ] || tests=$*
    echo "Sanitized, $isa: $tests"
    # Only sys.stderr is captured: what a sanitizer writes before it ends the process must come through.
    # shellcheck disable=SC2086  # a list of arguments
    FEWBIT_ISA=$isa run "$python" -m pytest -q -p no:cacheprovider --capture=sys -m "not slow" \
        tests/native/check_sanitizers.py $tests || failed="$failed $isa"
done
for report in "$build"/report.*; do
    [ ! -f "$report" ] || { cat "$report" >&2; reports=", with the reports above"; }
done
[ -z "$failed${reports:-}" ] || fail "failed:$failed${reports:-}"
