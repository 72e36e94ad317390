"""The IQ3_S block of ggml on rotated weights: a 512-point grid for every 4 magnitudes, free signs, 4-bit sub-scales.

A control for the trellis code. The grid is read from the `gguf` package when it is first needed; the
encoder is this project's own and weighs all weights alike, which is what rotation asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.errors import FewbitError
from fewbit.formats.base import EncodedGroup, Layout, TensorSpec, register
from fewbit.formats.bits import pack_bits, unpack_bits
from fewbit.formats.rowwise import RowwiseFormat
from fewbit.math.rounding import round_in_chunks
from fewbit.torch_later import torch

SUB_BLOCK = 32
CHUNK = 4
TOP = 15.0
"""The largest magnitude on the grid."""

CELLS = 16
SEARCH_CANDIDATES, FINAL_CANDIDATES = 2, 8
TRIALS = tuple(TOP * (0.80 + 0.05 * step) for step in range(10))
"""Where the largest magnitude of a sub-block may come to lie, in grid units, while its scale is searched."""


@functools.cache
def grid() -> torch.Tensor:
    """The 512 points of IQ3_S, float32 `[512, 4]`, odd numbers from 1 to 15; from `gguf.quants.IQ3_S`."""
    try:
        from gguf.quants import IQ3_S
    except ImportError as error:
        raise FewbitError("the iq3_s code takes its decode table from the gguf package: pip install gguf") from error
    IQ3_S.init_grid()
    if IQ3_S.grid is None:
        raise FewbitError("this version of the gguf package has no IQ3_S grid: pip install --upgrade gguf")
    return torch.from_numpy(IQ3_S.grid.reshape(512, CHUNK).copy())


@functools.cache
def _candidates(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the 16^4 unit cells of the magnitudes, the `count` grid points nearest to its centre:
    their numbers int64 `[65536, count]` and coordinates float32 `[65536, count, 4]`.

    A search among 8 finds the nearest of all 512 for 99.99 % of Gaussian weights, at a hundredth of the work.
    """
    centres = torch.arange(CELLS) + 0.5
    points = grid()
    # Every score is a multiple of 1/4; a step of 1/2048 per number settles ties the same way everywhere.
    half_norms = points.square().sum(1) / 2 + torch.arange(len(points)) / 2048
    cells = torch.cartesian_prod(centres, centres, centres, centres)
    numbers = [
        (half_norms - part @ points.t()).topk(count, dim=1, largest=False, sorted=True).indices
        for part in cells.split(8192)
    ]
    found = torch.cat(numbers)
    return found, points[found]


def nearest_points(magnitudes: torch.Tensor, candidates: int = FINAL_CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid points nearest to magnitudes in grid units, float32 `[M, 4]`: numbers int64 `[M]`, points `[M, 4]`."""
    numbers, points = _candidates(candidates)
    cell = magnitudes.clamp(max=CELLS - 1).long()
    key = ((cell[:, 0] * CELLS + cell[:, 1]) * CELLS + cell[:, 2]) * CELLS + cell[:, 3]
    tried = points[key]
    best = (tried * (tried / 2 - magnitudes[:, None])).sum(-1).argmin(1, keepdim=True)
    chosen = tried.gather(1, best[:, :, None].expand(-1, 1, CHUNK)).squeeze(1)
    return numbers[key].gather(1, best).squeeze(1), chosen


@dataclass(frozen=True)
class _Scales:
    """The scales of one group: `d` fp16 `[rows]` and `fine` uint8 `[rows, group / 32]`, 0 to 15."""

    d: torch.Tensor
    fine: torch.Tensor

    def steps(self) -> torch.Tensor:
        """Weight per grid unit, (1 + 2 fine) d in the decoder's float32, `[rows, group / 32]`."""
        return self.d.float()[:, None] * (1 + 2 * self.fine).float()


def block_bytes(group: int) -> int:
    """Bytes of one block of `group` weights: 110 for 256, as in ggml."""
    return sum(_field_sizes(group))


def _field_sizes(group: int) -> tuple[int, int, int, int, int]:
    """Bytes of d, qs, qh, signs and scales; an odd last sub-block leaves the high nibble of its byte 0."""
    return 2, group // 4, group // 32, group // 8, (group // 32 + 1) // 2


def block_fields(blocks: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
    """The fields d, qs, qh, signs and scales of blocks uint8 `[..., bytes]`, views of them."""
    return blocks.split(_field_sizes(group), dim=-1)


def _inverse(steps: torch.Tensor) -> torch.Tensor:
    return torch.where(steps > 0, 1.0 / steps, torch.zeros_like(steps))


def _fit(sub_blocks: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x.g and g.g of magnitudes `[rows, subs, 32]` and their grid points at that scale, float64 `[rows, subs]`
    (so that the scales do not depend on the order in which a machine adds)."""
    scaled = sub_blocks * inverse[:, :, None]
    points = nearest_points(scaled.reshape(-1, CHUNK), SEARCH_CANDIDATES)[1].view_as(sub_blocks)
    return (sub_blocks * points).sum(-1, dtype=torch.float64), points.square().sum(-1, dtype=torch.float64)


def choose_scales(weight: torch.Tensor) -> _Scales:
    """Search the scales of one group, float32 `[rows, group]`, for the least squared error.

    First each sub-block alone: a few trial scales, each followed by the least-squares one for the points it
    chose. Then d, the 4-bit sub-scales around the nearest ones, and d again by least squares.
    """
    sub_blocks = weight.abs().reshape(weight.shape[0], -1, SUB_BLOCK)
    unit = _inverse(sub_blocks.amax(-1))
    gain = torch.full_like(unit, -1.0, dtype=torch.float64)
    free = torch.zeros_like(gain)
    for trial in TRIALS:
        cross, square = _fit(sub_blocks, unit * trial)
        better = cross.square() / square > gain
        gain = torch.where(better, cross.square() / square, gain)
        free = torch.where(better, cross / square, free)
    d = (free.amax(1) / 31.0).clamp(max=torch.finfo(torch.float16).max).half()
    near = torch.round((free * _inverse(d.float())[:, None] - 1.0) / 2.0)
    least = torch.full_like(free, torch.inf)
    fine = torch.zeros_like(free, dtype=torch.uint8)
    crosses, squares = torch.zeros_like(free), torch.zeros_like(free)
    for offset in (0.0, -1.0, 1.0):
        tried = (near + offset).clamp(0.0, 15.0).to(torch.uint8)
        steps = _Scales(d, tried).steps()
        cross, square = _fit(sub_blocks, _inverse(steps))
        loss = steps * (steps * square - 2.0 * cross)
        better = loss < least
        least = torch.where(better, loss, least)
        fine = torch.where(better, tried, fine)
        crosses, squares = torch.where(better, cross, crosses), torch.where(better, square, squares)
    factors = (1 + 2 * fine).double()
    refit = (factors * crosses).sum(1) / (factors.square() * squares).sum(1)
    return _Scales(refit.clamp(max=torch.finfo(torch.float16).max).half(), fine)


@register
class Iq3S(RowwiseFormat):
    """`blocks` uint8 `[N, K / G, bytes]`; for G = 256 exactly the 110-byte block of ggml's IQ3_S (3.4375 bits per
    weight): d fp16, qs 64, qh 8, signs 32, scales 4. Other multiples of 32 shorten the same fields."""

    name = "iq3_s"
    bits = (3,)

    def layout(self, spec: TensorSpec) -> Layout:
        return {"blocks": ((spec.rows, spec.groups, block_bytes(spec.group)), "U8")}

    def encode_group(
        self, weight: torch.Tensor, spec: TensorSpec, tensor_scale: float, factor: torch.Tensor | None
    ) -> EncodedGroup:
        rows, group = weight.shape
        scales = choose_scales(weight)
        steps = scales.steps().repeat_interleave(SUB_BLOCK, dim=1)
        inverse = _inverse(steps)
        numbers = torch.empty(rows, group // CHUNK, dtype=torch.int64)
        negative = torch.empty(rows, group, dtype=torch.uint8)

        def quantize(start: int, columns: torch.Tensor) -> torch.Tensor:
            stop = start + columns.shape[1]
            signs = torch.where(columns < 0, -1.0, 1.0)
            found, points = nearest_points((columns.abs() * inverse[:, start:stop]).reshape(-1, CHUNK))
            numbers[:, start // CHUNK : stop // CHUNK] = found.view(rows, -1)
            negative[:, start:stop] = (columns < 0).to(torch.uint8)
            return steps[:, start:stop] * points.view(rows, -1) * signs

        error = None
        if factor is None:
            values = quantize(0, weight)
        else:
            values, error = round_in_chunks(weight, factor, CHUNK, quantize)
        return EncodedGroup({"blocks": _pack_block(scales, numbers, negative)[:, None]}, values, error)

    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        blocks = parts["blocks"].reshape(-1, block_bytes(spec.group))
        d, low, high, signs, nibbles = block_fields(blocks, spec.group)
        fine = unpack_bits(nibbles, 4)[:, : spec.group // SUB_BLOCK]
        # A copy, as blocks of odd length leave the two bytes of d unaligned.
        half = d.clone(memory_format=torch.contiguous_format).view(torch.float16)
        steps = _Scales(half.squeeze(1), fine).steps()
        numbers = low.long() | unpack_bits(high, 1).long() << 8
        points = grid().to(blocks.device)[numbers].view(blocks.shape[0], -1)
        values = steps.repeat_interleave(SUB_BLOCK, dim=1) * points * (1.0 - 2.0 * unpack_bits(signs, 1).float())
        return values.view(-1, spec.cols)

    def rescale(
        self, parts: dict[str, torch.Tensor], spec: TensorSpec, gains: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        blocks = parts["blocks"].clone()
        d = blocks[:, :, :2].clone(memory_format=torch.contiguous_format).view(torch.float16).squeeze(2)
        scaled = (d.float() * gains["scales"].clamp(min=0)).clamp(max=torch.finfo(torch.float16).max).half()
        blocks[:, :, :2] = scaled[:, :, None].contiguous().view(torch.uint8)
        return {**parts, "blocks": blocks}


def _pack_block(scales: _Scales, numbers: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The fields of one block per row, uint8 `[rows, bytes]`."""
    odd = scales.fine.shape[1] % 2
    fields = (
        scales.d[:, None].contiguous().view(torch.uint8),
        (numbers & 255).to(torch.uint8),
        pack_bits(numbers >> 8, 1),
        pack_bits(negative, 1),
        pack_bits(torch.nn.functional.pad(scales.fine, (0, odd)), 4),
    )
    return torch.cat(fields, dim=1)
