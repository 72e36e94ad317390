"""The int4 format: its bytes, its range, and what searched scales buy."""

import pytest
import torch

from fewbit.errors import UnsupportedShape, UsageError
from fewbit.formats import get_format
from fewbit.formats.int4 import LEAST, MOST, best_scales, best_scales_reference, pack_nibbles, unpack_nibbles
from fewbit.math.rounding import quantize_rotated
from fewbit.ops.extension import load_native


@pytest.mark.parametrize(("rows", "group"), [(1, 32), (16, 64), (37, 128)])
def test_every_byte_holds_the_two_weights_that_the_layout_names(rows, group):
    values = torch.randint(LEAST, MOST + 1, (rows, group), generator=torch.Generator().manual_seed(rows))
    codes = pack_nibbles(values)
    assert codes.shape == (-(-rows // 16), 8 * group)
    for row in (0, rows // 2, rows - 1):
        for col in (0, 3, 4, 7, 8, group - 1):
            byte = int(codes[row // 16, col // 8 * 64 + row % 16 * 4 + col % 4])
            assert (byte >> 4 if col % 8 >= 4 else byte & 15) - 8 == values[row, col]


def test_packing_and_unpacking_are_inverse_over_several_groups():
    values = torch.randint(LEAST, MOST + 1, (21, 3 * 64), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    codes = torch.cat([pack_nibbles(group) for group in values.split(64, 1)], 1)
    assert torch.equal(unpack_nibbles(codes, 21, 3), values)


@pytest.mark.parametrize(("cols", "group", "block"), [(4096, 128, 256), (576, 64, 64), (96, 32, 32), (384, 128, 128)])
def test_groups_are_powers_of_two_up_to_128(cols, group, block):
    spec = get_format("int4").spec(16, cols, 4)
    assert (spec.group, spec.block) == (group, block)


def test_searched_scales_lose_less_than_those_of_the_largest_magnitude():
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    fmt = get_format("int4")
    found = quantize_rotated(fmt, weight, fmt.spec(64, 1024, 4)).relative_error
    grouped = weight.view(64, 8, 128)
    step = grouped.abs().amax(2, keepdim=True) / MOST
    plain = float(((grouped / step).round() * step - grouped).square().sum() / weight.square().sum())
    assert found < 0.0096 < 0.0130 < plain


def squared_error(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What each row loses when it is rounded with its scale, float32 `[N]`."""
    step = torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]
    return ((weight / step).round().clamp(LEAST, MOST) * scales[:, None] - weight).square().sum(1)


@pytest.mark.skipif(load_native() is None, reason="no native code here")
@pytest.mark.parametrize("group", [32, 96, 128])
def test_native_code_finds_the_scales_of_the_reference(group):
    native = load_native()
    weight = torch.randn(70, 2 * group, generator=torch.Generator().manual_seed(3))[:, :group]
    weight[3] = 0.0
    weight[4, :2] = torch.tensor([-7.0, 6.0])
    expected = best_scales_reference(weight)
    usual = native.isa()
    try:
        for isa in native.available_isas():
            native.select_isa(isa)
            found = best_scales(weight)
            # Of two clips that lose as much, to rounding, either will do.
            assert float(torch.isclose(found, expected, rtol=1e-6).float().mean()) > 0.95
            torch.testing.assert_close(squared_error(weight, found), squared_error(weight, expected))
            assert found[3] == 0.0
    finally:
        native.select_isa(usual)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedShape, match="48 inputs are not a multiple of 32"):
        get_format("int4").spec(4, 48, 4)
    with pytest.raises(UsageError, match="stores \\(4,\\) bits, not 3"):
        get_format("int4").spec(4, 64, 3)
    with pytest.raises(UsageError, match="0 x 64 cannot be stored"):
        get_format("int4").spec(0, 64, 4)


def test_golden_bytes(fixed_weight, fingerprint):
    fmt = get_format("int4")
    parts = quantize_rotated(fmt, fixed_weight(20, 256), fmt.spec(20, 256, 4)).parts
    assert fingerprint(parts) == "74cecb85f42ba0c4"
