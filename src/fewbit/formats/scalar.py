"""Three-bit codes that round every weight by itself: `ternary`, the paper's own, and `lloyd8`, the best such code.

Both are controls for the trellis code: they show what the rotation buys without a better code. Fields
are packed least significant bit first; see docs/itq3_s.md.
"""

from __future__ import annotations

import functools
import itertools
import math

from fewbit.formats.base import EncodedGroup, Layout, TensorSpec, register
from fewbit.formats.bits import pack_bits, unpack_bits
from fewbit.formats.rowwise import RowwiseFormat
from fewbit.math.rounding import round_in_chunks
from fewbit.torch_later import torch

FIELD_BITS = 3
PAPER_ALPHA = 0.798
"""The grid width over sigma that arXiv 2603.27914 prints; its own formula gives 1.330, the best is 1.224."""

MAX_ZERO = 2048.0
"""Up to here every integer is exact in fp16."""

_FP16_MAX = 65504.0


@functools.cache
def gaussian_levels(count: int) -> tuple[float, ...]:
    """The `count` levels of least mean squared error for N(0, 1), ascending and symmetric.

    Lloyd's iteration with exact cell means, (phi(a) - phi(b)) / (Phi(b) - Phi(a)), until no level moves by
    more than 1e-12 (Lloyd 1982, Max 1960). Three levels give the best ternary grid, +-1.224.
    """

    def density(x: float) -> float:
        return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    levels = [4.0 * (i + 0.5) / count - 2.0 for i in range(count)]
    moved = 1.0
    while moved > 1e-12:
        edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        means = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in itertools.pairwise(edges)]
        # The exact levels are symmetric; averaging with the mirror image keeps rounding from breaking that.
        means = [(means[i] - means[-1 - i]) / 2 for i in range(count)]
        moved = max(abs(a - b) for a, b in zip(levels, means, strict=True))
        levels = means
    return tuple(levels)


def ternary_grid(weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's `d` = alpha sigma and `z` = -round(mean / d) of each row, fp16 `[rows]`.

    `weight` is float32 `[rows, group]`. d is at least |mean| / 2048, so that z stays exact in fp16 and a row
    of equal values, where the paper divides by zero, decodes to itself.
    """
    # Sums in float64, so that the stored fp16 numbers do not depend on the order a machine adds in.
    mean = weight.mean(1, dtype=torch.float64)
    sigma = (weight.double() - mean[:, None]).square().mean(1).sqrt()
    step = _to_half(torch.maximum(alpha * sigma, mean.abs() / MAX_ZERO))
    zero = -torch.round(mean * _reciprocal(step).double()).clamp(-MAX_ZERO, MAX_ZERO)
    return step, zero.half()


def ternary_codes(weight: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The paper's q = clamp(round(w / d) + z, -1, 1), float32 like `weight` `[rows, columns]`."""
    scaled = weight * _reciprocal(step)[:, None]
    return (torch.round(scaled) + zero.float()[:, None]).clamp(-1.0, 1.0)


def ternary_values(codes: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The paper's decoder, d (q - z): float32 `[rows, columns]`."""
    return step.float()[:, None] * (codes - zero.float()[:, None])


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, and 0 where the scale is 0: such a row decodes to zeros whatever its codes are."""
    scale = scale.float()
    return torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))


def _to_half(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(max=_FP16_MAX).half()


@register
class Ternary(RowwiseFormat):
    """ITQ3_S as its Definition 1 says: {-1, 0, 1} in 3-bit fields (stored as q + 1, so 0, 1 or 2) with an fp16
    step and an fp16 zero point per row and group; 3.125 bits per weight in groups of 256."""

    name = "ternary"
    bits = (3,)

    def layout(self, spec: TensorSpec) -> Layout:
        return {
            "codes": ((spec.rows, spec.cols * FIELD_BITS // 8), "U8"),
            "scales": ((spec.rows, spec.groups), "F16"),
            "zeros": ((spec.rows, spec.groups), "F16"),
        }

    def encode_group(
        self, weight: torch.Tensor, spec: TensorSpec, tensor_scale: float, factor: torch.Tensor | None
    ) -> EncodedGroup:
        step, zero = ternary_grid(weight, gaussian_levels(3)[2])
        codes = torch.empty_like(weight)

        def quantize(start: int, columns: torch.Tensor) -> torch.Tensor:
            chosen = ternary_codes(columns, step, zero)
            codes[:, start : start + columns.shape[1]] = chosen
            return ternary_values(chosen, step, zero)

        error = None
        if factor is None:
            values = quantize(0, weight)
        else:
            values, error = round_in_chunks(weight, factor, 1, quantize)
        packed = pack_bits((codes + 1.0).to(torch.uint8), FIELD_BITS)
        return EncodedGroup({"codes": packed, "scales": step[:, None], "zeros": zero[:, None]}, values, error)

    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        codes = unpack_bits(parts["codes"], FIELD_BITS).float() - 1.0
        grouped = codes.view(-1, spec.group)
        return ternary_values(grouped, parts["scales"].reshape(-1), parts["zeros"].reshape(-1)).view(-1, spec.cols)


@register
class Lloyd8(RowwiseFormat):
    """Eight Lloyd-Max levels of the Gaussian times one fp16 scale (the root mean square) per row and group;
    fields count the levels from the lowest. 3.0625 bits per weight in groups of 256."""

    name = "lloyd8"
    bits = (3,)

    def layout(self, spec: TensorSpec) -> Layout:
        return {
            "codes": ((spec.rows, spec.cols * FIELD_BITS // 8), "U8"),
            "scales": ((spec.rows, spec.groups), "F16"),
        }

    def encode_group(
        self, weight: torch.Tensor, spec: TensorSpec, tensor_scale: float, factor: torch.Tensor | None
    ) -> EncodedGroup:
        scale = _to_half(weight.double().square().mean(1).sqrt())
        inverse = _reciprocal(scale)[:, None]
        levels = torch.tensor(gaussian_levels(8), dtype=torch.float32)
        edges = (levels[1:] + levels[:-1]) / 2
        codes = torch.empty_like(weight, dtype=torch.uint8)

        def quantize(start: int, columns: torch.Tensor) -> torch.Tensor:
            chosen = torch.bucketize((columns * inverse).contiguous(), edges, out_int32=True)
            codes[:, start : start + columns.shape[1]] = chosen.to(torch.uint8)
            return levels[chosen] * scale.float()[:, None]

        error = None
        if factor is None:
            values = quantize(0, weight)
        else:
            values, error = round_in_chunks(weight, factor, 1, quantize)
        return EncodedGroup({"codes": pack_bits(codes, FIELD_BITS), "scales": scale[:, None]}, values, error)

    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        levels = torch.tensor(gaussian_levels(8), dtype=torch.float32, device=parts["codes"].device)
        codes = unpack_bits(parts["codes"], FIELD_BITS).int()
        values = levels[codes].view(-1, spec.groups, spec.group) * parts["scales"].float()[:, :, None]
        return values.view(-1, spec.cols)
