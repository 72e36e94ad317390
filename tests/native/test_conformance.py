"""The portable kernels in a program of their own, without Python: on this machine and on emulated aarch64.

Under `make test-sanitize` the program is sanitized like the extension.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "src" / "fewbit" / "native"
SOURCES = (Path(__file__).with_name("conformance.cpp"), *NATIVE.glob("*_portable.cpp"))
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
CHECKS = ("-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")

HOST = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static")


def kernel_flags() -> list[str]:
    """The flags that the extension's kernels are compiled with, warnings being errors."""
    return [*re.search(r"set\(kernel_flags ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split(), "-Werror"]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    """Run a compiler or the program; neither wants the sanitizers that python has loaded."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


def build(compiler: str, flags: list[str], program: Path) -> Path:
    result = run(*shlex.split(compiler), "-std=c++17", *flags, "-I", NATIVE, *SOURCES, "-o", program)
    assert result.returncode == 0, result.stderr
    return program


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """The file of cases, written in a fresh interpreter."""
    path = tmp_path_factory.mktemp("conformance") / "cases"
    result = run(sys.executable, Path(__file__).with_name("conformance_cases.py"), path)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Not with -O3, which the extension on this machine is tested with everywhere else."""
    if HOST is None:
        pytest.skip("no C++ compiler")
    flags = ["-O2" if flag == "-O3" else flag for flag in kernel_flags()]
    return build(HOST, [*flags, *(CHECKS if SANITIZED else ())], tmp_path_factory.mktemp("host") / "conformance")


def assert_all_agree(result: subprocess.CompletedProcess) -> None:
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(r"[1-9]\d+ cases, 0 failed", result.stdout.splitlines()[-1])


def test_the_portable_kernels_alone_give_the_reference_bit_for_bit(program, cases):
    assert_all_agree(run(program, cases))


def test_one_wrong_bit_fails_and_is_named(program, cases, tmp_path):
    data = bytearray(cases.read_bytes())
    data[-1] ^= 1  # in the last case's result
    broken = tmp_path / "cases"
    broken.write_bytes(data)
    result = run(program, broken)
    assert result.returncode == 1
    assert "trellis_encode_streams, 512 steps, 4 bits: symbols differs first at 1535 of 1536" in result.stdout
    assert result.stdout.endswith(" cases, 1 failed\n")


def test_a_file_that_ends_early_is_refused(program, cases, tmp_path):
    cut = tmp_path / "cases"
    cut.write_bytes(cases.read_bytes()[:-1])
    result = run(program, cut)
    assert (result.returncode, result.stderr) == (2, "conformance: the file ends within a case\n")


@pytest.mark.skipif(not (CROSS and QEMU), reason="aarch64: untested here (make test-aarch64)")
@pytest.mark.skipif(SANITIZED, reason="aarch64: not sanitized")
def test_the_portable_kernels_give_the_reference_bit_for_bit_on_aarch64(cases, tmp_path):
    cross = build(CROSS, [*kernel_flags(), "-static"], tmp_path / "conformance")
    assert_all_agree(run(QEMU, cross, cases))
