"""A low-rank branch beside a residual: which subspace it takes, on which axes, and how much of the weight.

Notation for `W [N, K]` with inputs `x [K]` of second moment `H`: `W ~ R + V U`, `h = U x` with `U [r, K]` and
`V [N, r]`. Any invertible `G [r, r]` may stand between the two: `V U = (V G^-1) (G U)`.
"""

from __future__ import annotations

from fewbit.errors import UsageError
from fewbit.math.hadamard import hadamard_matrix
from fewbit.torch_later import torch

INITS = ("svd", "whitened")
SMALLEST_SHARE = 1e-6  # of the largest eigenvalue; below, a direction counts as that


def leading_directions(weight: torch.Tensor, rank: int, hessian: torch.Tensor | None, init: str) -> torch.Tensor:
    """The `rank` directions of the inputs that carry most, float32 `[rank, K]`.

    "svd" takes most of the weight's own energy, which leaves the smallest residual to round; "whitened" takes most of
    the output's energy (`hessian [K, K]` is then needed), as SVD-LLM and SVDQuant do. Rows are not orthogonal in the
    second case. Raises `UsageError` for an unknown init.
    """
    if init not in INITS:
        raise UsageError(f"unknown initialisation '{init}' of a branch: choose {' or '.join(INITS)}")
    matrix = weight.double()
    root = None
    if init == "whitened":
        if hessian is None:
            raise UsageError("a whitened branch needs calibration text")
        root = _root(hessian)
        matrix = matrix @ root
    # The smaller of the two Gram matrices has the same eigenvalues, and costs less.
    if matrix.shape[0] < matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
        found = left.T @ matrix
        found = found / found.norm(dim=1, keepdim=True).clamp_min(1e-30)
    else:
        found = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].flip(1).T
    if root is not None:
        found = torch.linalg.solve(root, found, left=False)
    return found.float()


def _root(hessian: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a second moment, float64, directions without energy raised a little."""
    values, vectors = torch.linalg.eigh(hessian.double())
    values = values.clamp_min(max(float(values[-1]) * SMALLEST_SHARE, 1e-30))
    return (vectors * values.sqrt()) @ vectors.T


def balanced(down: torch.Tensor, moment: torch.Tensor, level: float) -> torch.Tensor:
    """`G U` for `down = U [r, K]`, float32: the axes of h, of second moment `moment [r, r]`, on which rounding it costs
    least.

    Rounding noise has one size within a group of h, as large as the group's mean energy. With the second moment
    `P diag(l) P'` of h and V as it follows, the noise of the output is least for `G = O diag(l)^-1/4 P'`, where `O`,
    orthogonal, spreads the energy evenly (here a Walsh-Hadamard matrix). h gets the mean energy `level`, best that
    of the inputs.
    """
    rank = down.shape[0]
    moment = moment.double()
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(max(float(values[-1]) * SMALLEST_SHARE, 1e-30))
    turned = spreading(rank) @ (values**-0.25)[:, None].mul(vectors.T)
    energy = float((turned @ moment * turned).sum()) / rank
    return ((level / max(energy, 1e-30)) ** 0.5 * turned @ down.double()).float()


def spreading(size: int) -> torch.Tensor:
    """An orthogonal matrix whose entries all have about the same size, float64 `[size, size]`: a Walsh-Hadamard matrix
    of the largest power of two that divides the size, times a discrete cosine transform of the rest."""
    power = size & -size
    rest = size // power
    matrix = hadamard_matrix(power)
    if rest == 1:
        return matrix
    place = torch.arange(rest, dtype=torch.float64)
    cosine = torch.cos(torch.pi * (2 * place[None, :] + 1) * place[:, None] / (2 * rest)) * (2 / rest) ** 0.5
    cosine[0] /= 2**0.5
    return torch.kron(cosine, matrix)


def fitted_up(weight: torch.Tensor, down: torch.Tensor, noise: torch.Tensor, price: float) -> torch.Tensor:
    """V, float32 `[N, r]`, for a given U: least noise of the output in all.

    `noise [r]` is the mean squared rounding error of each entry of h, and `price` what a unit of the residual's
    squared norm costs. Where h is exact V takes all it can; where rounding h costs more than it saves, V vanishes.
    """
    u = down.double()
    gram = price * (u @ u.T)
    level = max(float(gram.diagonal().mean()), 1e-30)
    gram.diagonal().add_(noise.double() + 1e-9 * level)
    return torch.linalg.solve(gram, price * (u @ weight.double().T)).T.float()
