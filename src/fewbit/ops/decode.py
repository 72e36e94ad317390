"""Decoding as operators: whole weights, and the rows that embeddings look up, of every format by its own code.

Under these names torch.compile takes what formats do in Python and in native code of their own. `spec` is the text of a
`TensorSpec` (`spec_text`), and `parts` are those that its format stores, in the order of its layout.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import torch

from fewbit.formats import TensorSpec, get_format
from fewbit.math.hadamard import unpack_signs, unrotate
from fewbit.ops.layouts import from_lanes
from fewbit.ops.reference import butterflies
from fewbit.ops.schemas import ROW_GROUP

CHUNK = 256  # ids whose rows are decoded at a time, each with the 15 beside it

torch.library.define("fewbit::decode", "(Tensor[] parts, str spec) -> Tensor")
torch.library.define(
    "fewbit::lookup",
    "(Tensor ids, Tensor[] parts, Tensor? signs, str spec, str code, float multiplier, ScalarType dtype) -> Tensor",
)


def spec_text(spec: TensorSpec) -> str:
    """A spec as an operator takes it."""
    return json.dumps(spec.to_json())


@functools.cache
def _spec(text: str) -> TensorSpec:
    return TensorSpec(**json.loads(text))


def _named(parts: list[torch.Tensor], spec: TensorSpec) -> dict[str, torch.Tensor]:
    return dict(zip(get_format(spec.format).layout(spec), parts, strict=True))


@torch.library.impl("fewbit::decode", "CompositeExplicitAutograd")
def decode(parts: list[torch.Tensor], spec: str) -> torch.Tensor:
    """`W'`, float32 `[N, K]`, on the inputs' rotated axes."""
    found = _spec(spec)
    return get_format(found.format).dequantize(_named(parts, found), found)


@torch.library.register_fake("fewbit::decode")
def _decode(parts: list[torch.Tensor], spec: str) -> torch.Tensor:
    return parts[0].new_empty((_spec(spec).rows, _spec(spec).cols), dtype=torch.float32)


@torch.library.impl("fewbit::lookup", "CompositeExplicitAutograd")
def lookup(
    ids: torch.Tensor,
    parts: list[torch.Tensor],
    signs: torch.Tensor | None,
    spec: str,
    code: str,
    multiplier: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of a table `[N, K]` by ids `[...]`, on their own axes, times `multiplier`: `[..., K]` in `dtype`.

    `signs` are packed; `code` is "lanes" where the codes of a trellis table are rearranged, otherwise the format.
    """
    table = _spec(spec)
    named = _named(parts, table)
    if ids.device.type != "cpu":
        found = rows_of_all(ids.reshape(-1), named, signs, table)
        return (found * multiplier).to(dtype).view(*ids.shape, table.cols)
    unique, inverse = torch.unique(ids, return_inverse=True)
    if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < table.rows:
        raise IndexError(f"ids from {int(unique[0])} to {int(unique[-1])} are not in a table of {table.rows} rows")
    found = rotated_rows(named, table, code, unique)
    if signs is not None:
        found = unrotate(found, unpack_signs(signs, table.cols), table.block)
    return (found * multiplier).to(dtype)[inverse]


@torch.library.register_fake("fewbit::lookup")
def _lookup(
    ids: torch.Tensor,
    parts: list[torch.Tensor],
    signs: torch.Tensor | None,
    spec: str,
    code: str,
    multiplier: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return ids.new_empty((*ids.shape, _spec(spec).cols), dtype=dtype)


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
