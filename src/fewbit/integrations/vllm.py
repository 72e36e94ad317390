"""fewbit checkpoints in vLLM: a quantization config under the method "fewbit", and how its layers multiply.

vLLM loads this module in every process through the entry point `vllm.general_plugins`; the checkpoint's own
configuration then chooses it. Mixtures of experts are refused: their fused layers have no packed kernels here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import BasevLLMParameter

from fewbit.checkpoint.artifact import QuantizedModule, check_version, modules_from_json
from fewbit.checkpoint.equivalent import PER_MODULE, RESIDUAL
from fewbit.checkpoint.parallel import Span, allowed_sizes, cut
from fewbit.errors import CorruptFile, UnsupportedShape, UsageError
from fewbit.integrations.pieces import Fused, Piece, ready
from fewbit.integrations.vllm_parameters import add_parameters, load_rows, take_matrices
from fewbit.models import OUTPUT_ROTATION, find_family
from fewbit.ops.schemas import FLOATS

NO_KERNELS = ("svdquant",)  # controls whose inputs are rounded, which plain weights do not show


@register_quantization_config("fewbit")
class FewbitVllmConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint, and the methods of vLLM's layers by the modules it describes."""

    def __init__(self, modules: dict[str, QuantizedModule], rotated_output: bool) -> None:
        super().__init__()
        self.modules = modules
        self.rotated_output = rotated_output
        self.sizes: list[int] = []

    def get_name(self) -> str:
        return "fewbit"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FewbitVllmConfig:
        """Raises `CorruptFile` or `FewbitError` for a config that this release cannot read."""
        check_version(config)
        return cls(modules_from_json(config.get("modules", {})), bool(config.get("rotated_output")))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        text_config = None if hf_config is None else hf_config.get_text_config()
        family = None if text_config is None else find_family(text_config.model_type)
        if family is not None and text_config is not None:
            self.sizes = allowed_sizes(self.modules.values(), family, text_config.to_dict())

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The final norm's rotation goes to the table, since vLLM's norms have no place for it; the file of the
        transform, which vLLM reads with all others, says how the model was changed and is not part of it."""
        names: dict[re.Pattern[str], str | None] = {
            re.compile(rf"^({'|'.join(PER_MODULE)})\.|^{RESIDUAL}$"): None,
            re.compile(rf"(^|\.)norm\.{OUTPUT_ROTATION}$"): r"\1embed_tokens.rotation",
        }
        return WeightsMapper(orig_to_new_regex=names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            parts = self._parts_of(prefix)
            return FewbitLinearMethod(self, parts) if parts else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self._table_method(isinstance(layer, ParallelLMHead))
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.modules):
            raise UsageError(f"{prefix}: vLLM's mixtures of experts are not supported; use fewbit serve or fewbit.load")
        return None

    def _table_method(self, head: bool) -> QuantizeMethodBase:
        table, module = self._of_kind("embed"), self._of_kind("head" if head else "embed")
        if module is None and table is None and not self.rotated_output:
            return UnquantizedEmbeddingMethod()
        return FewbitTableMethod(self, module, self.rotated_output and not head)

    def _of_kind(self, kind: str) -> QuantizedModule | None:
        return next((module for module in self.modules.values() if module.kind == kind), None)

    def _parts_of(self, prefix: str) -> list[QuantizedModule]:
        """The modules that vLLM's layer of that name consists of; none where it is not quantized.

        Raises `CorruptFile` where only some of them are, or where they are not stored alike.
        """
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(leaf, [leaf])]
        found = [self.modules[name] for name in names if name in self.modules]
        if found and len(found) < len(names):
            plain = ", ".join(name for name in names if name not in self.modules)
            raise CorruptFile(f"{prefix} needs all of its parts quantized or none, but {plain} is not; quantize again")
        alike = {(m.spec.format, m.spec.bits, m.spec.cols, m.spec.block, m.spec.group, m.spec.act_bits) for m in found}
        if len(alike) > 1:
            how = "; ".join(f"{module.name}: {module.spec}" for module in found)
            raise CorruptFile(f"{prefix} needs its parts stored alike, but they are not ({how}); quantize again")
        for module in found:
            if module.spec.format in NO_KERNELS:
                raise UsageError(
                    f"{module.name}: format {module.spec.format} is a control that vLLM does not run; use fewbit.load"
                )
        return found

    def cut(self, module: QuantizedModule, rows: int, cols: int) -> QuantizedModule:
        """What every rank holds of a module; raises `UnsupportedShape` with the sizes that would work."""
        try:
            return cut(module, Span(0, rows), Span(0, cols))
        except UnsupportedShape as error:
            sizes = ", ".join(map(str, self.sizes)) or "1"
            raise UnsupportedShape(f"{error}; tensor_parallel_size can be {sizes} for this checkpoint") from error


@register_weight_loader_v2_supported_method
class FewbitLinearMethod(LinearMethodBase):
    """A linear of vLLM of one or several quantized modules."""

    def __init__(self, config: FewbitVllmConfig, modules: list[QuantizedModule]) -> None:
        self.config = config
        self.modules = modules

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if len(output_partition_sizes) != len(self.modules):
            names = ", ".join(module.name for module in self.modules)
            raise UsageError(f"vLLM's layer has {len(output_partition_sizes)} parts, the checkpoint {names}")
        pieces = []
        for module, rows in zip(self.modules, output_partition_sizes, strict=True):
            own = self.config.cut(module, rows, input_size_per_partition)
            pieces.append(Piece(module, own, params_dtype))
        add_parameters(layer, pieces, extra_weight_attrs["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.fused = Fused([ready(packed, layer.params_dtype) for packed in take_matrices(layer)])

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = layer.fused.product(x, bias)
        return found


class FewbitTableMethod(QuantizeMethodBase):
    """Embedding or head, quantized or not; where the checkpoint says so, with the rotation of the final hidden states.

    A tied head is the embedding's own table, which then multiplies as well.
    """

    def __init__(self, config: FewbitVllmConfig, module: QuantizedModule | None, rotated: bool) -> None:
        self.config = config
        self.module = module
        self.rotated = rotated
        self.plain = UnquantizedEmbeddingMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        if self.module is None:
            self.plain.create_weights(layer, *sizes, **extra_weight_attrs)
        else:
            add_parameters(layer, [self._piece(layer, sum(output_partition_sizes), params_dtype)], load_rows)
        if self.rotated:
            rotation = torch.empty(input_size, input_size, dtype=params_dtype)
            layer.register_parameter("rotation", BasevLLMParameter(data=rotation, weight_loader=load_whole))

    def _piece(self, layer: Any, rows: int, dtype: torch.dtype) -> Piece:
        module = self.module
        assert module is not None
        if layer.num_added_embeddings:
            raise UsageError(f"{module.name}: added vocabulary needs a table that is not quantized (--head bf16)")
        held = min(rows, module.spec.rows)
        own = self.config.cut(module, held, module.spec.cols)
        return Piece(module, replace(own, spec=replace(own.spec, rows=rows)), dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.module is None:
            self.plain.process_weights_after_loading(layer)
            return
        (packed,) = take_matrices(layer)
        if self.module.kind == "embed":
            layer.table = packed
        layer.fused = Fused([ready(packed, layer.params_dtype)])

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.plain.embedding(layer, input_) if self.module is None else layer.table(input_)
        return found

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.rotated:
            x = x @ layer.rotation
        if self.module is None:
            return self.plain.apply(layer, x, bias)
        found: torch.Tensor = layer.fused.product(x, bias)
        return found

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        for name, _ in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
        layer.quant_method = TiedMethod(embed_tokens)
        return layer


class TiedMethod(QuantizeMethodBase):
    """A head without tensors of its own: it multiplies with the embedding's table."""

    def __init__(self, embed_tokens: Any) -> None:
        self.embed_tokens = embed_tokens

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """There is nothing to create."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.embed_tokens.quant_method.apply(self.embed_tokens, x, bias)
        return found


def load_whole(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Every rank holds all of it."""
    parameter.data.copy_(tensor)


def register() -> None:
    """Make the method "fewbit" known to vLLM, which importing this module does; safe to call more than once."""
