"""Calibration whose products are in bfloat16: everything between them stays float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbit.loading import load
from fewbit.math.hadamard import random_signs, rotate
from fewbit.pipeline.calibrate import HessianCollector, bfloat16_products
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize


@pytest.mark.parametrize("block", [1, 64, 256])
def test_hessians_are_float32_inside_a_layer_that_runs_in_bfloat16(block):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 8), torch.randn(100, 256)
    signs = random_signs(256, 0) if block > 1 else None
    with (
        torch.no_grad(),
        HessianCollector([("x", linear)], {"x": (signs, block)}) as collector,
        torch.autocast("cpu", torch.bfloat16),
        bfloat16_products(torch.bfloat16),
    ):
        assert linear(x).dtype == torch.bfloat16
    exact = x if signs is None else rotate(x, signs, block)
    found = collector.take("x", 256)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.T @ exact / 100, rtol=0, atol=0.02)
    assert collector.held["x"].dtype == torch.float32
    assert torch.equal(collector.held["x"], exact)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("tune", [True, False])
def test_a_run_in_bfloat16_makes_nearly_the_model_of_one_in_float32(
    tiny_models, calibration_text, tmp_path, sequential, tune
):
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = {}
    for dtype in ("float32", "bfloat16"):
        options = QuantizeOptions(
            bits=4,
            calib_tokens=1024,
            calib_window=64,
            calib_dtype=dtype,
            sequential=sequential,
            tune=tune,
            tune_steps=16 * tune,
        )
        quantize(tiny_models["biased"], tmp_path / dtype, options, [calibration_text])
        with torch.no_grad():
            logits[dtype] = load(tmp_path / dtype, torch.float32)[0](ids).logits
    assert (logits["bfloat16"] - logits["float32"]).norm() < 0.2 * logits["float32"].norm()
