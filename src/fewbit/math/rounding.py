"""Rounding with error feedback (LDLQ, the same recursion as GPTQ): what one column loses, later columns repay.

Holds the factor of the inverse Hessian, the recursion inside a group of columns, and the driver that
runs any format over a whole matrix; how a column is rounded is the format's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from fewbit.errors import FewbitError, NonFiniteWeights, UsageError
from fewbit.math.hadamard import rotate
from fewbit.ops.extension import load_native
from fewbit.torch_later import torch

if TYPE_CHECKING:
    from fewbit.formats.base import Format, GroupFormat, TensorSpec

MAX_DAMPING = 10.0
CHUNK_WEIGHTS = 1 << 23  # weights of a matrix that are rounded at once; bounds the memory of large tables
ROW_MULTIPLE = 16  # formats may store rows in groups of this many
PANEL, WIDE_PANEL = 256, 2048  # columns that the factorization takes at once, and that one update reaches

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: the stored `parts`, the float32 `values [rows, cols]` they decode to (still
    rotated where the format rotates), and `relative_error` = |values - W|^2 / |W|^2."""

    parts: dict[str, torch.Tensor]
    values: torch.Tensor
    relative_error: float


def inverse_factor(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The upper triangular `U` with `U' U = (H + damping * mean(diag H) * I)^-1`, float32 `[K, K]`.

    `hessian` is the second moment of the (rotated) inputs, symmetric `[K, K]`, any floating type. Works in
    float32 with float64 diagonal blocks, inside one copy of the Hessian, because the largest Hessian is also the
    largest matrix of a run. Inputs that were never active (zero diagonal) are detached from the others, so
    that they neither cause nor receive feedback. Where the damped matrix is not positive definite the
    damping grows tenfold, up to `MAX_DAMPING`, with a warning that says which value was used. Raises
    `FewbitError` for a matrix with NaN or infinity, or one that no damping makes positive definite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise UsageError(f"a Hessian is a square matrix, not {tuple(hessian.shape)}")
    if damping <= 0:
        raise UsageError(f"the damping must be positive, not {damping}; the usual value is 0.01")
    if not bool(torch.isfinite(hessian.sum())):
        raise FewbitError(
            "the Hessian holds NaN or infinity: an activation overflowed during calibration; "
            "calibrate in float32 or bfloat16, or with other texts"
        )
    first = damping
    while True:
        # Reversed in both axes, the lower factor of H becomes an upper one, M M' = H, and U = M^-1: one
        # factorization and one triangular inverse, and H is never inverted.
        lower = hessian.flip(0, 1).float()
        if _factorize(lower, damping):
            if damping != first:
                _log.warning("Hessian not positive definite at damping %g; used %g", first, damping)
            return _reverse(_invert_lower(lower))
        if damping >= MAX_DAMPING:
            raise FewbitError(
                f"the Hessian [{hessian.shape[0]}, {hessian.shape[0]}] is not positive definite even with damping "
                f"{damping:g}: it is not a second moment; delete its statistics and calibrate again"
            )
        damping = min(damping * 10.0, MAX_DAMPING)


def _factorize(matrix: torch.Tensor, damping: float) -> bool:
    """Cholesky in place: the lower factor of the damped `matrix`, zeros above it; False where there is none."""
    size = matrix.shape[0]
    diagonal = matrix.diagonal()
    dead = diagonal <= 0
    level = float(diagonal[~dead].double().mean()) if not bool(dead.all()) else 1.0
    matrix[dead, :] = 0.0
    matrix[:, dead] = 0.0
    diagonal[dead] = level
    diagonal.add_(damping * level)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        block, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop].double())
        if int(info) != 0 or not bool(torch.isfinite(block).all()):
            return False
        matrix[start:stop, start:stop] = block.float()
        matrix[start:stop, stop:] = 0.0
        if stop == size:
            break
        inverse = torch.linalg.solve_triangular(block, torch.eye(stop - start, dtype=block.dtype), upper=False)
        below = matrix[stop:, start:stop]
        below.copy_(below @ inverse.T.float())
        for left in range(stop, size, WIDE_PANEL):
            right = min(left + WIDE_PANEL, size)
            matrix[left:, left:right].addmm_(below[left - stop :], below[left - stop : right - stop].T, alpha=-1.0)
    return True


def _reverse(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix reversed in both axes, in its place: its elements in the opposite order."""
    flat = matrix.view(-1)
    half = flat.numel() // 2
    for start in range(0, half, CHUNK_WEIGHTS):
        stop = min(start + CHUNK_WEIGHTS, half)
        left, right = flat[start:stop], flat[flat.numel() - stop : flat.numel() - start]
        kept = left.clone()
        left.copy_(right.flip(0))
        right.copy_(kept.flip(0))
    return matrix


def _invert_lower(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix, in its place."""
    for start in range(0, matrix.shape[0], PANEL):
        stop = min(start + PANEL, matrix.shape[0])
        block = matrix[start:stop, start:stop].double()
        inverse = torch.linalg.solve_triangular(block, torch.eye(stop - start, dtype=block.dtype), upper=False).float()
        rows = matrix[start:stop, :start].clone()
        for left in range(0, start, WIDE_PANEL):
            right = min(left + WIDE_PANEL, start)
            product = rows[:, left:] @ matrix[left:start, left:right]
            matrix[start:stop, left:right] = -inverse @ product
        matrix[start:stop, start:stop] = inverse
    return matrix


def round_in_chunks(
    weight: torch.Tensor,
    factor: torch.Tensor,
    width: int,
    quantize: Callable[[int, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Error feedback inside one group of columns, `width` columns at a time.

    `weight` is float32 `[rows, group]`, `factor` the upper triangular `U [group, group]`. `quantize(start,
    chunk)` gets the columns from `start` on as they stand after feedback, `[rows, width]`, and returns the
    values they are rounded to. Returns `values` and the feedback `E` with `E U = weight - values`, both
    `[rows, group]`.
    """
    # Transposed, so that a chunk of columns and everything still to come are contiguous.
    remaining = weight.t().contiguous()
    if remaining.data_ptr() == weight.data_ptr():
        remaining = remaining.clone()
    values = torch.empty_like(remaining)
    error = torch.empty_like(remaining)
    for start in range(0, remaining.shape[0], width):
        stop = start + width
        rounded = quantize(start, remaining[start:stop].t()).t()
        values[start:stop] = rounded
        loss = remaining[start:stop] - rounded
        error[start:stop] = torch.linalg.solve_triangular(factor[start:stop, start:stop].t(), loss, upper=False)
        remaining[stop:].addmm_(factor[start:stop, stop:].t(), error[start:stop], alpha=-1.0)
    return values.t().contiguous(), error.t().contiguous()


def round_integers(
    weight: torch.Tensor, step: torch.Tensor, least: int, most: int, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round one group of columns to integers times a step per row, column by column where there is a factor.

    `weight` is float32 `[rows, group]`, `step` float32 `[rows, 1]` (0: all integers are 0). Returns the integers, int8
    in `least`..`most`, the values `integers * step`, and the feedback of `round_in_chunks` (None without a factor).
    """
    native = load_native()
    if native is None:
        return round_integers_reference(weight, step, least, most, factor)
    codes, values = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape)
    error = None if factor is None else torch.empty(weight.shape)
    inside = None if factor is None else factor.contiguous()
    native.round_columns(weight.contiguous(), step.view(-1), least, most, inside, codes, values, error)
    return codes, values, error


def round_integers_reference(
    weight: torch.Tensor, step: torch.Tensor, least: int, most: int, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same in operations of torch."""
    inverse = torch.where(step != 0, 1.0 / step, torch.zeros_like(step))
    codes = torch.empty_like(weight, dtype=torch.int8)

    def quantize(start: int, columns: torch.Tensor) -> torch.Tensor:
        chosen = torch.round(columns * inverse).clamp(least, most)
        codes[:, start : start + columns.shape[1]] = chosen.to(torch.int8)
        return chosen * step

    if factor is None:
        return codes, quantize(0, weight), None
    values, error = round_in_chunks(weight, factor, 1, quantize)
    return codes, values, error


def quantize_rotated(
    fmt: GroupFormat,
    weight: torch.Tensor,
    spec: TensorSpec,
    factor: torch.Tensor | None = None,
    tensor_scale: float | None = None,
) -> Quantized:
    """Quantize a matrix that is already rotated where the format asks for it.

    `weight` is `[rows, cols]` of any floating type, `factor` the `U [cols, cols]` of `inverse_factor` in the
    same basis as the weight, or None for plain rounding; `tensor_scale` is given where the matrix is part of a
    larger one. Goes over the groups of columns in order; with a
    factor, every group's error is subtracted from the columns still to come (LDLQ, arXiv 2307.13304;
    GPTQ, arXiv 2210.17323). Raises `NonFiniteWeights` for NaN or infinity, `UsageError` where shapes disagree.
    """
    if tuple(weight.shape) != (spec.rows, spec.cols):
        raise UsageError(f"the plan says [{spec.rows}, {spec.cols}], the weight is {list(weight.shape)}")
    if factor is not None and tuple(factor.shape) != (spec.cols, spec.cols):
        raise UsageError(f"the factor must be [{spec.cols}, {spec.cols}], it is {list(factor.shape)}")
    original = weight.float()
    if not bool(torch.isfinite(original).all()):
        raise NonFiniteWeights("the weight holds NaN or infinity; mend the source checkpoint, or leave the tensor out")
    current = original if factor is None else original.clone()
    if tensor_scale is None:
        tensor_scale = fmt.tensor_scale(original, spec)
    groups = []
    lost = 0.0
    for start in range(0, spec.cols, spec.group):
        stop = start + spec.group
        inside = None if factor is None else factor[start:stop, start:stop]
        encoded = fmt.encode_group(current[:, start:stop], spec, tensor_scale, inside)
        if factor is not None and stop < spec.cols:
            if encoded.error is None:
                raise FewbitError(f"format {spec.format} returned no feedback although it was given a factor")
            current[:, stop:].addmm_(encoded.error, factor[start:stop, stop:], alpha=-1.0)
        lost += energy(encoded.values - original[:, start:stop])
        groups.append(encoded)
    total = energy(original)
    values = torch.cat([encoded.values for encoded in groups], dim=1)
    parts = fmt.assemble(groups, spec, tensor_scale)
    return Quantized(parts, values, lost / total if total > 0.0 else 0.0)


def energy(matrix: torch.Tensor) -> float:
    """|W|^2 of `W [N, K]`, the same for any number of threads: those share rows, and a row's sum is one thread's."""
    return math.fsum(matrix.double().square().sum(1).tolist())


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch runs on one thread, so that sums come out the same on any number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Rows(Protocol):
    """A matrix that gives its rows in slices: a tensor, or one that is still in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> torch.Tensor: ...


def quantize_matrix(
    fmt: GroupFormat,
    weight: Rows,
    spec: TensorSpec,
    signs: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    chunk_weights: int = CHUNK_WEIGHTS,
) -> Quantized:
    """Rotate and quantize a matrix, some rows at a time, so that a large table is never held whole.

    `weight` gives rows of `[rows, cols]`, `signs` is float32 `[cols]` (None: not rotated), `factor` as for
    `quantize_rotated`; the result does not depend on `chunk_weights`. Its values are empty: the parts decode.
    Raises `NonFiniteWeights` for NaN or infinity.
    """
    rows = _chunk_rows(spec, chunk_weights)

    def pieces() -> Iterator[tuple[torch.Tensor, TensorSpec]]:
        for start in range(0, spec.rows, rows):
            piece = weight[start : min(start + rows, spec.rows)].float()
            rotated = piece if signs is None else rotate(piece, signs, spec.block)
            yield rotated, replace(spec, rows=piece.shape[0])

    shared = None
    if rows < spec.rows:
        # Rows of zeros, such as unused tokens, have no scale of their own to compare.
        shared = max((fmt.tensor_scale(piece, part) for piece, part in pieces() if bool(piece.any())), default=1.0)
    found: list[dict[str, torch.Tensor]] = []
    lost = total = 0.0
    for piece, part in pieces():
        quantized = quantize_rotated(fmt, piece, part, factor, shared)
        found.append(quantized.parts)
        own = energy(piece)
        total += own
        lost += own * quantized.relative_error
    parts = {name: _join_rows([piece[name] for piece in found], shape) for name, (shape, _) in fmt.layout(spec).items()}
    return Quantized(parts, torch.empty(0), lost / total if total > 0.0 else 0.0)


def _chunk_rows(spec: TensorSpec, chunk_weights: int) -> int:
    return max(ROW_MULTIPLE, chunk_weights // spec.cols // ROW_MULTIPLE * ROW_MULTIPLE)


def decoded_error(
    fmt: Format, parts: dict[str, torch.Tensor], spec: TensorSpec, weight: Rows | None, signs: torch.Tensor | None
) -> tuple[float, float]:
    """|W - W^|^2 and |W|^2 of stored parts against `weight [rows, cols]`, decoded some rows at a time.

    Without `weight` it is taken to be zero, which still tells whether everything decodes to finite numbers.
    """
    rows = _chunk_rows(spec, CHUNK_WEIGHTS)
    lost = total = 0.0
    for start in range(0, spec.rows, rows):
        stop = min(start + rows, spec.rows)
        difference = fmt.dequantize(*fmt.slice_rows(parts, spec, start, stop))
        if weight is not None:
            piece = weight[start:stop].float()
            total += energy(piece)
            difference = difference - (piece if signs is None else rotate(piece, signs, spec.block))
        lost += energy(difference)
    return lost, total


def _join_rows(pieces: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Parts that grow with the rows one under the other; parts of the whole matrix once."""
    return pieces[0] if tuple(pieces[0].shape) == tuple(shape) else torch.cat(pieces)
