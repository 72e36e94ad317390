"""How much memory there is to have."""

from __future__ import annotations

import pytest

from fewbit.pipeline import memory

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
