"""Parameters through which vLLM's loaders fill packed matrices.

vLLM hands every stored tensor whole to the parameter of its name, with the shard of a fused layer that it belongs to.
These parameters pass it on to the pieces that their layer consists of, and are gone once all is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.parameter import BasevLLMParameter

from fewbit.dtypes import torch_dtype
from fewbit.integrations.pieces import Piece, use_all_cores
from fewbit.modules import PackedTensor

QKV = ("q", "k", "v")


class PartParameter(BasevLLMParameter):
    """The parameter of one part's name in a layer of one or several matrices; it holds nothing itself."""

    part: str
    pieces: Sequence[Piece]

    @classmethod
    def of(cls, part: str, dtype: str, pieces: Sequence[Piece], weight_loader: Callable[..., None]) -> PartParameter:
        made: PartParameter = cls(data=torch.empty(0, dtype=torch_dtype(dtype)), weight_loader=weight_loader)
        made.part, made.pieces = part, pieces
        return made

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor, **_: Any) -> None:
        self.pieces[0].load_rows(self.part, loaded_weight, self.tp_rank)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self.pieces[kwargs["shard_id"]].load_rows(self.part, loaded_weight, self.tp_rank)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        shard = kwargs["shard_id"]
        # Where there are fewer key/value heads than ranks, `num_heads` ranks hold the same one.
        rank = self.tp_rank if shard == "q" else self.tp_rank // kwargs["num_heads"]
        self.pieces[QKV.index(shard)].load_rows(self.part, loaded_weight, rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor, **_: Any) -> None:
        self.pieces[0].load_columns(self.part, loaded_weight, self.tp_rank)


def load_rows(parameter: PartParameter, tensor: torch.Tensor) -> None:
    """The loader for layers whose own one does not know such parameters."""
    parameter.load_column_parallel_weight(tensor)


def add_parameters(layer: Any, pieces: Sequence[Piece], weight_loader: Callable[..., None]) -> None:
    """Give a layer a parameter for every part that one of its matrices has."""
    parts = {part: dtype for piece in pieces for part, (_, dtype) in piece.module.layout().items()}
    for part, dtype in parts.items():
        layer.register_parameter(part, PartParameter.of(part, dtype, pieces, weight_loader))
    layer.fewbit_pieces = tuple(pieces)


def take_matrices(layer: nn.Module) -> list[PackedTensor]:
    """The layer's packed matrices, all loaded; its parameters of parts are removed."""
    use_all_cores()
    pieces: tuple[Piece, ...] = layer.__dict__.pop("fewbit_pieces")
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if isinstance(parameter, PartParameter):
            delattr(layer, name)
    for piece in pieces:
        piece.check_complete()
    return [piece.packed for piece in pieces]
