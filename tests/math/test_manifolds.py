"""Matrices that stay what they are while gradients move them."""

import pytest
import torch

from fewbit.math.manifolds import Invertible, Orthogonal, Positive


def _descend(module: torch.nn.Module, target: torch.Tensor, steps: int = 60, rate: float = 0.02) -> list[float]:
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    found = []
    for _ in range(steps):
        loss = (module() - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def _orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


@pytest.mark.parametrize("shape", [(24, 24), (3, 16, 16)])
def test_orthogonal_matrices_start_where_they_are_told_and_stay_orthogonal(shape):
    start = _orthogonal(*shape)
    module = Orthogonal(start)
    assert torch.allclose(module().detach(), start.float(), atol=1e-5)
    noise = 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    near = start @ torch.linalg.matrix_exp(noise - noise.mT)
    losses = _descend(module, near.float())
    assert losses[-1] < 0.01 * losses[0]
    assert module.deviation() < 1e-5


def test_large_steps_do_not_leave_the_manifold():
    module = Orthogonal(torch.eye(32))
    _descend(module, torch.randn(32, 32, generator=torch.Generator().manual_seed(2)), 20, rate=3.0)
    assert module.deviation() < 1e-5


def test_positive_matrices_are_symmetric_and_have_positive_eigenvalues():
    module = Positive(16)
    assert torch.equal(module().detach(), torch.eye(16))
    _descend(module, torch.diag(torch.linspace(0.2, 4, 16)))
    matrix = module().detach()
    assert torch.allclose(matrix, matrix.T, atol=1e-5)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    values = torch.linalg.eigvalsh(matrix)
    assert module.condition() == pytest.approx(float(values[-1] / values[0]), rel=1e-3)


def test_a_condition_number_beyond_the_bound_is_brought_back():
    module = Positive(8)
    with torch.no_grad():
        module.logarithm.copy_(torch.diag(torch.linspace(-9, 9, 8)))
    module.restrain(100.0)
    assert module.condition() == pytest.approx(100.0, rel=1e-4)
    before = module().detach()
    module.restrain(1000.0)
    assert torch.equal(module().detach(), before)


def test_invertible_matrices_reach_what_orthogonal_ones_cannot():
    module = Invertible(12)
    target = torch.eye(12) + 0.3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    losses = _descend(module, target, 300)
    assert losses[-1] < 1e-2 * losses[0]
    assert 1 < module.positive.condition() < 100
    assert module.orthogonal.deviation() < 1e-5
