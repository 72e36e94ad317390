#!/bin/sh
# Runs the portable kernels on emulated aarch64: the conformance program, cross-compiled and started by qemu.
# Missing system packages come through apt-get where that is possible, otherwise one line names them.
set -eu

fail() {
    echo "test_aarch64: $*" >&2
    exit 1
}

. "$(dirname "$0")/packages.sh"
missing=
command -v aarch64-linux-gnu-g++ >/dev/null || missing="$missing g++-aarch64-linux-gnu"
command -v qemu-aarch64-static >/dev/null || missing="$missing qemu-user-static"
# shellcheck disable=SC2086  # a list of names
install_missing $missing

# With both tools there the test does not skip; -rP shows how many cases ran.
exec .venv/bin/python -m pytest -q -rP -k aarch64 tests/native/test_conformance.py
