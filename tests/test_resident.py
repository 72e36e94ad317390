"""The memory of a process is its own."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import fewbit.resident as resident
from fewbit.resident import peak_resident_bytes, resident_bytes

LARGE = 256 << 20


def test_memory_that_was_given_back_counts_at_the_peak_alone():
    before = resident_bytes()
    large = np.ones(LARGE, dtype=np.uint8)
    assert resident_bytes() > before + LARGE / 2
    del large
    assert resident_bytes() < before + LARGE / 2
    assert peak_resident_bytes() > before + LARGE / 2


def test_the_memory_of_the_process_that_started_this_one_does_not_count():
    large = np.ones(LARGE, dtype=np.uint8)
    command = [sys.executable, "-c", "from fewbit.resident import peak_resident_bytes as peak; print(peak())"]
    child = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert 0 < child < LARGE < peak_resident_bytes()
    del large


@pytest.mark.parametrize("status", [None, "Name:\tpython\n"], ids=["no file", "no such lines"])
def test_where_the_system_tells_less_its_resource_usage_is_taken(status, tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "_PROCESSES", tmp_path)
    if status is not None:
        (tmp_path / "self").mkdir()
        (tmp_path / "self" / "status").write_text(status)
    assert resident_bytes() == peak_resident_bytes() > 10**7
    assert peak_resident_bytes(1) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of other processes")
def test_the_peak_of_a_running_process_is_seen_and_of_one_that_is_not_there_nothing():
    assert peak_resident_bytes(os.getppid()) > 0
    assert peak_resident_bytes(os.getpid()) == peak_resident_bytes() > 1 << 20
    # No process has the highest number that the system gives.
    assert peak_resident_bytes((1 << 22) + 1) == 0
