"""The formats ternary and lloyd8, and the bit fields they are stored in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import UnsupportedShape, UsageError
from fewbit.formats import get_format
from fewbit.formats.bits import pack_bits, unpack_bits
from fewbit.formats.scalar import gaussian_levels
from fewbit.math.rounding import quantize_rotated


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_fields_survive_packing(width, eights, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << width, (3, 8 * eights), generator=generator).to(torch.uint8)
    packed = pack_bits(values, width)
    assert packed.shape == (3, eights * width)
    assert torch.equal(unpack_bits(packed, width), values)


def test_fields_lie_least_significant_bit_first_and_cross_bytes():
    packed = pack_bits(torch.tensor([1, 2, 7, 0, 0, 0, 0, 4], dtype=torch.uint8), 3)
    assert packed.tolist() == [0b11_010_001, 0b0_000_000_1, 0b100_000_00]


def test_fields_that_fill_no_whole_bytes_are_refused():
    with pytest.raises(ValueError, match="whole bytes"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="whole fields"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack_bits(torch.zeros(8, dtype=torch.uint8), 9)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
def test_levels_are_symmetric_and_each_is_the_mean_of_its_cell(count):
    levels = torch.tensor(gaussian_levels(count), dtype=torch.float64)
    assert torch.equal(levels, -levels.flip(0))
    points = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    mass = torch.exp(-points.square() / 2)
    cell = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
    means = torch.zeros(count).double().index_add_(0, cell, mass * points) / torch.zeros(count).double().index_add_(
        0, cell, mass
    )
    torch.testing.assert_close(means, levels, rtol=0, atol=1e-4)


def test_known_levels_of_lloyd_and_max():
    assert gaussian_levels(2)[1] == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-9)
    assert gaussian_levels(3)[2] == pytest.approx(1.2240, abs=1e-4)
    assert gaussian_levels(8)[7] == pytest.approx(2.1520, abs=1e-4)


@pytest.mark.parametrize(("name", "expected"), [("ternary", 0.190), ("lloyd8", 0.0345)])
def test_the_error_on_gaussian_weights_is_the_known_one(name, expected):
    weight = torch.randn(128, 4096, generator=torch.Generator().manual_seed(0))
    fmt = get_format(name)
    assert quantize_rotated(fmt, weight, fmt.spec(128, 4096, 3)).relative_error == pytest.approx(expected, rel=0.01)


def test_ternary_fields_are_q_plus_one_and_decode_to_d_times_q_minus_z():
    fmt = get_format("ternary")
    parts = {
        "codes": pack_bits(torch.tensor([0, 1, 2, 1, 0, 0, 2, 2] * 4, dtype=torch.uint8)[None], 3),
        "scales": torch.tensor([[0.5]]).half(),
        "zeros": torch.tensor([[1.0]]).half(),
    }
    values = fmt.dequantize(parts, fmt.spec(1, 32, 3))
    assert values[0, :8].tolist() == [-1.0, -0.5, 0.0, -0.5, -1.0, -1.0, 0.0, 0.0]


def test_a_ternary_row_of_equal_values_decodes_to_itself():
    fmt = get_format("ternary")
    weight = torch.tensor([[0.25], [-3.0], [0.0]]).expand(3, 256).contiguous()
    done = quantize_rotated(fmt, weight, fmt.spec(3, 256, 3))
    assert torch.equal(done.values, weight)


@pytest.mark.parametrize("name", ["ternary", "lloyd8"])
def test_widths_that_do_not_fit_are_refused(name):
    with pytest.raises(UnsupportedShape, match="not a multiple of 32"):
        get_format(name).spec(4, 80, 3)
    with pytest.raises(UsageError, match="bits"):
        get_format(name).spec(4, 64, 4)


@pytest.mark.parametrize(("name", "bits_per_weight"), [("ternary", 3.125), ("lloyd8", 3.0625)])
def test_bits_per_weight_in_groups_of_256(name, bits_per_weight):
    fmt = get_format(name)
    assert fmt.storage_bytes(fmt.spec(16, 4096, 3)) * 8 / (16 * 4096) == bits_per_weight


@pytest.mark.parametrize(("name", "golden"), [("ternary", "55c62ed4aa460420"), ("lloyd8", "2345a89e69e66bb9")])
def test_the_stored_bytes_are_those_of_format_version_1(name, golden, fixed_weight, fingerprint):
    fmt = get_format(name)
    done = quantize_rotated(fmt, fixed_weight(17, 576), fmt.spec(17, 576, 3))
    assert fingerprint(done.parts) == golden
