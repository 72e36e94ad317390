"""How much memory there is to have, and what processes have had of it."""

from __future__ import annotations

import os
import sys

import pytest

from fewbit.pipeline import memory
from fewbit.resident import peak_resident_bytes

GIGABYTE = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A directory in which the files of the system may be written; none is there."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_memory_that_files_are_kept_in_can_be_had(system):
    (system / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 8388608 kB\n")
    assert memory.available_memory() == 8 * GIGABYTE


def test_a_container_s_limit_holds_and_its_files_do_not_count(system):
    (system / "meminfo").write_text("MemAvailable: 8388608 kB\n")
    (system / "memory.max").write_text(f"{4 * GIGABYTE}\n")
    (system / "memory.current").write_text(f"{3 * GIGABYTE}\n")
    (system / "memory.stat").write_text(f"anon {GIGABYTE}\nfile {2 * GIGABYTE}\n")
    assert memory.available_memory() == 3 * GIGABYTE
    (system / "memory.max").write_text("max\n")
    assert memory.available_memory() == 8 * GIGABYTE


@pytest.mark.parametrize("content", [None, "", "MemFree: 1 kB\n", "MemAvailable: much\n"])
def test_a_system_that_tells_nothing_still_has_some(system, content):
    if content is not None:
        (system / "meminfo").write_text(content)
    assert memory.available_memory() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of other processes")
def test_the_peak_of_a_running_process_is_seen_and_of_one_that_is_not_there_nothing():
    assert peak_resident_bytes(os.getppid()) > 0
    assert peak_resident_bytes(os.getpid()) == peak_resident_bytes() > 1 << 20
    # No process has the highest number that the system gives.
    assert peak_resident_bytes((1 << 22) + 1) == 0
