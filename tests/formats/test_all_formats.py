"""What holds for every registered format, whatever it stores."""

import pytest
import torch

from fewbit.dtypes import name_of
from fewbit.errors import UsageError
from fewbit.formats import format_names, get_format, group_format, group_format_names
from fewbit.formats.base import GroupFormat, TensorSpec
from fewbit.math.rounding import inverse_factor, quantize_rotated

CASES = [(name, bits) for name in group_format_names() for bits in get_format(name).bits]
ROW_GROUP = 16


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def _factor(cols: int) -> torch.Tensor:
    mixing = _random(1, cols, cols)
    return inverse_factor(mixing @ mixing.t())


def _encode(fmt: GroupFormat, weight: torch.Tensor, spec: TensorSpec, scale: float) -> torch.Tensor:
    """The values of a matrix encoded with a given shared scale."""
    starts = range(0, spec.cols, spec.group)
    groups = [fmt.encode_group(weight[:, s : s + spec.group].contiguous(), spec, scale, None) for s in starts]
    return torch.cat([group.values for group in groups], dim=1)


def test_the_known_formats_are_registered():
    assert {"ternary", "lloyd8", "iq3_s", "int4", "int8", "trellis", "twinquant"} <= set(format_names())
    with pytest.raises(UsageError, match="ternary"):
        get_format("no such format")


@pytest.mark.parametrize("cols", [64, 576, 896, 1536])
@pytest.mark.parametrize("rows", [1, 15, 17])
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_parts_match_the_layout_and_decode_to_the_encoders_values(name, bits, rows, cols):
    fmt = group_format(name)
    spec = fmt.spec(rows, cols, bits)
    weight = _random(rows + cols, rows, cols)
    done = quantize_rotated(fmt, weight, spec)
    layout = fmt.layout(spec)
    assert {key: (tuple(part.shape), name_of(part.dtype)) for key, part in done.parts.items()} == layout
    assert sum(part.numel() * part.element_size() for part in done.parts.values()) == fmt.storage_bytes(spec)
    assert done.values.shape == weight.shape
    assert done.values.dtype == torch.float32
    decoded = fmt.dequantize(done.parts, spec)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, done.values)
    assert 0.0 < done.relative_error < 0.25


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_with_feedback_too_the_parts_decode_to_the_encoders_values(name, bits):
    fmt = group_format(name)
    spec = fmt.spec(17, 576, bits)
    done = quantize_rotated(fmt, _random(2, 17, 576), spec, _factor(576))
    assert torch.equal(fmt.dequantize(done.parts, spec), done.values)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_single_rows_decode_as_in_the_whole(name, bits):
    fmt = group_format(name)
    spec = fmt.spec(37, 192, bits)
    done = quantize_rotated(fmt, _random(3, 37, 192), spec)
    rows = torch.tensor([36, 0, 17, 17])
    assert torch.equal(fmt.dequantize_rows(done.parts, spec, rows), done.values[rows])


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_row_groups_do_not_depend_on_each_other(name, bits):
    fmt = group_format(name)
    weight = _random(4, 3 * ROW_GROUP, 576)
    spec, small = fmt.spec(3 * ROW_GROUP, 576, bits), fmt.spec(ROW_GROUP, 576, bits)
    scale = fmt.tensor_scale(weight, spec)
    together = _encode(fmt, weight, spec, scale)
    alone = _encode(fmt, weight[ROW_GROUP : 2 * ROW_GROUP], small, scale)
    assert torch.equal(together[ROW_GROUP : 2 * ROW_GROUP], alone)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_groups_of_columns_do_not_depend_on_each_other_without_feedback(name, bits):
    fmt = group_format(name)
    weight = _random(5, ROW_GROUP, 1024)
    spec = fmt.spec(ROW_GROUP, 1024, bits)
    scale = fmt.tensor_scale(weight, spec)
    last = spec.cols - spec.group
    alone = fmt.encode_group(weight[:, last:].contiguous(), spec, scale, None).values
    assert torch.equal(_encode(fmt, weight, spec, scale)[:, last:], alone)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_zeros_and_single_spikes_stay_finite(name, bits):
    fmt = group_format(name)
    spec = fmt.spec(4, 256, bits)
    weight = torch.zeros(4, 256)
    weight[1, 3], weight[2, 255], weight[3, 0] = 1e-9, 1e6, -30.0
    done = quantize_rotated(fmt, weight, spec)
    assert bool(torch.isfinite(done.values).all())
    assert torch.equal(fmt.dequantize(done.parts, spec), done.values)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_tensor_is_left_as_it_was(name, bits):
    fmt = group_format(name)
    weight = _random(6, 16, 256)
    before = weight.clone()
    quantize_rotated(fmt, weight, fmt.spec(16, 256, bits))
    assert torch.equal(weight, before)
