"""The memory of a process is its own."""

from __future__ import annotations

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
    monkeypatch.setattr(resident, "_STATUS", tmp_path / "status")
    if status is not None:
        (tmp_path / "status").write_text(status)
    assert resident_bytes() == peak_resident_bytes() > 10**7
