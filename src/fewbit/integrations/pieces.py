"""What one rank of a host holds of packed matrices: cut from whole stored parts, placed, and multiplied together.

Nothing here knows a host; `fewbit.integrations.vllm` puts it into vLLM's layers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.checkpoint.parallel import Span, cut_part
from fewbit.dtypes import name_of
from fewbit.errors import CorruptFile
from fewbit.modules import FewbitEmbedding, FewbitLinear, PackedTensor
from fewbit.ops.extension import load_native

CORES = {"GOMP_CPU_AFFINITY": r"^([\d ]+)$", "KMP_AFFINITY": r"proclist=\[([\d,]+)\]"}
"""How GNU's and Intel's OpenMP are told the cores that their threads are bound to, one each."""


class Piece:
    """One rank's part of one matrix: packed, and filled part by part."""

    def __init__(self, module: QuantizedModule, own: QuantizedModule, dtype: torch.dtype) -> None:
        """`module` describes the whole matrix and `own` what this rank holds, which may have rows of zeros behind the
        last row of the whole; `dtype` is that of looked-up rows."""
        self.module = module
        table = own.kind == "embed"
        self.packed: PackedTensor = FewbitEmbedding(own, dtype) if table else FewbitLinear(own, False, dtype)
        self._missing = set(module.layout())

    def load_rows(self, part: str, tensor: torch.Tensor, rank: int) -> None:
        """Take the rows of this rank from a whole stored part; raises `CorruptFile` where that is not as announced."""
        whole, count = self.module.spec.rows, self.packed.spec.rows
        start, stop = (min(edge, whole) for edge in (rank * count, (rank + 1) * count))
        self._load(part, tensor, Span(start, stop), Span(0, self.module.spec.cols))

    def load_columns(self, part: str, tensor: torch.Tensor, rank: int) -> None:
        """The same with the columns of this rank."""
        count = self.packed.spec.cols
        self._load(part, tensor, Span(0, self.module.spec.rows), Span(rank * count, (rank + 1) * count))

    def _load(self, part: str, tensor: torch.Tensor, rows: Span, cols: Span) -> None:
        shape, dtype = self.module.layout()[part]
        if tuple(tensor.shape) != tuple(shape) or name_of(tensor.dtype) != dtype:
            raise CorruptFile(
                f"{self.module.name}.{part} arrived as {name_of(tensor.dtype)} {tuple(tensor.shape)} instead of "
                f"{dtype} {tuple(shape)}; run: fewbit verify on the checkpoint"
            )
        taken = cut_part(self.module, part, tensor, rows, cols)
        buffer = self.packed.get_buffer(part)
        buffer[: taken.shape[0]].copy_(taken)
        buffer[taken.shape[0] :].zero_()
        self._missing.discard(part)

    def check_complete(self) -> None:
        """Raise `CorruptFile` where the checkpoint lacked a part."""
        if self._missing:
            raise CorruptFile(f"the checkpoint lacks the tensor {self.module.name}.{min(self._missing)}; copy it again")


class DecodedMatrix(nn.Module):
    """A matrix that has no kernel on its device, decoded once to plain weights; it takes a packed one's place."""

    weight: torch.Tensor

    def __init__(self, packed: PackedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", packed.plain_weight().to(dtype))
        parts = packed.parts()
        self.shift, self.offset = parts.get("shift"), parts.get("offset")

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`W x + bias` for inputs `[..., K]`, in their dtype."""
        if self.shift is not None and self.offset is not None:
            # Shifted in float32: what is left after the shift is much smaller than the inputs.
            x = (x.float() - self.shift.float()).to(x.dtype)
            bias = (self.offset if bias is None else self.offset + bias.float()).to(x.dtype)
        return nn.functional.linear(x, self.weight, bias)


def ready(packed: PackedTensor, dtype: torch.dtype) -> DecodedMatrix | PackedTensor:
    """A matrix placed for its device's kernels, or decoded to `dtype` where there are none."""
    if not packed.has_kernel():
        return DecodedMatrix(packed, dtype)
    packed.place()
    return packed


class Fused(nn.Module):
    """Matrices that are one layer to the host and read the same inputs; their outputs stand side by side."""

    def __init__(self, matrices: Sequence[DecodedMatrix | PackedTensor]) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrices)
        self.rows = [len(m.weight) if isinstance(m, DecodedMatrix) else m.spec.rows for m in matrices]
        self.joint = len(matrices) > 1 and self._joins()

    def _joins(self) -> bool:
        """Whether one call of `linears` computes all: codes of one kind behind equal signs."""
        packed = [m for m in self.matrices if isinstance(m, PackedTensor) and m.spec.format != "twinquant"]
        if len(packed) < len(self.matrices) or len({m.kernel_matrix().code for m in packed}) > 1:
            return False
        return all(torch.equal(m.signs, packed[0].signs) for m in packed)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, N being the rows of all together; `bias [N]`."""
        biases = [None] * len(self.rows) if bias is None else list(bias.split(self.rows))
        if self.joint:
            return torch.cat(self._linears(x, biases), -1)
        matrices: list[Any] = list(self.matrices)
        outputs = [m.product(x, b) for m, b in zip(matrices, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _linears(self, x: torch.Tensor, biases: list[Any]) -> list[torch.Tensor]:
        matrices: list[Any] = list(self.matrices)
        kernels = [m.kernel_matrix() for m in matrices]
        found: list[torch.Tensor] = torch.ops.fewbit.linears(
            x,
            [k.codes for k in kernels],
            [k.scales for k in kernels],
            [k.tensor_scale for k in kernels],
            [k.tables for k in kernels],
            matrices[0].signs,
            biases,
            [m.spec.bits for m in matrices],
            matrices[0].spec.block,
            kernels[0].code,
        )
        return found


def use_all_cores() -> None:
    """Let the native code's threads run on all cores that OpenMP was given.

    OpenMP binds its threads to one core each, the one that calls this included, and threads that inherit that would
    all stay on its core.
    """
    lists = [re.search(pattern, os.environ.get(name, "")) for name, pattern in CORES.items()]
    cores = {int(core) for found in lists if found for core in re.findall(r"\d+", found[1])}
    native = load_native() if len(cores) > 1 else None
    if native is None or native.num_threads() == len(cores):
        return
    bound = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        return  # not all of them are this process' own: the threads stay where they are
    try:
        native.set_num_threads(len(cores))
        # The threads start with the first call that has work for them.
        torch.ops.fewbit.rotate_quantize(torch.zeros(256, 256), None, 1, 256)
    finally:
        os.sched_setaffinity(0, bound)
