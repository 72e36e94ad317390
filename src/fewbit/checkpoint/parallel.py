"""Cuts quantized matrices for tensor parallelism, where every rank holds some rows or some columns of each.

Codes restart in every group of 16 rows and every scale group, so cuts there touch no bit. Which rank holds what is the
host's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.errors import UnsupportedShape
from fewbit.formats import TensorSpec
from fewbit.models import Family
from fewbit.torch_later import torch

ROW_STEP = 16
VOCABULARY_STEP = 64  # hosts pad the rows of embedding and head to a multiple of this before they cut
KEYS_AND_VALUES = ("k_proj", "v_proj")
ADDED_ONCE = ("offset",)  # parts that are added to the sum over all columns


@dataclass(frozen=True)
class Span:
    """Rows or columns `[start, stop)`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def column_step(spec: TensorSpec) -> int:
    """Cuts along the inputs must be at multiples of this: the scale group or the rotation block, whichever is wider."""
    return max(spec.group, spec.block)


def cut(module: QuantizedModule, rows: Span, cols: Span) -> QuantizedModule:
    """The description of some rows and columns of a matrix.

    Raises `UnsupportedShape`, which names the module and the step, where the cut would split what decodes together.
    """
    spec = module.spec
    for span, whole, step, what in (
        (rows, spec.rows, ROW_STEP, "rows"),
        (cols, spec.cols, column_step(spec), "inputs"),
    ):
        if not 0 <= span.start <= span.stop <= whole:
            raise UnsupportedShape(f"{module.name}: {what} {span.start} to {span.stop} of {whole} do not exist")
        if span.start % step or (span.stop % step and span.stop != whole):
            raise UnsupportedShape(
                f"{module.name}: {whole} {what} cannot be cut at {span.start} and {span.stop}, "
                f"only at multiples of {step}"
            )
    return replace(module, spec=replace(spec, rows=len(rows), cols=len(cols)))


def cut_part(module: QuantizedModule, part: str, tensor: torch.Tensor, rows: Span, cols: Span) -> torch.Tensor:
    """The same cut of one stored part of the whole matrix.

    A part that does not grow with rows or columns is everyone's, and what TwinQuant's codes and scales hold of V
    behind the columns stays whole. What is added once goes to those who hold the first columns; others get zeros.
    """

    def shape(**change: Any) -> tuple[int, ...]:
        return replace(module, spec=replace(module.spec, **change)).layout()[part][0]

    whole = shape()
    for axis, span in (("rows", rows), ("cols", cols)):
        nothing, before, upto = (shape(**{axis: count}) for count in (0, span.start, span.stop))
        for dim, size in enumerate(whole):
            kept = nothing[dim]
            if kept == size:
                continue
            piece = tensor.narrow(dim, before[dim] - kept, upto[dim] - before[dim])
            tensor = torch.cat([piece, tensor.narrow(dim, size - kept, kept)], dim) if kept else piece
    if part in ADDED_ONCE and cols.start > 0:
        return torch.zeros_like(tensor)
    return tensor


def _fits(module: QuantizedModule, family: Family, kv_heads: int, size: int) -> bool:
    spec, place = module.spec, family.place(module.name)
    if place is None:
        return -(-spec.rows // VOCABULARY_STEP) * VOCABULARY_STEP % (ROW_STEP * size) == 0
    if any(place.name in shared.linears and shared.writes_residual for shared in family.inputs):
        return spec.cols % (column_step(spec) * size) == 0
    if place.name.endswith(KEYS_AND_VALUES) and size > kv_heads:
        # Every head is then on several ranks.
        return size % kv_heads == 0 and spec.rows % (ROW_STEP * kv_heads) == 0
    return spec.rows % (ROW_STEP * size) == 0


def allowed_sizes(modules: Iterable[QuantizedModule], family: Family, config: Mapping[str, Any]) -> list[int]:
    """The numbers of ranks that a model can be cut for, ascending and with 1.

    `config` is that of the model (`num_attention_heads`, `num_key_value_heads`): heads are never cut.
    """
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    known = list(modules)
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    return [n for n in sizes if n == 1 or all(_fits(module, family, kv_heads, n) for module in known)]
