"""The sweep over prompts, sequences and threads: what it keeps of its rounds, and its table beside both limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def said(speed: float, threads: int) -> dict:
    """What `fewbit bench` says in a round, all its speeds in proportion to `speed`."""
    return {
        "prefill": [{"prompt_tokens": 32, "tokens_per_second": speed}],
        "decode": [{"batch": 1, "tokens_per_second": speed / 2}],
        "weight_bytes_per_token": 50,
        "read_bytes_per_second": 100 * speed,
        "operations_per_token": 200,
        "operations_per_second": 1000 * speed * threads,
    }


@pytest.fixture
def report(import_benchmark, monkeypatch, tmp_path) -> Path:
    """The results of three made-up rounds with one and two threads."""
    sweep = import_benchmark("sweep")
    speeds = iter([10.0, 10.0, 40.0, 40.0, 20.0, 20.0])
    monkeypatch.setattr(sweep, "checkpoint", lambda model, kind: Path(model))
    monkeypatch.setattr(sweep, "measured", lambda path, threads: said(next(speeds), threads))
    monkeypatch.setattr("sys.argv", ["sweep.py", "--models", "m", "--output", str(tmp_path / "sweep.json")])
    sweep.main()
    return tmp_path / "sweep.json"


def test_rows_hold_medians_and_what_both_limits_take(report):
    one, two = json.loads(report.read_text())["rows"]
    assert (one["threads"], two["threads"]) == (1, 2)
    assert one["prefill"]["32"]["median"] == 20.0
    assert (one["weight_bytes_per_token"], one["operations_per_token"]) == (50, 200)
    assert (one["read_bytes_per_second"], one["operations_per_second"]) == (2000.0, 20_000.0)
    assert two["operations_per_second"] == 40_000.0


def test_each_kind_of_speed_stands_beside_its_own_limit(report, import_benchmark, monkeypatch):
    tables = import_benchmark("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", report.parent)
    header, _, *lines = tables.sweep().splitlines()[:4]
    limits = "| arithmetic's limit for prompts | decode, 1 | memory's limit for 1 |"
    assert header == f"| model | threads | prompt 32 {limits}"
    assert lines == ["| m | 1 | 20 | 100 | 10 | 40 |", "| m | 2 | 20 | 200 | 10 | 40 |"]
