"""Checkpoints that benchmarks make: once, and again where a process was killed before it could say what it found."""

from __future__ import annotations

import pytest

from fewbit.pipeline.options import QuantizeOptions


@pytest.fixture
def checkpoints(import_benchmark):
    return import_benchmark("checkpoints")


def test_a_checkpoint_is_made_once_and_made_again_where_its_result_is_missing(checkpoints, tiny_models, tmp_path):
    options = QuantizeOptions(rounding="nearest")
    output = tmp_path / "row" / "checkpoint"
    first = checkpoints.made(tiny_models["tied"], options, output)
    assert first["stage_seconds"]
    assert not first["resumed"]
    assert checkpoints.made(tiny_models["tied"], options, output) == first
    (tmp_path / "row" / "checkpoint.json").unlink()
    again = checkpoints.made(tiny_models["tied"], options, output)
    assert again["bytes"] == first["bytes"]
    assert (output / "model.safetensors").exists()


def test_at_another_commit_a_checkpoint_is_made_again_unless_any_is_right(
    checkpoints, tiny_models, tmp_path, monkeypatch
):
    options, output = QuantizeOptions(rounding="nearest"), tmp_path / "checkpoint"
    first = checkpoints.made(tiny_models["tied"], options, output)
    monkeypatch.setattr(checkpoints, "commit", lambda: "another")
    assert checkpoints.made(tiny_models["tied"], options, output, any_commit=True) == first
    assert checkpoints.made(tiny_models["tied"], options, output)["commit"] == "another"
    two = QuantizeOptions(rounding="nearest", bits=2)
    assert checkpoints.made(tiny_models["tied"], two, output, any_commit=True)["options"]["bits"] == 2


def test_a_row_has_a_directory_of_its_own_beside_the_results(checkpoints, tmp_path):
    assert checkpoints.work_dir("W4A8 full, not tuned | seed 0", tmp_path / "twin.json") == (
        tmp_path / "twin.work" / "w4a8-full-not-tuned-seed-0"
    )
