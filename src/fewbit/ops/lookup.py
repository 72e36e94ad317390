"""Looks rows of a packed table up: the operator behind embeddings.

One operator for every format, which decodes with the format's own code, and only what is asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fewbit.formats import TensorSpec, get_format
from fewbit.math.hadamard import unpack_signs, unrotate
from fewbit.ops.layouts import from_lanes
from fewbit.ops.reference import butterflies
from fewbit.ops.schemas import ROW_GROUP

CHUNK = 256  # ids whose rows are decoded at a time, each with the 15 beside it


def rotated_rows(parts: dict[str, torch.Tensor], spec: TensorSpec, code: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows (int64 `[n]`) of `W'`, float32 `[n, K]`; `code` is the layout of a trellis matrix' codes."""
    weight_format = get_format(spec.format)
    if code != "lanes":
        return weight_format.dequantize_rows(parts, spec, rows)
    # Only the row groups asked for are put back in order, with those that stand beside them.
    groups, beside = rows // ROW_GROUP, parts["codes"].shape[1] // (2 * spec.bits * spec.cols)
    several = from_lanes(parts["codes"][groups // beside], beside * rows.numel(), spec.cols, spec.bits)
    place_of = torch.arange(rows.numel(), device=rows.device)
    codes = several[beside * place_of + groups % beside]
    scales = parts["scales"][rows].repeat_interleave(ROW_GROUP, 0)
    taken = {**parts, "codes": codes, "scales": scales}
    values = weight_format.dequantize(taken, replace(spec, rows=ROW_GROUP * rows.numel()))
    return values.view(rows.numel(), ROW_GROUP, spec.cols)[place_of, rows % ROW_GROUP]


def lookup(
    ids: torch.Tensor,
    parts: list[torch.Tensor],
    signs: torch.Tensor | None,
    format: str,
    rows: int,
    cols: int,
    bits: int,
    block: int,
    group: int,
    code: str,
    multiplier: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of a table `[rows, cols]` by ids `[...]`, on their own axes, times `multiplier`: `[..., cols]` in `dtype`.

    `parts` are those that the format stores, in its order, `signs` packed; `code` is "lanes" where the codes of a
    trellis table are rearranged, otherwise the format.
    """
    spec = TensorSpec(format, bits, rows, cols, block, group)
    named = dict(zip(get_format(format).layout(spec), parts, strict=True))
    if ids.device.type != "cpu":
        found = rows_of_all(ids.reshape(-1), named, signs, spec)
        return (found * multiplier).to(dtype).view(*ids.shape, cols)
    unique, inverse = torch.unique(ids, return_inverse=True)
    found = rotated_rows(named, spec, code, unique)
    if signs is not None:
        found = unrotate(found, unpack_signs(signs, cols), block)
    return (found * multiplier).to(dtype)[inverse]


def rows_of_all(
    ids: torch.Tensor, parts: dict[str, torch.Tensor], signs: torch.Tensor | None, spec: TensorSpec
) -> torch.Tensor:
    """Rows of every id `[n]`, repeated ones too, float32 `[n, K]` on their own axes.

    What it does depends on shapes alone, and it waits for nothing: graphics processors can record it in a graph.
    """
    found = []
    for some in ids.split(CHUNK):
        rows = get_format(spec.format).dequantize_rows(parts, spec, some)
        if signs is not None:
            rows = butterflies(rows, spec.block) * unpack_signs(signs, spec.cols)
        found.append(rows)
    return torch.cat(found)
