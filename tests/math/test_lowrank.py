"""The branch beside a residual: its subspace, its axes and its share."""

import pytest
import torch

from fewbit.errors import UsageError
from fewbit.math.lowrank import balanced, fitted_up, leading_directions, spreading


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _moment(size: int, seed: int = 1) -> torch.Tensor:
    """A second moment whose eigenvalues span three decades."""
    basis = torch.linalg.qr(_random(size, size, seed=seed).double())[0]
    return ((basis * torch.logspace(0, -3, size, dtype=torch.float64)) @ basis.T).float()


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_the_svd_takes_what_no_other_branch_of_the_rank_takes_more_of(shape):
    weight = _random(*shape)
    found = leading_directions(weight, 8, None, "svd")
    assert torch.allclose(found @ found.T, torch.eye(8), atol=1e-5)
    left = weight - weight @ found.T @ found
    best = torch.linalg.svdvals(weight.double())[8:].square().sum()
    assert float(left.square().sum()) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 96), (96, 40)])
def test_the_whitened_branch_takes_most_of_the_outputs(shape):
    weight, moment = _random(*shape), _moment(shape[1])

    def lost(directions: torch.Tensor) -> float:
        gram = directions @ moment @ directions.T
        up = torch.linalg.solve(gram, directions @ moment @ weight.T).T
        left = weight - up @ directions
        return float(((left @ moment) * left).sum())

    whitened = lost(leading_directions(weight, 8, moment, "whitened"))
    values = torch.linalg.eigvalsh((weight @ moment @ weight.T).double()).clamp_min(0)
    assert whitened == pytest.approx(float(values[:-8].sum()), rel=1e-2)
    assert whitened < lost(leading_directions(weight, 8, None, "svd"))


def test_unknown_or_impossible_initialisations_are_refused():
    with pytest.raises(UsageError, match="'best' of a branch"):
        leading_directions(_random(8, 8), 2, None, "best")
    with pytest.raises(UsageError, match="needs calibration text"):
        leading_directions(_random(8, 8), 2, None, "whitened")


@pytest.mark.parametrize("size", [1, 64, 96, 192, 576])
def test_spreading_is_orthogonal_and_leaves_no_large_entry(size):
    matrix = spreading(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) < 2 / size**0.5


def test_balanced_axes_spread_h_evenly_and_lose_less_than_those_of_the_svd():
    weight, moment = _random(80, 128), _moment(128)
    directions = leading_directions(weight, 32, None, "svd")
    turned = balanced(directions, directions @ moment @ directions.T, float(moment.diagonal().mean()))

    def energy_and_noise(down: torch.Tensor) -> tuple[torch.Tensor, float]:
        energy = ((down @ moment) * down).sum(1)
        up = torch.linalg.lstsq(down.T, (weight @ directions.T @ directions).T).solution.T
        # One step for all entries: its square follows the mean energy.
        return energy, float(energy.mean() * up.square().sum())

    energy, noise = energy_and_noise(turned)
    assert energy.max() < 1.5 * energy.min()
    assert float(energy.mean()) == pytest.approx(float(moment.diagonal().mean()), rel=1e-3)
    assert noise < 0.9 * energy_and_noise(directions)[1]
    # The subspace is the same.
    both = torch.cat([turned / turned.norm(), directions / directions.norm()])
    assert torch.linalg.matrix_rank(both, rtol=1e-4) == 32


def test_the_branch_takes_all_that_is_free_and_nothing_that_costs_more_than_it_saves():
    weight = _random(80, 128)
    down = leading_directions(weight, 32, None, "svd")
    free = fitted_up(weight, down, torch.zeros(32), 0.01)
    assert torch.allclose(free, weight @ down.T, atol=1e-4)
    dear = fitted_up(weight, down, torch.full((32,), 1e3), 0.01)
    assert dear.abs().max() < 1e-3
    noise, price = 0.01 * torch.rand(32, generator=torch.Generator().manual_seed(3)), 0.01

    def cost(up: torch.Tensor) -> float:
        return float((up.square() * noise).sum() + price * (weight - up @ down).square().sum())

    best = fitted_up(weight, down, noise, price)
    assert cost(best) < min(cost(free), cost(torch.zeros_like(free)), cost(best * 1.01), cost(best * 0.99))
