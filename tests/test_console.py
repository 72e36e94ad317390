"""What the command line shows of long work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import fewbit.console as console


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def shown(request, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=output, force_terminal=request.param, width=200))
    return request.param, output


def test_into_a_file_long_work_says_how_far_it_is(shown, monkeypatch):
    terminal, output = shown
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress_bars() as bars:
        bars.stage("rounding", 210)
        for _ in range(5):
            now += 25
            bars.advance()
        count = bars.count("windows")
        count(0, 40)
        now += 60
        count(8, 40)
    lines = [line for line in output.getvalue().splitlines() if " of " in line]
    assert lines == ([] if terminal else ["rounding: 3 of 210", "windows: 8 of 40"])
