"""The statements of arXiv 2603.27914 about its ternary code: those that hold, and those that fail as printed."""

import math

import pytest
import torch

from fewbit.dtypes import numpy_dtype
from fewbit.formats import get_format
from fewbit.formats.scalar import PAPER_ALPHA, gaussian_levels, ternary_codes, ternary_grid, ternary_values
from fewbit.math.hadamard import fwht, random_signs, rotate, unrotate
from fewbit.math.rounding import quantize_rotated

BLOCK = 256


def _normal(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def _student(rows: int, freedom: int = 5) -> torch.Tensor:
    """Student's t as a normal over the root of a mean of squares."""
    generator = torch.Generator().manual_seed(1)
    denominator = torch.randn(freedom, rows, BLOCK, generator=generator).square().mean(0).sqrt()
    return torch.randn(rows, BLOCK, generator=generator) / denominator


def _with_outlier_channels(rows: int) -> torch.Tensor:
    weight = _normal(rows, 2)
    weight[:, [17]] *= 8.0
    return weight


def _kurtosis(x: torch.Tensor) -> float:
    """The fourth moment over the squared second, 3 for a Gaussian, averaged over rows."""
    centred = (x - x.mean(1, keepdim=True)).double()
    return float((centred.pow(4).mean(1) / centred.square().mean(1).square()).mean())


def _quantize(weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decoded values, the step per weight, and where the code clipped."""
    step, zero = ternary_grid(weight, alpha)
    codes = ternary_codes(weight, step, zero)
    clipped = (torch.round(weight / step.float()[:, None]) + zero.float()[:, None]).abs() > 1
    return ternary_values(codes, step, zero), step.float()[:, None].expand_as(weight), clipped


@pytest.mark.parametrize("make", [_student, _with_outlier_channels])
def test_rotation_brings_heavy_tails_to_those_of_a_gaussian(make):
    weight = make(512)
    before, after = _kurtosis(weight), _kurtosis(rotate(weight, random_signs(BLOCK, 3), BLOCK))
    assert before > 4.5
    assert after == pytest.approx(3.0, abs=0.25)


def test_rotation_buys_nothing_on_gaussian_weights():
    weight = _normal(512)
    errors = [float((_quantize(w, 1.224)[0] - w).square().mean()) for w in (weight, fwht(weight, BLOCK))]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("make", [_student, _with_outlier_channels])
@pytest.mark.parametrize("name", ["ternary", "lloyd8", "iq3_s"])
def test_rotation_lowers_the_error_on_heavy_tails(make, name):
    weight, signs, fmt = make(256), random_signs(BLOCK, 3), get_format(name)
    spec = fmt.spec(256, BLOCK, 3)
    plain = quantize_rotated(fmt, weight, spec)
    rotated = quantize_rotated(fmt, rotate(weight, signs, BLOCK), spec)
    assert rotated.relative_error < 0.95 * plain.relative_error


def test_the_round_trip_through_the_rotation_is_exact_to_rounding():
    weight, signs = _student(64), random_signs(BLOCK, 4)
    back = unrotate(rotate(weight, signs, BLOCK), signs, BLOCK)
    assert float((back - weight).norm() / weight.norm()) < 1e-6


def test_the_error_is_the_same_in_both_domains():
    weight, signs = _student(64), random_signs(BLOCK, 4)
    rotated = rotate(weight, signs, BLOCK)
    values = _quantize(rotated, 1.224)[0]
    there = (values - rotated).square().sum()
    here = (unrotate(values, signs, BLOCK) - weight).square().sum()
    torch.testing.assert_close(here, there, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [PAPER_ALPHA, 1.224, 1.330, 2.0])
@pytest.mark.parametrize("make", [_normal, _student])
def test_theorem_2_holds_where_nothing_clips(make, alpha):
    rotated = fwht(make(256), BLOCK)
    values, step, clipped = _quantize(rotated, alpha)
    squared = (values - rotated).square()
    assert 0.5 < float((~clipped).float().mean()) < 1.0
    assert bool((squared <= step.square() / 4 * (1 + 1e-5))[~clipped].all())


def test_theorem_2_fails_as_printed_where_values_clip():
    rotated = fwht(_normal(512), BLOCK)
    values, step, clipped = _quantize(rotated, PAPER_ALPHA)
    squared = (values - rotated).square()
    bound = float(step.square().mean() / 4)
    assert bound == pytest.approx(0.159, abs=0.002)
    assert float(squared.mean()) == pytest.approx(0.263, abs=0.004)
    assert float(squared.mean()) > bound
    assert float(clipped.float().mean()) == pytest.approx(0.23, abs=0.005)


def test_the_printed_formula_for_alpha_does_not_give_the_printed_number():
    inner = torch.tensor(math.sqrt(2 / 3), dtype=torch.float64)
    alpha = math.sqrt(2) * float(torch.special.erfinv(inner))
    assert alpha == pytest.approx(1.330, abs=0.001)
    assert abs(alpha - PAPER_ALPHA) > 0.5


def test_the_best_step_is_the_lloyd_max_one_and_neither_of_the_papers():
    rotated = _normal(1024, 5)
    best = gaussian_levels(3)[2]
    errors = {
        alpha: float((_quantize(rotated, alpha)[0] - rotated).square().mean()) for alpha in (PAPER_ALPHA, best, 1.330)
    }
    assert errors[best] == pytest.approx(0.190, abs=0.002)
    assert errors[best] < errors[1.330] < errors[PAPER_ALPHA]


def test_the_zero_point_only_sees_the_first_weight_of_the_block():
    weight = _student(32)
    torch.testing.assert_close(fwht(weight, BLOCK).mean(1), weight[:, 0] / 16, rtol=0, atol=1e-5)


def test_the_zero_point_is_zero_for_nearly_all_blocks():
    zero = ternary_grid(fwht(_normal(1000, 6), BLOCK), 1.224)[1]
    assert not zero.any()


def test_a_block_of_256_takes_100_bytes():
    fmt = get_format("ternary")
    layout = fmt.layout(fmt.spec(1, BLOCK, 3))
    sizes = {name: torch.Size(shape).numel() * numpy_dtype(dtype).itemsize for name, (shape, dtype) in layout.items()}
    assert sizes == {"codes": 96, "scales": 2, "zeros": 2}
