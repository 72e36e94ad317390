"""How packed matrices come into vLLM's layers: parameters that cut what is loaded, and products with the result.

vLLM hands every stored tensor whole to the parameter of its name, with the shard of a fused layer that it belongs to;
the parameter knows where the cut of this rank goes. Once all is loaded the parameters are gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.parameter import BasevLLMParameter

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.checkpoint.parallel import Span, cut_part
from fewbit.dtypes import name_of, torch_dtype
from fewbit.errors import CorruptFile, UsageError
from fewbit.modules import FewbitEmbedding, FewbitLinear, PackedTensor
from fewbit.ops.extension import load_native

QKV = ("q", "k", "v")
CORES_VARIABLE = "GOMP_CPU_AFFINITY"  # set by vLLM for its workers: the cores of a rank


class Piece:
    """What one rank holds of one matrix: its packed parts, filled part by part."""

    def __init__(self, module: QuantizedModule, own: QuantizedModule, dtype: torch.dtype) -> None:
        """`module` describes the whole matrix, `own` what this rank holds, which may have rows of zeros behind the
        whole matrix' last."""
        self.module = module
        table = own.kind == "embed"
        self.packed: PackedTensor = FewbitEmbedding(own, dtype) if table else FewbitLinear(own, False, dtype)
        self._missing = set(module.layout())

    def load(self, part: str, tensor: torch.Tensor, rows: Span, cols: Span) -> None:
        """Take this rank's cut of a whole stored part; raises `CorruptFile` where it is not what was announced."""
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


class PartParameter(BasevLLMParameter):
    """The parameter of one part's name in a layer of one or several matrices; it holds nothing itself."""

    part: str
    pieces: Sequence[Piece]

    @classmethod
    def of(cls, part: str, dtype: str, pieces: Sequence[Piece], weight_loader: Callable[..., None]) -> PartParameter:
        made: PartParameter = cls(data=torch.empty(0, dtype=torch_dtype(dtype)), weight_loader=weight_loader)
        made.part, made.pieces = part, pieces
        return made

    def _load_rows(self, index: int, tensor: torch.Tensor, rank: int) -> None:
        """Rows that the given rank holds; behind the last row there may be none."""
        piece = self.pieces[index]
        whole, count = piece.module.spec, piece.packed.spec.rows
        start, stop = (min(edge, whole.rows) for edge in (rank * count, (rank + 1) * count))
        piece.load(self.part, tensor, Span(start, stop), Span(0, whole.cols))

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor, **_: Any) -> None:
        self._load_rows(0, loaded_weight, self.tp_rank)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._load_rows(kwargs["shard_id"], loaded_weight, self.tp_rank)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        shard = kwargs["shard_id"]
        # Where there are fewer key/value heads than ranks, `num_heads` ranks hold the same one.
        rank = self.tp_rank if shard == "q" else self.tp_rank // kwargs["num_heads"]
        self._load_rows(QKV.index(shard), loaded_weight, rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor, **_: Any) -> None:
        (piece,) = self.pieces
        whole, count = piece.module.spec, piece.packed.spec.cols
        start = self.tp_rank * count
        piece.load(self.part, loaded_weight, Span(0, whole.rows), Span(start, start + count))


def load_rows(parameter: PartParameter, tensor: torch.Tensor) -> None:
    """The loader of layers whose own one does not know such parameters."""
    parameter.load_column_parallel_weight(tensor)


def add_parameters(layer: nn.Module, pieces: Sequence[Piece], weight_loader: Callable[..., None]) -> None:
    """Give a layer a parameter for every part that one of its matrices has."""
    parts = {part: dtype for piece in pieces for part, (_, dtype) in piece.module.layout().items()}
    for part, dtype in parts.items():
        layer.register_parameter(part, PartParameter.of(part, dtype, pieces, weight_loader))
    layer.fewbit_pieces = tuple(pieces)


def take_pieces(layer: Any) -> list[PackedTensor]:
    """The layer's packed matrices, all loaded; its parameters of parts are removed."""
    use_all_cores()
    pieces: tuple[Piece, ...] = layer.fewbit_pieces
    del layer.fewbit_pieces
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if isinstance(parameter, PartParameter):
            delattr(layer, name)
    for piece in pieces:
        piece.check_complete()
    return [piece.packed for piece in pieces]


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


def ready(packed: PackedTensor, dtype: torch.dtype) -> nn.Module:
    """A matrix placed for its device's kernels, or decoded where there are none."""
    if not packed.has_kernel():
        return DecodedMatrix(packed, dtype)
    packed.place()
    return packed


class Fused(nn.Module):
    """The matrices of one layer of vLLM, which read the same inputs; their outputs stand side by side."""

    def __init__(self, matrices: Sequence[nn.Module]) -> None:
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
        outputs = [m.product(x, b) for m, b in zip(self.matrices, biases, strict=True)]
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
    """Let the native code's threads run on all cores of this rank.

    vLLM binds the threads of OpenMP to cores one by one, this one included, and threads that it starts would all stay
    on its core.
    """
    cores = {int(core) for core in os.environ.get(CORES_VARIABLE, "").split() if core.isdigit()}
    native = load_native() if cores else None
    if native is None or native.num_threads() == len(cores):
        return
    bound = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise UsageError(f"{CORES_VARIABLE} names cores that this process may not use ({error})") from error
    native.set_num_threads(len(cores))
    # The threads start with the first call that has work for them.
    torch.ops.fewbit.rotate_quantize(torch.zeros(256, 256), None, 1, 256)
    os.sched_setaffinity(0, bound)
