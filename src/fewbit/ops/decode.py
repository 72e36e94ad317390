"""Decoding as an operator: under one name for torch.compile what formats do in Python and in native code of their own.

Products and lookups have operators in `fewbit.ops.schemas`; this one serves whatever needs the weights themselves, and
is called while something is compiled. Otherwise the format's `dequantize` does the same without a detour.
"""

from __future__ import annotations

import functools
import json

import torch

from fewbit.formats import TensorSpec, get_format

torch.library.define("fewbit::decode", "(Tensor[] parts, str[] names, str spec) -> Tensor")


def spec_text(spec: TensorSpec) -> str:
    """A spec as an operator takes it."""
    return json.dumps(spec.to_json())


@functools.cache
def _spec(text: str) -> TensorSpec:
    return TensorSpec(**json.loads(text))


@torch.library.impl("fewbit::decode", "CompositeExplicitAutograd")
def _decode(parts: list[torch.Tensor], names: list[str], spec: str) -> torch.Tensor:
    return get_format(_spec(spec).format).dequantize(dict(zip(names, parts, strict=True)), _spec(spec))


@torch.library.register_fake("fewbit::decode")
def _decode_fake(parts: list[torch.Tensor], names: list[str], spec: str) -> torch.Tensor:
    return parts[0].new_empty((_spec(spec).rows, _spec(spec).cols), dtype=torch.float32)
