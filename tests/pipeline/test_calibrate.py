"""Calibration whose products are in bfloat16: everything between them stays float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbit.loading import load
from fewbit.math.hadamard import pack_signs, random_signs, rotate
from fewbit.ops.extension import load_native
from fewbit.pipeline.calibrate import InputAxes, InputCollector, add_products, bfloat16_products
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize


def has_gram() -> bool:
    """Whether Hessians in bfloat16 come from native code here."""
    native = load_native()
    return native is not None and native.has_gram()


@pytest.mark.parametrize("block", [1, 64, 256])
def test_hessians_are_float32_inside_a_layer_that_runs_in_bfloat16(block):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 8), torch.randn(100, 256)
    signs = random_signs(256, 0) if block > 1 else None
    with (
        torch.no_grad(),
        InputCollector([("x", linear)], {"x": InputAxes(signs, block)}, torch.bfloat16) as collector,
        torch.autocast("cpu", torch.bfloat16),
        bfloat16_products(torch.bfloat16),
    ):
        assert linear(x).dtype == torch.bfloat16
    exact = x if signs is None else rotate(x, signs, block)
    found = collector.take("x", 256)
    assert found.hessian.dtype == torch.float32
    torch.testing.assert_close(found.hessian, exact.T @ exact / 100, rtol=0, atol=0.02)
    assert found.held.dtype == torch.float32
    # Which library multiplies, and in which precision, depends on the machine.
    torch.testing.assert_close(found.held, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("tokens", [1, 33, 100])
@pytest.mark.parametrize("cols", [32, 100, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_on_and_above_the_diagonal(tokens, cols, dtype):
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
    before = torch.randn(cols, cols, generator=torch.Generator().manual_seed(cols))
    sums = before.clone()
    add_products(x, sums, dtype)
    add_products(x, sums, dtype)
    wrong = (sums - before - 2 * x.double().T @ x.double()).triu().abs().max()
    # A factor that is rounded to bfloat16 is off by up to 1/256 of itself; values reach 4.
    assert wrong < (1e-3 if dtype == torch.float32 else 0.2 * tokens**0.5)


@pytest.mark.skipif(not has_gram(), reason="this processor has no products of bfloat16")
def test_products_of_bfloat16_do_not_depend_on_the_number_of_threads():
    native = load_native()
    x = torch.randn(70, 200, generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        found.append(torch.zeros(200, 200))
        native.add_gram(x, found[-1])
    factors = x.bfloat16().double()
    assert (found[0] - factors.T @ factors).triu().abs().max() < 1e-4
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match="sums"):
        native.add_gram(x, torch.zeros(200, 100))


@pytest.mark.parametrize(("bits", "step"), [(4, 0.15), (8, 0.01)])
def test_statistics_of_quantized_inputs_are_those_of_what_the_kernels_multiply(bits, step):
    generator = torch.Generator().manual_seed(bits)
    linear, x = nn.Linear(256, 8), torch.randn(300, 256, generator=generator) + 3 * torch.rand(256, generator=generator)
    signs = random_signs(256, 0)
    with torch.no_grad(), InputCollector([("x", linear)], {"x": InputAxes(signs, 128, 64, bits)}) as collector:
        linear(x[:100])
        linear(x[100:])
    found = collector.take("x", 256)
    torch.testing.assert_close(found.shift, x[:100].mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mean, x.mean(0))
    q, scale, _ = torch.ops.fewbit.rotate_quantize(x, pack_signs(signs), 128, 64, bits, found.shift)
    seen = (q.view(300, 4, 64).float() * scale[..., None]).view(300, 256)
    torch.testing.assert_close(found.hessian, seen.T @ seen / 300)
    torch.testing.assert_close(found.mean_quantized, seen.mean(0))
    assert (seen - rotate(x - found.shift, signs, 128)).square().mean().sqrt() < step


def test_inputs_that_no_token_reached_get_a_neutral_prior():
    collector = InputCollector([("x", nn.Linear(64, 8))], {"x": InputAxes(None, 1, 64, 4)})
    assert collector.tokens("x") == 0
    found = collector.take("x", 64)
    assert torch.equal(found.hessian, torch.eye(64))
    assert not found.shift.any()
    assert not found.mean_quantized.any()


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
