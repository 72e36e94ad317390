"""Where the bytes of a packed matrix stand in memory: as stored, or rearranged for the machine that multiplies with it.

"lanes" holds the bytes of the trellis stream, no bit of them changed, with L = 2 or 4 row groups side by side: for
every 64 columns their 16 L chunks (64 weights, 8 k bytes each) are 16 L streams; first byte 0 of all streams, then byte
1 of all, and so on. A processor that holds one byte of every stream in a register needs no byte shuffles across lanes,
which cost it more than everything else. Missing row groups at the end are zeros. Scale groups must be a multiple of 64
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from fewbit.ops.extension import load_native
from fewbit.torch_later import torch

LANE_COLS = 64
LANE_GROUPS = (2, 4)  # row groups side by side
CHUNKS = 16  # of a row group in 64 columns
PIECE_BYTES = 1 << 20  # that are read before they are put in place: few enough to stay in a processor's cache


def to_lanes(codes: torch.Tensor, bits: int, lane_groups: int) -> torch.Tensor:
    """Trellis codes uint8 `[R, 2 k K]` of R row groups to lanes, uint8 `[ceil(R / L), 2 L k K]`."""
    row_groups, size = codes.shape
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -row_groups % lane_groups))
    units = padded.view(-1, lane_groups, size // (CHUNKS * 8 * bits), CHUNKS, 8 * bits)
    return units.permute(0, 2, 4, 1, 3).reshape(-1, lane_groups * size)


def from_lanes(lanes: torch.Tensor, row_groups: int, cols: int, bits: int) -> torch.Tensor:
    """The inverse of `to_lanes`: lanes of a matrix with `cols` inputs to the codes of its R row groups."""
    size = 2 * bits * cols
    lane_groups = lanes.shape[1] // size
    units = lanes.view(lanes.shape[0], size // (CHUNKS * 8 * bits), 8 * bits, lane_groups, CHUNKS)
    return units.permute(0, 3, 1, 4, 2).reshape(-1, size)[:row_groups]


def place(codes: torch.Tensor, bits: int, group: int, code: str) -> tuple[torch.Tensor, str]:
    """A copy of a matrix' codes where and how this machine multiplies them fastest, and the name of its layout.

    The copy is made by all threads in one pass, into huge pages where the system has them; `codes` may be a mapped
    file. Without native code, and on other devices than the CPU, the codes come back as they are.
    """
    native = load_native() if codes.device.type == "cpu" else None
    if native is None or codes.numel() == 0:
        return codes, code
    lane_groups = native.lane_groups() if code == "trellis" and group % LANE_COLS == 0 else 1
    placed = lane_memory(native, codes.shape[0], codes.shape[1], lane_groups)
    native.place(codes.contiguous(), placed, bits, lane_groups)
    return torch.from_numpy(placed), code if lane_groups == 1 else "lanes"


def read_placed(
    native: ModuleType, read: Callable[[np.ndarray, int], None], shape: tuple[int, int], bits: int, group: int
) -> tuple[np.ndarray, str]:
    """Trellis codes of a shape, read to where and how this machine multiplies them fastest, and their layout's name.

    `read` fills a contiguous uint8 array with the stored bytes from a place on. Memory holds the result and a piece.
    """
    rows, size = shape
    lane_groups = native.lane_groups() if group % LANE_COLS == 0 else 1
    placed = lane_memory(native, rows, size, lane_groups)
    if lane_groups == 1:
        read(placed, 0)
        return placed, "trellis"
    step = lane_groups * max(1, PIECE_BYTES // (lane_groups * size))
    piece = np.empty((min(step, rows), size), np.uint8)
    for start in range(0, rows, step):
        part = piece[: min(step, rows - start)]
        read(part, start * size)
        first = start // lane_groups
        native.place(part, placed[first : first - (-len(part) // lane_groups)], bits, lane_groups)
    return placed, "lanes"


def lane_memory(native: ModuleType, rows: int, size: int, lane_groups: int) -> np.ndarray:
    """Memory uint8 for the codes of `rows` row groups of `size` bytes, in huge pages where the system has them."""
    shape = (-(-rows // lane_groups), lane_groups * size)
    found: np.ndarray = native.huge_bytes(shape[0] * shape[1]).reshape(shape)
    return found
