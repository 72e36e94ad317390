"""The pool of threads under ThreadSanitizer, in a program of its own: many callers, sessions, sizes, a forked child."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "src" / "fewbit" / "native"
SOURCES = (Path(__file__).with_name("threads.cpp"), NATIVE / "threads.cpp")
HOST = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def run(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66"}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


def build(directory: Path, *flags: str) -> Path:
    if HOST is None:
        pytest.skip("no C++ compiler")
    built = directory / "threads"
    result = run(HOST, *FLAGS, *flags, "-I", NATIVE, *SOURCES, "-o", built)
    if "cannot find" in result.stderr and "tsan" in result.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert result.returncode == 0, result.stderr
    return built


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> list[str | Path]:
    """The command that runs the sanitized program."""
    built = build(tmp_path_factory.mktemp("threads"), "-fsanitize=thread")
    # The sanitizer's runtime wants its addresses where some kernels put others; without randomness they are free.
    plain = shutil.which("setarch")
    return [*([plain, "-R"] if plain else []), built]


def test_nothing_races_in_the_pool_whoever_uses_it(program):
    result = run(*program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING: ThreadSanitizer" not in result.stderr
    assert result.stdout == "alone 1, callers 1, forked 0\n"


def test_a_forked_child_gets_a_pool_of_its_own(tmp_path):
    result = run(build(tmp_path), "fork")
    assert (result.returncode, result.stdout) == (0, "alone 1, callers 1, forked 1\n"), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read as Linux tells it")
def test_a_system_that_gives_no_more_threads_ends_in_no_error(tmp_path):
    result = run(build(tmp_path), "limited")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_race_would_be_noticed(program):
    result = run(*program, "race")
    assert result.returncode == 66, result.stdout + result.stderr
    assert "data race" in result.stderr
