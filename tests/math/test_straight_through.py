"""What rounding inputs is worth in learning: the kernel's values, and gradients that see the scales."""

from __future__ import annotations

import pytest
import torch

from fewbit.math.inputs import quantized_inputs
from fewbit.math.straight_through import reference, straight_through
from fewbit.ops.extension import load_native

GROUP = 64


def _inputs() -> torch.Tensor:
    x = torch.randn(5, 4 * GROUP, generator=torch.Generator().manual_seed(0))
    x[0, :GROUP] = 0.0
    x[1, :2] = torch.tensor([9.0, -9.0])  # of two extremes the negative one becomes -8
    return x


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_values_are_those_of_the_operator(bits):
    x = _inputs()
    found = straight_through(x, GROUP, bits)
    torch.testing.assert_close(found, quantized_inputs(x, None, 1, GROUP, bits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_of_scales_that_move_and_integers_that_do_not(bits):
    x = _inputs().double().requires_grad_()
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    (straight_through(x, GROUP, bits) * towards).sum().backward()
    # What is lost, in units of the scale, stands still, and the scale follows the value of largest magnitude.
    lost = (straight_through(x, GROUP, bits) - x).detach().view(-1, GROUP)
    groups = x.detach().view(-1, GROUP)
    expected = towards.clone().view(-1, GROUP)
    for row, (values, errors, weights) in enumerate(zip(groups, lost, towards.view(-1, GROUP), strict=True)):
        place = int(values.argmin() if -values.min() >= values.max() else values.argmax())
        if values[place] != 0.0:
            expected[row, place] += (errors * weights).sum() / values[place]
    torch.testing.assert_close(x.grad.view(-1, GROUP), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 96, 128])
def test_native_code_gives_the_values_and_gradients_of_the_reference(bits, group):
    native = load_native()
    if native is None:
        pytest.skip("no native code here")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, 4 * group, generator=generator)
    x[0, 0, :group], x[1, 0, :group] = 0.0, 1e-35
    towards = torch.randn(x.shape, generator=generator)
    usual = native.isa()
    try:
        for isa in native.available_isas():
            native.select_isa(isa)
            found = []
            for function in (straight_through, reference):
                # Not contiguous, as what heads leave.
                values = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
                rounded = function(values, group, bits)
                (rounded * towards).sum().backward()
                found.append((rounded.detach(), values.grad))
            torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    finally:
        native.select_isa(usual)


def test_what_is_no_number_does_not_get_lost():
    x = torch.randn(4, 2 * GROUP, generator=torch.Generator().manual_seed(4))
    x[0, 3], x[1, :GROUP], x[1, 5] = torch.nan, 0.0, torch.nan
    found = straight_through(x, GROUP, 8)
    assert bool(found[0, :GROUP].isnan().any())
    assert bool(found[1, :GROUP].isnan().any())
    assert bool(found[2:].isfinite().all())


def test_noise_of_a_group_weighs_on_its_largest_value():
    """A loss of nothing but squared noise falls where the largest value shrinks, which it could not see otherwise."""
    x = torch.randn(200, GROUP, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (straight_through(x, GROUP, 4) - x).square().sum().backward()
    place = x.detach().abs().argmax(1, keepdim=True)
    towards = x.grad.gather(1, place) * x.detach().gather(1, place)
    assert bool((towards > 0).all())
