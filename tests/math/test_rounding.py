"""Error feedback: the factor of the inverse Hessian, and what the driver gains with it for every format."""

import logging

import pytest
import torch

from fewbit.errors import FewbitError, NonFiniteWeights, UsageError
from fewbit.formats import get_format, group_format_names
from fewbit.math.hadamard import random_signs
from fewbit.math.rounding import (
    decoded_error,
    inverse_factor,
    quantize_matrix,
    quantize_rotated,
    round_in_chunks,
    round_integers,
    round_integers_reference,
)
from fewbit.ops.extension import load_native

CASES = [(name, bits) for name in group_format_names() for bits in get_format(name).bits]


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _hessian(cols: int) -> torch.Tensor:
    """The second moment of inputs whose energy lies mostly in a few directions, as in real layers."""
    spread = _random(1, cols, cols) * torch.logspace(0, -1.5, cols)[:, None]
    x = _random(2, 4 * cols, cols) @ spread
    return x.t() @ x / len(x)


def _proxy_loss(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((difference @ hessian) * difference).sum())


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = _hessian(64).double()
    factor = inverse_factor(hessian, damping=0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(64)
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor.t() @ factor).double() @ damped, torch.eye(64).double(), rtol=0, atol=1e-4)


def test_the_hessian_is_left_as_it_was():
    for hessian in (_hessian(64), _hessian(64).double()):
        hessian[3], hessian[:, 3] = 0, 0
        before = hessian.clone()
        inverse_factor(hessian)
        assert torch.equal(hessian, before)


def test_inputs_that_were_never_active_give_and_receive_no_feedback():
    hessian = _hessian(64)
    hessian[[5, 40], :] = 0
    hessian[:, [5, 40]] = 0
    factor = inverse_factor(hessian)
    assert bool(torch.isfinite(factor).all())
    off_diagonal = factor - torch.diag(factor.diagonal())
    assert not off_diagonal[[5, 40], :].any()
    assert not off_diagonal[:, [5, 40]].any()


def test_a_hessian_of_zeros_gives_no_feedback_at_all():
    factor = inverse_factor(torch.zeros(8, 8))
    assert torch.equal(factor, torch.diag(factor.diagonal()))


def test_more_damping_is_used_and_named_where_it_is_needed(caplog):
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 1.5  # one eigenvalue is -0.5
    with caplog.at_level(logging.WARNING):
        factor = inverse_factor(hessian, damping=0.01)
    assert "used 1" in caplog.text
    damped = hessian + torch.eye(16)
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(16), rtol=0, atol=1e-4)


def test_matrices_that_are_no_hessian_are_refused():
    with pytest.raises(FewbitError, match="NaN or infinity"):
        inverse_factor(torch.full((4, 4), torch.nan))
    hopeless = torch.eye(4)
    hopeless[0, 1] = hopeless[1, 0] = 100.0
    with pytest.raises(FewbitError, match="not positive definite"):
        inverse_factor(hopeless)
    with pytest.raises(UsageError, match="square"):
        inverse_factor(torch.zeros(4, 5))
    with pytest.raises(UsageError, match="damping"):
        inverse_factor(torch.eye(4), damping=0.0)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_feedback_within_a_group_satisfies_its_equation(width):
    factor = inverse_factor(_hessian(32))
    weight = _random(4, 7, 32)
    before = weight.clone()
    values, error = round_in_chunks(weight, factor, width, lambda start, columns: torch.round(columns * 2) / 2)
    assert torch.equal(weight, before)
    assert torch.equal(values * 2, torch.round(values * 2))
    torch.testing.assert_close(error @ factor, weight - values, rtol=0, atol=1e-5)


def test_one_row_is_not_changed_in_place():
    weight = _random(4, 1, 32)
    before = weight.clone()
    round_in_chunks(weight, inverse_factor(_hessian(32)), 1, lambda start, columns: torch.round(columns))
    assert torch.equal(weight, before)


@pytest.fixture(params=[] if load_native() is None else load_native().available_isas())
def isa(request):
    """Runs a test with each instruction set."""
    native = load_native()
    usual = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(usual)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rows", "group"), [(1, 32), (16, 96), (37, 128), (50, 256)])
@pytest.mark.parametrize("feedback", [False, True])
def test_native_rounding_gives_the_integers_of_the_reference(rows, group, feedback):
    factor = inverse_factor(_hessian(group)) if feedback else None
    weight = _random(8, rows, 2 * group)[:, :group]  # not contiguous, as a group of a matrix is
    step = weight.abs().amax(1, keepdim=True) / -8
    step[rows // 2] = 0.0
    codes, values, error = round_integers(weight, step, -8, 7, factor)
    expected, exact, lost = round_integers_reference(weight, step, -8, 7, factor)
    # Where sums end a hair from the half between two integers, either is right, and what follows is another path.
    assert float((codes == expected).float().mean()) > 0.98
    assert torch.equal(values, codes * step)
    if factor is None:
        assert error is lost is None
        assert torch.equal(codes, expected)
    else:
        torch.testing.assert_close(error @ factor, weight - values, rtol=0, atol=1e-4)
        hessian = _hessian(group)
        mine, theirs = _proxy_loss(weight - values, hessian), _proxy_loss(weight - exact, hessian)
        assert mine == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_feedback_lowers_the_proxy_loss_by_a_third_at_least(name, bits):
    fmt = get_format(name)
    spec = fmt.spec(32, 512, bits)
    weight, hessian = _random(5, 32, 512), _hessian(512)
    plain = quantize_rotated(fmt, weight, spec)
    fed_back = quantize_rotated(fmt, weight, spec, inverse_factor(hessian))
    assert fed_back.relative_error > plain.relative_error
    loss = _proxy_loss(weight - fed_back.values, hessian)
    assert loss < 0.67 * _proxy_loss(weight - plain.values, hessian)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_diagonal_hessian_gives_no_feedback(name, bits):
    fmt = get_format(name)
    spec = fmt.spec(16, 512, bits)
    weight = _random(6, 16, 512)
    factor = inverse_factor(torch.diag(torch.linspace(0.1, 3.0, 512)))
    plain, diagonal = quantize_rotated(fmt, weight, spec), quantize_rotated(fmt, weight, spec, factor)
    # The trellis refits its scales with the inputs' weights, after the codes are chosen.
    fitted = {"scales"} if name == "trellis" else set()
    assert all(torch.equal(part, diagonal.parts[key]) for key, part in plain.parts.items() if key not in fitted)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_same_inputs_give_the_same_bytes(name, bits):
    fmt = get_format(name)
    spec = fmt.spec(16, 512, bits)
    weight, factor = _random(7, 16, 512), inverse_factor(_hessian(512))
    before = weight.clone()
    first, second = quantize_rotated(fmt, weight, spec, factor), quantize_rotated(fmt, weight, spec, factor)
    assert torch.equal(weight, before)
    assert all(torch.equal(part, second.parts[key]) for key, part in first.parts.items())
    assert torch.equal(first.values, second.values)


def test_the_relative_error_is_that_of_the_values():
    fmt = get_format("lloyd8")
    weight = _random(8, 4, 512)
    done = quantize_rotated(fmt, weight, fmt.spec(4, 512, 3))
    expected = float((done.values - weight).square().sum() / weight.square().sum())
    assert done.relative_error == pytest.approx(expected, rel=1e-5)


def test_inputs_that_disagree_with_the_plan_are_refused():
    fmt = get_format("lloyd8")
    spec = fmt.spec(4, 512, 3)
    weight = _random(9, 4, 512)
    with pytest.raises(UsageError, match=r"\[4, 512\]"):
        quantize_rotated(fmt, weight[:3], spec)
    with pytest.raises(UsageError, match="factor"):
        quantize_rotated(fmt, weight, spec, torch.eye(256))
    weight[1, 7] = torch.inf
    with pytest.raises(NonFiniteWeights):
        quantize_rotated(fmt, weight, spec)


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("feedback", [False, True])
def test_a_matrix_taken_in_chunks_of_rows_gives_the_same_bytes(name, bits, feedback):
    fmt = get_format(name)
    spec = fmt.spec(90, 512, bits)
    weight = _random(10, 90, 512)
    weight[32:64] = 0
    weight[64:80] *= 30
    signs = random_signs(512, 3) if spec.block > 1 else None
    factor = inverse_factor(_hessian(512)) if feedback else None
    whole = quantize_matrix(fmt, weight, spec, signs, factor)
    chunked = quantize_matrix(fmt, weight, spec, signs, factor, chunk_weights=32 * 512)
    assert {key: part.shape for key, part in chunked.parts.items()} == {
        key: torch.Size(shape) for key, (shape, _) in fmt.layout(spec).items()
    }
    if name in ("trellis", "int8"):
        assert all(torch.equal(part, chunked.parts[key]) for key, part in whole.parts.items())
    found, expected = (fmt.dequantize(done.parts, spec) for done in (chunked, whole))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert chunked.relative_error == pytest.approx(whole.relative_error, rel=1e-3)
    lost, energy = decoded_error(fmt, chunked.parts, spec, weight, signs)
    assert lost / energy == pytest.approx(chunked.relative_error, rel=1e-3)


@pytest.mark.parametrize("size", [70, 256, 300, 600, 2400])
def test_the_blocked_factor_is_that_of_float64(size):
    hessian = _hessian(size)
    hessian[[3, size - 1], :] = 0
    hessian[:, [3, size - 1]] = 0
    before = hessian.clone()
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(hessian, before)
    exact = hessian.double()
    level = exact.diagonal()[exact.diagonal() > 0].mean()
    exact[3, 3] = exact[size - 1, size - 1] = level
    exact += 0.01 * level * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(exact), upper=True)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("place", [5, 290])
def test_the_damping_grows_wherever_a_block_fails(place, caplog):
    hessian = torch.eye(300)
    hessian[place, place + 1] = hessian[place + 1, place] = 1.5
    with caplog.at_level(logging.WARNING):
        factor = inverse_factor(hessian, 0.01)
    assert "used 1" in caplog.text
    torch.testing.assert_close(factor.t() @ factor @ (hessian + torch.eye(300)), torch.eye(300), rtol=0, atol=1e-4)
