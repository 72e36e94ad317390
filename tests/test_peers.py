"""What the benchmark asks of llama.cpp's kernels and what it makes of their times, without building them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_peers():
    spec = importlib.util.spec_from_file_location("benchmark_peers", ROOT / "benchmarks" / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(monkeypatch):
    """The commands given to a driver that takes half a second for each of two calls, with two busy threads."""
    module, commands = load_peers(), []

    def run(command, what):
        commands.append(command[1:])
        seconds = {"calls": 2, "wall_seconds": [1.0, 1.0, 4.0], "cpu_seconds": [2.0, 2.0, 2.0]}
        report = {"bytes": 4_500_000, "features": ["AVX2", "FMA"], "times": dict.fromkeys(command[7:], seconds)}
        return json.dumps(report)

    monkeypatch.setattr(module, "run", run)
    return module, commands


def test_one_thread_takes_every_way_of_multiplying_and_medians_count(asked):
    module, commands = asked
    rows = module.products(Path("driver"), "Q4_0", 1000, 8000, 1, 1, 3)
    assert commands == [
        ["Q4_0", "1000", "8000", "1", "1", "3", "vec_dot", "mul_mat"],
        ["Q4_0", "1000", "8000", "1", "1", "3", "repacked"],
    ]
    assert [row["path"] for row in rows] == ["vec_dot", "mul_mat", "repacked"]
    speed = rows[0]["billion_weights_per_second"]
    assert (speed["median"], speed["median_per_cpu_second"]) == (0.016, 0.008)
    assert rows[0]["bits_per_weight"] == 4.5


def test_many_tokens_and_threads_go_through_graphs_alone(asked):
    module, commands = asked
    (row,) = module.products(Path("driver"), "IQ3_S", 1000, 8000, 500, 2, 3)
    assert commands == [["IQ3_S", "1000", "8000", "500", "2", "3", "mul_mat"]]
    assert row["tera_operations_per_second"]["median"] == 0.016


def test_matrices_in_cache_fill_a_megabyte_with_rows_to_interleave(asked):
    module, commands = asked
    list(module.measure(Path("driver"), 1, 3, large=(1 << 18, 1 << 14), small_cols=4096, many=(8192, 2048, 512)))
    small = {command[0]: int(command[1]) for command in commands if command[2] == "4096"}
    assert set(small) == set(module.TYPES)
    assert all(rows % 8 == 0 for rows in small.values())
    assert small["Q8_0"] * 4096 * 34 // 32 <= 1 << 20 < (small["Q8_0"] + 8) * 4096 * 34 // 32
