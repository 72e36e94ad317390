"""The memory of a process is its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

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
