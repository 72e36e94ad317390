"""Tuning layer by layer lowers each layer's error behind the others, and goes on where it was."""

from __future__ import annotations

import json

import pytest

from fewbit.checkpoint.store import write_tensors
from fewbit.pipeline import tune_layers
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize

OPTIONS = QuantizeOptions(
    bits=2, calib_tokens=1024, calib_window=64, calib_dtype="float32", damping=0.01, tune=True, tune_steps=16
)


def test_every_layer_is_closer_to_the_full_model_than_before(tiny_models, calibration_text, tmp_path):
    quantize(tiny_models["biased"], tmp_path / "out", OPTIONS, [calibration_text])
    report = json.loads((tmp_path / "out" / "fewbit.json").read_text())["tuning"]
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    assert all(entry["after"] < entry["before"] for entry in report["layers"])
    assert report["history"][0]["step"] == 0


def test_a_run_that_ends_between_two_layers_goes_on_byte_identical(
    tiny_models, calibration_text, tmp_path, monkeypatch
):
    quantize(tiny_models["biased"], tmp_path / "whole", OPTIONS, [calibration_text])

    class Killed(BaseException):
        pass

    def write_and_die(path, tensors, metadata=None):
        write_tensors(path, tensors, metadata)
        raise Killed

    monkeypatch.setattr(tune_layers, "write_tensors", write_and_die)
    with pytest.raises(Killed):
        quantize(tiny_models["biased"], tmp_path / "resumed", OPTIONS, [calibration_text])
    monkeypatch.undo()
    quantize(tiny_models["biased"], tmp_path / "resumed", OPTIONS, [calibration_text])
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / path.name).read_bytes() == path.read_bytes()
