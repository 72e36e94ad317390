"""What a plan says of time and memory before anything runs."""

from __future__ import annotations

import pytest
import torch

import fewbit.pipeline.memory as memory_module
from fewbit.checkpoint.source import open_source
from fewbit.pipeline.memory import activation_bytes
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.predict import WINDOWS_PER_STEP, predict

WINDOW = 4096


def test_tuning_is_predicted_with_what_a_step_keeps(tiny_models, monkeypatch):
    source = open_source(tiny_models["tied"])
    plan = make_plan(source, QuantizeOptions(tune=True, tune_steps=4).resolved(source.weights()))
    windows = torch.zeros(8, WINDOW, dtype=torch.int64)
    peaks = {}
    for memory in (0, 1 << 40):
        monkeypatch.setattr(memory_module, "available_memory", lambda memory=memory: memory)
        peaks[memory] = predict(plan, windows)["peak_memory_bytes"]
    layers = len({tensor.shared_input.partition(".")[0] for tensor in plan.tensors if tensor.kind == "body"})
    kept = activation_bytes(plan, WINDOWS_PER_STEP * WINDOW)
    assert layers > 1
    assert peaks[1 << 40] - peaks[0] == pytest.approx(kept * (1 - 1 / layers), rel=0.2)


def test_more_work_is_predicted_to_take_longer(tiny_models):
    source = open_source(tiny_models["tied"])
    windows = torch.zeros(64, 512, dtype=torch.int64)
    seconds = [
        predict(make_plan(source, options.resolved(source.weights())), chosen)["seconds"]
        for options, chosen in (
            (QuantizeOptions(rounding="nearest", tune=False), None),
            (QuantizeOptions(tune=False), windows),
            (QuantizeOptions(tune=True, tune_steps=1000), windows),
        )
    ]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
