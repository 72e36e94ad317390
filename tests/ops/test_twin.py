"""The fused dual-component product: what the reference says, whatever computes it."""

from dataclasses import replace

import pytest
import torch

from fewbit.formats import get_format
from fewbit.math.hadamard import pack_signs, random_signs, rotate
from fewbit.math.rounding import quantize_rotated
from fewbit.ops import cpu, reference
from fewbit.ops.extension import load_native

native = load_native()
ISAS = [*native.available_isas(), *native.emulated_isas()] if native else []
ops = torch.ops.fewbit


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _parts(weight: torch.Tensor, group: int) -> list[torch.Tensor]:
    fmt = get_format("int4")
    parts = quantize_rotated(fmt, weight, replace(fmt.spec(*weight.shape, 4), group=group)).parts
    return [parts["codes"], parts["scales"], parts["scale"]]


def _twin(rows: int, cols: int, rank: int, seed: int = 0) -> dict:
    """A layer whose residual and V share the scale groups of K inputs."""
    group = min(128, cols & -cols, rank & -rank)
    down, both = _parts(_random(seed, rank, cols), group), _parts(_random(seed + 1, rows, cols + rank), group)
    names = ("down_codes", "down_scales", "down_scale", "codes", "scales", "tensor_scale")
    signs, bias = pack_signs(random_signs(cols, seed)), _random(seed + 2, rows)
    return {**dict(zip(names, down + both, strict=True)), "signs": signs, "bias": bias, "block": min(256, cols & -cols)}


SHAPES = [(40, 256, 128), (17, 576, 64), (100, 1536, 128), (1, 64, 64), (33, 96, 32)]


@pytest.mark.skipif(native is None, reason="the native extension is not built")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "rank"), SHAPES)
def test_every_instruction_set_gives_the_reference_bit_for_bit(isa, rows, cols, rank, act_bits):
    layer = _twin(rows, cols, rank)
    before = native.isa()
    native.select_isa(isa)
    try:
        for tokens in (0, 1, 3, 9, 40):
            for dtype in (torch.float32, torch.bfloat16):
                x = _random(tokens, tokens, cols).to(dtype)
                for shift in (None, _random(6, cols).to(dtype)):
                    expected = reference.twin_linear(x, **layer, act_bits=act_bits, shift=shift)
                    assert torch.equal(ops.twin_linear(x, **layer, act_bits=act_bits, shift=shift), expected)
    finally:
        native.select_isa(before)


def test_it_is_the_sum_of_both_components_up_to_rounded_inputs():
    rows, cols, rank = 48, 512, 128
    layer = _twin(rows, cols, rank)
    fmt = get_format("int4")
    down = fmt.dequantize(
        {"codes": layer["down_codes"], "scales": layer["down_scales"], "scale": layer["down_scale"]},
        fmt.spec(rank, cols, 4),
    )
    both = fmt.dequantize(
        {"codes": layer["codes"], "scales": layer["scales"], "scale": layer["tensor_scale"]},
        fmt.spec(rows, cols + rank, 4),
    )
    x = _random(5, 7, cols)
    rotated = rotate(x, random_signs(cols, 0), 256)
    exact = rotated @ both[:, :cols].T + rotated @ down.T @ both[:, cols:].T + layer["bias"]
    for act_bits, bound in ((8, 0.015), (4, 0.25)):
        error = (ops.twin_linear(x, **layer, act_bits=act_bits) - exact).norm() / exact.norm()
        assert error < bound


@pytest.mark.parametrize("act_bits", [4, 8])
def test_the_widths_of_activations_reach_the_plain_product_too(act_bits):
    codes, scales, scale = _parts(_random(1, 24, 384), 128)
    x = _random(2, 5, 384)
    y = ops.linear(x, codes, scales, scale, None, None, None, 4, 128, "nibbles", act_bits)
    q = ops.rotate_quantize(x, None, 128, 128, act_bits)
    expected = ops.packed_linear(*q, codes, scales, scale, None, None, 4, "nibbles", torch.float32)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [0, 2, 20])
def test_the_operator_passes_opcheck_and_compiles(tokens):
    layer = _twin(20, 192, 64)
    x = _random(tokens, tokens, 192)
    torch.library.opcheck(ops.twin_linear, (x,), layer)
    compiled = torch.compile(lambda x: ops.twin_linear(x, **layer), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.twin_linear(x, **layer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_bits": 6}, "8 or 4"),
        ({"down_codes": torch.zeros(4, 8, dtype=torch.uint8)}, "codes must be torch.uint8"),
        ({"codes": torch.zeros(2, 8 * 192, dtype=torch.uint8)}, "codes must be torch.uint8"),
        ({"down_scales": torch.ones(63, 3).half()}, "the rank 63 is not a multiple of the scale group 64"),
        ({"bias": torch.zeros(21)}, r"bias must be float \[20\]"),
        ({"x": torch.zeros(2, 128)}, "128 inputs in 3 scale groups"),
        ({"shift": torch.zeros(191)}, r"shift must be float \[192\]"),
    ],
)
def test_malformed_layers_raise_value_errors_that_name_them(change, message):
    arguments = {"x": torch.zeros(2, 192), **_twin(20, 192, 64), **change}
    with pytest.raises(ValueError, match=message):
        cpu.twin_linear(**arguments)
    with pytest.raises(ValueError, match=message):
        ops.twin_linear(**arguments)
