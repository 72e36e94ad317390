"""Tuning layer by layer lowers each layer's error behind the others, and goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fewbit.checkpoint.store import write_tensors
from fewbit.pipeline import descent, tune_layers
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from fewbit.pipeline.tune import Tuner

OPTIONS = QuantizeOptions(
    bits=2, calib_tokens=1024, calib_window=64, calib_dtype="float32", damping=0.01, tune=True, tune_steps=16
)


def test_every_layer_is_closer_to_the_full_model_than_before(tiny_models, calibration_text, tmp_path):
    quantize(tiny_models["biased"], tmp_path / "out", OPTIONS, [calibration_text])
    report = json.loads((tmp_path / "out" / "fewbit.json").read_text())["tuning"]
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    assert all(entry["after"] < entry["before"] for entry in report["layers"])
    assert report["history"][0]["step"] == 0


def test_windows_that_decide_when_tuning_ends_are_never_learned_from(
    tiny_models, calibration_text, tmp_path, monkeypatch
):
    seen: list[tuple[range, int]] = []
    learn_layers = Tuner._learn_layers

    def note(self, batches):
        seen.append((descent.held_batches(len(self.stream.batches)), batches))
        return learn_layers(self, batches)

    monkeypatch.setattr(Tuner, "_learn_layers", note)
    quantize(tiny_models["biased"], tmp_path / "out", replace(OPTIONS, tune_steps=4), [calibration_text])
    ((held, batches),) = seen
    assert batches == held.start == 6


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
