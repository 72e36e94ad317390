"""What the benchmark of whole models makes of its rounds, and how it watches the programs it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def end_to_end(import_benchmark):
    return import_benchmark("end_to_end")


def test_a_summary_has_the_median_and_the_spread_of_every_figure(end_to_end):
    found = end_to_end.summary(
        [{"decode": 10.0, "prefill": 5.0}, {"decode": 30.0, "prefill": 5.0}, {"decode": 20.0, "prefill": 5.0}]
    )
    assert found == {"decode": {"median": 20.0, "stdev": 10.0}, "prefill": {"median": 5.0, "stdev": 0.0}}
    assert end_to_end.summary([{"decode": 7.0}]) == {"decode": {"median": 7.0, "stdev": 0.0}}


def test_the_peak_of_a_running_program_is_seen_and_of_an_ended_one_nothing(end_to_end):
    assert end_to_end.resident_peak(os.getpid()) > 1 << 20
    # No process has the highest number that the system gives.
    assert end_to_end.resident_peak((1 << 22) + 1) == 0


def test_a_run_gives_its_output_seconds_and_memory(end_to_end):
    output, seconds, memory = end_to_end.fewbit("--version")
    assert output.startswith("fewbit ")
    assert seconds > 0
    assert memory > 1 << 20


def test_a_run_that_fails_is_an_error_with_its_words(end_to_end):
    with pytest.raises(SystemExit, match="no such file"):
        end_to_end.fewbit("generate", "/nowhere/at/all", "-p", "x")


def test_only_the_chosen_contestants_take_part(end_to_end, monkeypatch):
    asked = []
    monkeypatch.setattr(end_to_end, "checkpoint", lambda model, name: asked.append(name) or Path(name))
    monkeypatch.setattr(end_to_end, "reference_dir", lambda model, seed: Path(model))
    found = list(end_to_end.contestants("smollm2-135m", ["fewbit itq3_s 4 bits", "torch bfloat16"]))
    assert found == [("fewbit", "itq3_s 4 bits", Path("itq3_s 4 bits")), ("torch", "bfloat16", Path("smollm2-135m"))]
    assert asked == ["itq3_s 4 bits"]
