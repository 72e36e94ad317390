"""Where the bytes of a packed matrix stand in memory: as stored, or rearranged for the machine that multiplies with it.

"lanes" suits processors whose byte shuffles stay within 16 bytes (AVX2 without AVX-512). It holds the bytes of the
trellis stream, no bit of them changed: two row groups at a time, for every 64 columns their 2 x 16 chunks (64 weights,
8 k bytes each) side by side, first byte 0 of all 32 chunks, then byte 1 of all, and so on. An odd last row group is
paired with zeros. It needs scale groups that are a multiple of 64 columns.
"""

from __future__ import annotations

import torch

from fewbit.ops.extension import load_native

LANE_COLS = 64
CHUNKS = 16  # of a row group in 64 columns


def to_lanes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Trellis codes uint8 `[ceil(N / 16), 2 k K]` to lanes, uint8 `[ceil(N / 32), 4 k K]`."""
    row_groups, size = codes.shape
    padded = torch.nn.functional.pad(codes, (0, 0, 0, row_groups % 2))
    units = padded.view(-1, 2, size // (CHUNKS * 8 * bits), CHUNKS, 8 * bits)
    return units.permute(0, 2, 4, 1, 3).reshape(-1, 2 * size)


def from_lanes(lanes: torch.Tensor, row_groups: int, bits: int) -> torch.Tensor:
    """The inverse of `to_lanes`: lanes to the codes of `row_groups` row groups."""
    size = lanes.shape[1] // 2
    units = lanes.view(lanes.shape[0], size // (CHUNKS * 8 * bits), 8 * bits, 2, CHUNKS)
    return units.permute(0, 3, 1, 4, 2).reshape(-1, size)[:row_groups]


def has_lanes() -> bool:
    """Whether the instruction set in use multiplies lanes faster than the stored layout."""
    native = load_native()
    return native is not None and native.has_lanes()


def place(codes: torch.Tensor, bits: int, group: int, code: str) -> tuple[torch.Tensor, str]:
    """A copy of a matrix' codes where and how this machine multiplies them fastest, and the name of its layout.

    The copy is made by all threads in one pass, into huge pages where the system has them; `codes` may be a mapped
    file. Without native code, and on other devices than the CPU, the codes come back as they are.
    """
    native = load_native() if codes.device.type == "cpu" else None
    if native is None or codes.numel() == 0:
        return codes, code
    lanes = code == "trellis" and group % LANE_COLS == 0 and native.has_lanes()
    rows = codes.shape[0]
    shape = (-(-rows // 2), 2 * codes.shape[1]) if lanes else codes.shape
    placed = native.huge_bytes(shape[0] * shape[1]).view(shape)
    native.place(codes.contiguous(), placed, bits if lanes else 0)
    return placed, "lanes" if lanes else code
