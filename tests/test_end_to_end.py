"""What the benchmark of whole models makes of its rounds, and how it watches the programs it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def end_to_end(import_benchmark):
    return import_benchmark("end_to_end")


@pytest.fixture
def toy_directory(import_benchmark, tmp_path):
    return import_benchmark("toy").toy_model(tmp_path)


def test_a_summary_has_the_median_and_the_spread_of_every_figure(end_to_end):
    found = end_to_end.summary(
        [{"decode": 10.0, "prefill": 5.0}, {"decode": 30.0, "prefill": 5.0}, {"decode": 20.0, "prefill": 5.0}]
    )
    assert found == {"decode": {"median": 20.0, "stdev": 10.0}, "prefill": {"median": 5.0, "stdev": 0.0}}
    assert end_to_end.summary([{"decode": 7.0}]) == {"decode": {"median": 7.0, "stdev": 0.0}}


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


def test_the_machine_s_speeds_are_those_that_fewbit_bench_measured_in_the_same_run(end_to_end, monkeypatch):
    said = {"prefill": [{"tokens_per_second": 1.0}], "decode": [{"tokens_per_second": 2.0}]}
    limits = {"bandwidth_share": 0.5, "read_bytes_per_second": 10}
    limits |= {"arithmetic_share": 0.25, "operations_per_second": 20}
    monkeypatch.setattr(end_to_end, "fewbit", lambda *arguments: (json.dumps({**said, **limits}), 0.0, 0))
    assert end_to_end.fewbit_speeds(Path("x"), 1) == {"prefill": 1.0, "decode": 2.0, **limits}


@pytest.mark.parametrize(("bits", "lost"), [(8, 0.01), (4, 0.13)])
@pytest.mark.parametrize(("rows", "cols", "bias"), [(192, 576, False), (256, 1536, True), (32, 64, False)])
def test_pytorch_s_packed_linears_are_nearly_the_plain_ones(import_benchmark, bits, lost, rows, cols, bias):
    linear = torch.nn.Linear(cols, rows, bias=bias).bfloat16()
    x = torch.randn(2, 3, cols).bfloat16()
    with torch.inference_mode():
        exact, found = linear(x).float(), import_benchmark("torch_linears").Packed(linear, bits)(x).float()
    assert found.shape == (2, 3, rows)
    assert (found - exact).norm() < lost * exact.norm()


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_pytorch_s_contestants_decode_a_toy_model(end_to_end, toy_directory, monkeypatch, name):
    monkeypatch.setattr(end_to_end, "PROMPT", 16)
    monkeypatch.setattr(end_to_end, "GENERATED", 2)
    speeds = end_to_end.torch_speeds(toy_directory, name, 1)
    assert min(speeds["prefill"], speeds["decode"]) > 0
