"""The int8 format: small groups, a bounded error, and no rotation."""

import pytest
import torch

from fewbit.errors import UnsupportedShape, UsageError
from fewbit.formats import get_format
from fewbit.math.rounding import inverse_factor, quantize_rotated

FMT = get_format("int8")


@pytest.mark.parametrize(("cols", "group"), [(64, 64), (576, 96), (896, 128), (1536, 128), (96, 96), (160, 32)])
def test_groups_are_the_largest_multiple_of_32_up_to_128(cols, group):
    spec = FMT.spec(4, cols, 8)
    assert (spec.block, spec.group) == (1, group)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedShape, match="not a multiple of 32"):
        FMT.spec(4, 100, 8)
    with pytest.raises(UsageError, match="bits"):
        FMT.spec(4, 64, 4)
    with pytest.raises(UsageError, match="-5 x 64 cannot be stored"):
        FMT.spec(-5, 64, 8)


def test_every_weight_is_within_half_a_step():
    weight = torch.randn(16, 576, generator=torch.Generator().manual_seed(0))
    spec = FMT.spec(16, 576, 8)
    done = quantize_rotated(FMT, weight, spec)
    step = (done.parts["scales"].float() * done.parts["scale"]).repeat_interleave(spec.group, dim=1)
    # fp16 scales may be 2^-11 too small, which costs the largest weight up to 127 * 2^-11 steps more.
    assert bool(((done.values - weight).abs() <= (0.5 + 127 * 2**-11) * step).all())
    assert done.relative_error < 6e-5


def test_the_shared_factor_keeps_tiny_and_huge_weights_out_of_fp16_limits():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    spec = FMT.spec(4, 256, 8)
    for unit in (1e-20, 1.0, 1e20):
        done = quantize_rotated(FMT, weight * unit, spec)
        assert done.relative_error < 6e-5
        assert float(done.parts["scales"].max()) == 1.0


def test_feedback_that_grows_a_group_beyond_the_largest_is_still_stored():
    weight = torch.full((1, 256), 1e-3)
    spec = FMT.spec(1, 256, 8)
    scale = FMT.tensor_scale(weight, spec)
    encoded = FMT.encode_group(weight[:, :128] * 1000, spec, scale, None)
    torch.testing.assert_close(encoded.values, weight[:, :128] * 1000, rtol=1e-3, atol=0)


def test_zeros_decode_to_zeros():
    done = quantize_rotated(FMT, torch.zeros(2, 64), FMT.spec(2, 64, 8))
    assert not done.values.any()
    assert float(done.parts["scale"]) == 1.0


def test_feedback_is_carried_when_a_factor_is_given():
    spec = FMT.spec(4, 128, 8)
    mixing = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    factor = inverse_factor(mixing @ mixing.t())
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    encoded = FMT.encode_group(weight, spec, FMT.tensor_scale(weight, spec), factor)
    assert encoded.error is not None
    torch.testing.assert_close(encoded.error @ factor, weight - encoded.values, rtol=0, atol=1e-5)


def test_the_stored_bytes_are_those_of_format_version_1(fixed_weight, fingerprint):
    done = quantize_rotated(FMT, fixed_weight(17, 576), FMT.spec(17, 576, 8))
    assert fingerprint(done.parts) == "63ad2c968614b684"
