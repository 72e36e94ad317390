"""The trellis format: its bits on disk, what its code achieves, and that it can be cut without re-encoding."""

import pytest
import torch

from fewbit.errors import CorruptFile, NonFiniteWeights, UsageError
from fewbit.formats import get_format, trellis
from fewbit.formats.base import TensorSpec
from fewbit.math.rounding import inverse_factor, quantize_rotated
from fewbit.ops.extension import load_native

FORMAT = get_format("trellis")
BITS = (2, 3, 4)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def _factor(cols: int) -> torch.Tensor:
    mixing = _random(1, 2 * cols, cols) @ (torch.eye(cols) + _random(2, cols, cols))
    return inverse_factor(mixing.t() @ mixing)


def slow_decode(parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
    """The layout read literally, one bit after the other, in Python integers."""
    table = parts["tables"].tolist()
    codes, scales, scale = parts["codes"], parts["scales"].float(), parts["scale"]
    stream_bytes = 2 * spec.bits * spec.group
    out = torch.empty(spec.rows, spec.cols)
    for row in range(spec.rows):
        for col in range(spec.cols):
            group, c, r = col // spec.group, col % spec.group, row % 16
            stream = codes[row // 16, group * stream_bytes : (group + 1) * stream_bytes].tolist()
            t = (c // 4) * 64 + r * 4 + c % 4
            places = range(spec.bits * t + spec.bits - 12, spec.bits * t + spec.bits)
            bits = [stream[place // 8] >> place % 8 & 1 if place >= 0 else 0 for place in places]
            a = sum(bit << i for i, bit in enumerate(bits[0:4]))
            b = sum(bit << i for i, bit in enumerate(bits[4:6]))
            d = sum(bit << i for i, bit in enumerate(bits[6:8]))
            e = sum(bit << i for i, bit in enumerate(bits[8:12]))
            level = table[a] + table[16 + b] + table[20 + d] + table[24 + e]
            out[row, col] = level * (scales[row, group] * scale[0])
    return out


@pytest.mark.parametrize("bits", BITS)
def test_hand_made_codes_decode_as_the_layout_says_bit_by_bit(bits):
    spec = TensorSpec("trellis", bits, 19, 64, 32, 32)
    generator = torch.Generator().manual_seed(bits)
    parts = {
        "codes": torch.randint(0, 256, (2, 2 * bits * 64), generator=generator, dtype=torch.uint8),
        "scales": torch.rand(19, 2, generator=generator).half(),
        "scale": torch.tensor([0.37]),
        "tables": torch.randint(-31, 32, (40,), generator=generator, dtype=torch.int8),
    }
    expected = slow_decode(parts, spec)
    assert torch.equal(FORMAT.dequantize(parts, spec), expected)
    scales = parts["scales"].float() * parts["scale"]
    assert torch.equal(trellis.dequantize_torch(parts["codes"], scales, parts["tables"], bits, 32), expected)


@pytest.mark.parametrize(
    ("bits", "digest"), [(2, "b33e78ef95936c45"), (3, "f9a57813439a4065"), (4, "691187009e6eebe2")]
)
def test_codes_and_scales_of_a_fixed_tensor_never_change_within_format_version_1(
    bits, digest, fixed_weight, fingerprint
):
    spec = FORMAT.spec(21, 192, bits)
    assert fingerprint(quantize_rotated(FORMAT, fixed_weight(21, 192), spec).parts) == digest


@pytest.mark.skipif(load_native() is None, reason="200,000 samples take minutes without the native extension")
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.078), (3, 0.0204), (4, 0.0053)])
def test_shipped_tables_reach_their_error_on_gaussian_samples(bits, bound):
    spec = FORMAT.spec(800, 256, bits)
    weight = _random(17, 800, 256)
    values = FORMAT.encode_group(weight, spec, FORMAT.tensor_scale(weight, spec), None).values
    relative = (weight - values).square().sum() / weight.square().sum()
    assert relative < bound


@pytest.mark.parametrize("bits", BITS)
def test_integer_costs_lose_less_than_half_a_percent_against_float64_costs(bits):
    if (native := load_native()) is None:
        pytest.skip("too slow without the native extension")
    tables, unit = trellis.load_tables(bits)
    levels = trellis.state_levels(tables, bits).double()
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).double() * unit
    contexts = 4096 >> bits
    cost = torch.full((64, contexts), torch.inf, dtype=torch.float64)
    cost[:, 0] = 0
    for target in x.unbind(1):
        total = cost.repeat_interleave(1 << bits, 1) + (target[:, None] - levels).square()
        cost = total.view(64, 1 << bits, contexts).min(1).values
    best = cost.min(1).values.sum() / x.numel()
    fixed = (x * trellis.LEVELS_PER_UNIT).clamp(-32767, 32767).round().to(torch.int16)
    by_window = (trellis.window_values(tables) * trellis.LEVELS_PER_UNIT).to(torch.int16)
    symbols = torch.empty(64, 256, dtype=torch.uint8)
    native.trellis_encode_streams(fixed, by_window, bits, symbols)
    states = trellis.follow(symbols.long(), torch.zeros(64, dtype=torch.int64), bits)
    found = (x - levels[states]).square().mean()
    assert best <= found < 1.005 * best


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols"), [(5, 576), (40, 896), (33, 1536)])
def test_cutting_along_inputs_and_row_groups_leaves_the_bits_alone(bits, rows, cols):
    spec = FORMAT.spec(rows, cols, bits)
    weight = _random(4, rows, cols)
    whole = quantize_rotated(FORMAT, weight, spec).parts
    scale = whole["scale"].item()
    cut = spec.group * (spec.groups // 2)
    piece = weight[rows // 16 // 2 * 16 :, cut : cut + spec.group].contiguous()
    part_spec = FORMAT.spec(piece.shape[0], spec.group, bits)
    part = FORMAT.encode_group(piece, part_spec, scale, None).parts
    first = rows // 16 // 2
    width = 2 * bits
    assert torch.equal(part["codes"], whole["codes"][first:, cut * width : (cut + spec.group) * width])
    assert torch.equal(part["scales"][:, 0], whole["scales"][first * 16 :, cut // spec.group])


def test_row_groups_may_be_permuted_with_their_codes():
    spec = FORMAT.spec(48, 128, 3)
    weight = _random(5, 48, 128)
    order = [2, 0, 1]
    rows = torch.cat([torch.arange(16 * i, 16 * i + 16) for i in order])
    plain = quantize_rotated(FORMAT, weight, spec).parts
    moved = quantize_rotated(FORMAT, weight[rows], spec).parts
    assert torch.equal(moved["codes"], plain["codes"][order])
    assert torch.equal(moved["scales"], plain["scales"][rows])


@pytest.mark.parametrize("bits", BITS)
def test_error_times_factor_is_what_the_values_miss(bits):
    spec = FORMAT.spec(20, 192, bits)
    weight, factor = _random(6, 20, 192), _factor(192)
    done = FORMAT.encode_group(weight, spec, FORMAT.tensor_scale(weight, spec), factor)
    assert torch.allclose(done.error @ factor, weight - done.values, atol=1e-6)


def test_error_feedback_lowers_the_output_error():
    spec = FORMAT.spec(64, 192, 3)
    weight, factor = _random(7, 64, 192), _factor(192)
    scale = FORMAT.tensor_scale(weight, spec)

    def output_error(values: torch.Tensor) -> float:
        return torch.linalg.solve_triangular(factor, weight - values, upper=True, left=False).square().sum().item()

    plain = FORMAT.encode_group(weight, spec, scale, None)
    fed_back = FORMAT.encode_group(weight, spec, scale, factor)
    assert output_error(fed_back.values) < 0.9 * output_error(plain.values)


@pytest.mark.parametrize("magnitude", [1e-12, 1e-7, 1.0, 1e6])
def test_relative_error_does_not_depend_on_the_size_of_the_weights(magnitude):
    spec = FORMAT.spec(16, 64, 4)
    weight = _random(8, 16, 64) * magnitude
    done = quantize_rotated(FORMAT, weight, spec)
    assert done.relative_error < 0.008


def test_stored_scales_leave_room_for_groups_to_grow_sixteenfold():
    spec = FORMAT.spec(16, 64, 3)
    weight = _random(9, 16, 64)
    scale = FORMAT.tensor_scale(weight, spec)
    done = FORMAT.encode_group(15 * weight, spec, scale, None)
    assert torch.isfinite(done.parts["scales"]).all()
    assert (15 * weight - done.values).square().sum() < 0.05 * (15 * weight).square().sum()


def test_zero_rows_and_a_zero_matrix_stay_zero():
    spec = FORMAT.spec(17, 64, 3)
    weight = _random(10, 17, 64)
    weight[3] = 0
    done = quantize_rotated(FORMAT, weight, spec, _factor(64))
    assert not FORMAT.dequantize(done.parts, spec)[3].any()
    assert not quantize_rotated(FORMAT, torch.zeros(17, 64), spec).values.any()


def test_an_outlier_saturates_without_harming_the_rest():
    spec = FORMAT.spec(16, 256, 3)
    weight = _random(11, 16, 256)
    weight[2, 5] = 3.0
    done = quantize_rotated(FORMAT, weight, spec)
    others = torch.arange(16) != 2
    left = (weight - done.values)[others].square().sum() / weight[others].square().sum()
    assert left < 0.023


def test_what_cannot_be_encoded_is_refused_with_a_reason():
    spec = FORMAT.spec(16, 64, 3)
    weight = _random(12, 16, 64)
    with pytest.raises(UsageError, match=r"\[16, 64\], not \[16, 32\]"):
        FORMAT.encode_group(weight[:, :32], spec, 1.0, None)
    with pytest.raises(UsageError, match="positive diagonal"):
        FORMAT.encode_group(weight, spec, 1.0, torch.zeros(64, 64))
    weight[0, 0] = 1e22
    with pytest.raises(NonFiniteWeights, match="too large to be squared"):
        quantize_rotated(FORMAT, weight, spec)
    weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeights):
        FORMAT.encode_group(weight, spec, 1.0, None)


@pytest.mark.parametrize("part", ["codes", "scales", "scale", "tables"])
def test_parts_of_another_shape_are_refused_by_name(part):
    spec = FORMAT.spec(16, 64, 3)
    parts = dict(quantize_rotated(FORMAT, _random(13, 16, 64), spec).parts)
    parts[part] = parts[part][..., :-1]
    with pytest.raises(CorruptFile, match=part):
        FORMAT.dequantize(parts, spec)
