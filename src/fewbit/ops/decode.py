"""Decoding as operators: under one name for torch.compile what formats do in Python and in native code of their own.

Products have operators in `fewbit.ops.schemas`; these two serve whatever needs weights themselves, and are called while
something is compiled. Otherwise `decode_rows` and the format's `dequantize` do the same without a detour.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import torch

from fewbit.formats import TensorSpec, get_format
from fewbit.math.hadamard import unpack_signs, unrotate
from fewbit.ops.layouts import from_lanes
from fewbit.ops.schemas import ROW_GROUP

torch.library.define("fewbit::decode", "(Tensor[] parts, str[] names, str spec) -> Tensor")
torch.library.define("fewbit::decode_rows", "(Tensor rows, Tensor[] parts, str[] names, str spec, str code) -> Tensor")


def spec_text(spec: TensorSpec) -> str:
    """A spec as an operator takes it."""
    return json.dumps(spec.to_json())


@functools.cache
def _spec(text: str) -> TensorSpec:
    return TensorSpec(**json.loads(text))


def decode_rows(rows: torch.Tensor, parts: dict[str, torch.Tensor], spec: TensorSpec, code: str) -> torch.Tensor:
    """Rows (int64 `[n]`) of `W`, float32 `[n, K]`, un-rotated; `parts` with `signs` where the spec rotates.

    `code` is the layout of the codes: `lanes`, or the format's name for codes as they are stored.
    """
    weight_format = get_format(spec.format)
    if code == "lanes":
        # Only the row groups asked for are put back in order, with those that stand beside them.
        codes, groups = parts["codes"], rows // ROW_GROUP
        beside = codes.shape[1] // (2 * spec.bits * spec.cols)
        several = from_lanes(codes[groups // beside], beside * rows.numel(), spec.cols, spec.bits)
        place_of = torch.arange(rows.numel(), device=rows.device)
        taken = {
            **parts,
            "codes": several[beside * place_of + groups % beside],
            "scales": parts["scales"][rows].repeat_interleave(ROW_GROUP, 0),
        }
        values = weight_format.dequantize(taken, replace(spec, rows=ROW_GROUP * rows.numel()))
        found = values.view(rows.numel(), ROW_GROUP, spec.cols)[place_of, rows % ROW_GROUP]
    else:
        found = weight_format.dequantize_rows(parts, spec, rows)
    return unrotate(found, unpack_signs(parts["signs"], spec.cols), spec.block) if spec.block > 1 else found


@torch.library.impl("fewbit::decode", "CompositeExplicitAutograd")
def _decode(parts: list[torch.Tensor], names: list[str], spec: str) -> torch.Tensor:
    return get_format(_spec(spec).format).dequantize(dict(zip(names, parts, strict=True)), _spec(spec))


@torch.library.impl("fewbit::decode_rows", "CompositeExplicitAutograd")
def _decode_rows(rows: torch.Tensor, parts: list[torch.Tensor], names: list[str], spec: str, code: str) -> torch.Tensor:
    return decode_rows(rows, dict(zip(names, parts, strict=True)), _spec(spec), code)


@torch.library.register_fake("fewbit::decode")
def _decode_fake(parts: list[torch.Tensor], names: list[str], spec: str) -> torch.Tensor:
    return parts[0].new_empty((_spec(spec).rows, _spec(spec).cols), dtype=torch.float32)


@torch.library.register_fake("fewbit::decode_rows")
def _decode_rows_fake(
    rows: torch.Tensor, parts: list[torch.Tensor], names: list[str], spec: str, code: str
) -> torch.Tensor:
    return parts[0].new_empty((rows.shape[0], _spec(spec).cols), dtype=torch.float32)
