"""Orthogonal and invertible matrices that gradients move: the manifolds of TwinQuant's learning.

torch's own parametrization keeps a matrix orthogonal by the Cayley transform of a skew-symmetric one; a positive
definite matrix is the exponential of a symmetric one.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrizations

MOST_CONDITION = 1e3  # of an invertible factor


class Orthogonal(nn.Module):
    """A batch of orthogonal matrices `[..., n, n]` on the Stiefel manifold; forward gives them, float32.

    They start at `start`, and the Cayley transform moves them from there: orthogonal up to rounding, whatever the
    steps are.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(start.float().clone())
        parametrizations.orthogonal(self, "matrix", orthogonal_map="cayley")

    def forward(self) -> torch.Tensor:
        return self.matrix

    def deviation(self) -> float:
        """The largest entry of `|Q'Q - I|`."""
        with torch.no_grad():
            matrix = self.matrix.double()
            gram = matrix.mT @ matrix
            return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().max())


class Positive(nn.Module):
    """A symmetric positive definite matrix `[n, n]`, the identity at first; forward gives it, float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(size, size))

    def _symmetric(self) -> torch.Tensor:
        return (self.logarithm + self.logarithm.T) / 2

    def forward(self) -> torch.Tensor:
        return torch.matrix_exp(self._symmetric())

    @torch.no_grad()
    def condition(self) -> float:
        values = torch.linalg.eigvalsh(self._symmetric().double())
        return math.exp(float(values[-1] - values[0]))

    @torch.no_grad()
    def restrain(self, most: float = MOST_CONDITION) -> None:
        """Bring the condition number back to `most` where it is beyond, by shrinking the logarithm."""
        values = torch.linalg.eigvalsh(self._symmetric().double())
        spread = float(values[-1] - values[0])
        if spread > math.log(most):
            self.logarithm.mul_(math.log(most) / spread)


class Invertible(nn.Module):
    """`G = P S` on the general linear group: orthogonal times symmetric positive definite (the polar form), both
    the identity at first. Its condition number is that of S."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.orthogonal = Orthogonal(torch.eye(size))
        self.positive = Positive(size)

    def forward(self) -> torch.Tensor:
        return self.orthogonal() @ self.positive()
