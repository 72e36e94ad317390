"""How packed matrices stand in the memory of a graphics processor: built at load from the stored parts, in torch.

"tiles": trellis codes as stored; tables int8 `[128]`, the sums A + B of a window's first six bits and C + D of its
others. "nibbles": as stored. For both the scales, fp16 `[N, K / G]`, lie group by group, so that neighbouring programs'
rows are neighbours in memory.
"ternary": codes uint8 `[K / 16, 4 P]`, P being N rounded up to 16: a little-endian word per row holds 16 columns in
fields of two bits that are q + 1; tables are the zero points, fp16 `[N, K / G]`.
"iq3_s": codes uint8 `[K / 32, 14 P]`: per 32 columns two words of every row with the low bytes of eight grid numbers,
one with the signs, and half a word with the numbers' ninth bits and, in its upper byte, the sub-scale; tables are the
grid, int8 `[2048]`, scales the blocks' d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewbit.formats.base import TensorSpec
from fewbit.formats.bits import unpack_bits
from fewbit.formats.iq3_s import SUB_BLOCK, block_fields, grid
from fewbit.formats.twinquant import DOWN, both_spec, down_spec

ROWS = 16


@dataclass(frozen=True)
class GpuMatrix:
    """A packed matrix as operators take it: `code` names the layout of `codes`."""

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    tables: torch.Tensor | None
    code: str


def tile_tables(tables: torch.Tensor) -> torch.Tensor:
    """The trellis' tables int8 `[40]` as two of 64 sums each, int8 `[128]`."""
    index = torch.arange(64, device=tables.device)
    first = tables[index & 15] + tables[16 + (index >> 4)]
    second = tables[20 + (index & 3)] + tables[24 + (index >> 2)]
    return torch.cat([first, second])


def tile_values(tables: torch.Tensor) -> torch.Tensor:
    """The value of every window, int32 `[4096]`, from `tables` int8 `[128]`; sums wrap as bytes do."""
    window = torch.arange(4096, device=tables.device)
    return (tables[window & 63] + tables[64 + (window >> 6)]).int()


def group_major(scales: torch.Tensor) -> torch.Tensor:
    """The same scales `[N, K / G]`, those of one group next to each other in memory."""
    return scales.t().contiguous().t()


def ternary_codes(codes: torch.Tensor) -> torch.Tensor:
    """Stored codes uint8 `[N, 3 K / 8]` in the layout of "ternary"."""
    fields = torch.nn.functional.pad(unpack_bits(codes, 3), (0, 0, 0, -codes.shape[0] % ROWS), value=1)
    quads = fields.view(fields.shape[0], -1, 4, 4)
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6  # [P, K / 16, 4]
    return packed.transpose(0, 1).reshape(packed.shape[1], -1)


def ternary_integers(codes: torch.Tensor, zeros: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """q - z of a matrix in the layout of "ternary", int32 `[N, K / G, G]`."""
    fields = unpack_bits(codes.view(codes.shape[0], -1, 4), 2)  # [K / 16, P, 16]
    q = fields.permute(1, 0, 2).reshape(fields.shape[1], groups, -1)[:rows].int() - 1
    return q - zeros.int()[:, :, None]


def iq3_s_codes(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """Stored blocks uint8 `[N, K / G, bytes]` in the layout of "iq3_s"."""
    _, low, high, signs, nibbles = block_fields(blocks, group)  # [N, K / G, bytes of a field]
    fine = unpack_bits(nibbles, 4)[..., : group // SUB_BLOCK]
    planes = (
        low.reshape(blocks.shape[0], -1, 8)[..., :4],
        low.reshape(blocks.shape[0], -1, 8)[..., 4:],
        signs.reshape(blocks.shape[0], -1, 4),
        torch.stack([high, fine], -1).reshape(blocks.shape[0], -1, 2),
    )
    padded = [torch.nn.functional.pad(plane, (0, 0, 0, 0, 0, -blocks.shape[0] % ROWS)) for plane in planes]
    return torch.cat([plane.transpose(0, 1).reshape(plane.shape[1], -1) for plane in padded], 1)


def iq3_s_integers(codes: torch.Tensor, points: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Grid points times sub-scales `1 + 2 s` and signs of a matrix in the layout of "iq3_s", int32 `[N, K / G, G]`."""
    padded = codes.shape[1] // 14
    first, second, signs, halves = (
        part.view(codes.shape[0], padded, -1) for part in codes.split([4 * padded] * 3 + [2 * padded], 1)
    )
    number = torch.cat([first, second], 2).int() | unpack_bits(halves[..., :1], 1).int() << 8  # [K / 32, P, 8]
    found = points.view(-1, 4)[number].view(codes.shape[0], padded, SUB_BLOCK).int()
    found = found * (1 - 2 * unpack_bits(signs, 1).int()) * (1 + 2 * halves[..., 1:].int())
    return found.transpose(0, 1).reshape(padded, groups, -1)[:rows]


CODES_OF: dict[str, Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]] = {
    "ternary": ternary_integers,
    "iq3_s": iq3_s_integers,
}


def gpu_matrix(parts: dict[str, torch.Tensor], spec: TensorSpec) -> GpuMatrix:
    """The stored parts of a trellis, int4, ternary or iq3_s matrix as a graphics processor's kernels take them, on the
    parts' device."""
    if spec.format in ("trellis", "int4"):
        trellis = spec.format == "trellis"
        tables = tile_tables(parts["tables"]) if trellis else None
        return GpuMatrix(
            parts["codes"], group_major(parts["scales"]), parts["scale"], tables, "tiles" if trellis else "nibbles"
        )
    if spec.format == "ternary":
        codes = ternary_codes(parts["codes"])
        one = torch.ones(1, device=codes.device)
        return GpuMatrix(codes, group_major(parts["scales"]), one, parts["zeros"].contiguous(), "ternary")
    if spec.format != "iq3_s":
        raise ValueError(f"no kernel layout for format {spec.format}: trellis, int4, ternary and iq3_s have one")
    blocks = parts["blocks"]
    d = block_fields(blocks, spec.group)[0].contiguous().view(torch.float16).squeeze(2)
    points = grid().to(torch.int8).reshape(-1).to(blocks.device)
    one = torch.ones(1, device=blocks.device)
    return GpuMatrix(iq3_s_codes(blocks, spec.group), group_major(d), one, points, "iq3_s")


def gpu_matrices(parts: dict[str, torch.Tensor], spec: TensorSpec) -> tuple[GpuMatrix, ...]:
    """The matrix of any format that has a kernel layout; for twinquant `[R, V]`, and U where there is a branch."""
    if spec.format != "twinquant":
        return (gpu_matrix(parts, spec),)
    both = gpu_matrix(parts, both_spec(spec))
    if not spec.rank:
        return (both,)
    named = {name.removeprefix(DOWN): part for name, part in parts.items() if name.startswith(DOWN)}
    return both, gpu_matrix(named, down_spec(spec))
