"""fewbit checkpoints in transformers: a quantization config and a quantizer under the method "fewbit".

transformers finds them once this module is imported, which `import fewbit` does; without the import it
skips an unknown method with a warning, so `fewbit.load` is the documented way in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.checkpoint.artifact import check_version, modules_from_json
from fewbit.checkpoint.equivalent import rotate_output
from fewbit.checkpoint.store import FORMAT_VERSION
from fewbit.dtypes import name_of
from fewbit.errors import CorruptFile
from fewbit.experts import separate_experts
from fewbit.models import find_family
from fewbit.modules import FewbitEmbedding, FewbitLinear, PackedTensor, TiedHead


class FewbitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a fewbit checkpoint: the format version and one entry per module."""

    def __init__(
        self, modules: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION, **extra: Any
    ) -> None:
        self.quant_method = "fewbit"  # type: ignore[assignment]
        self.modules = modules or {}
        self.format_version = format_version
        extra.pop("quant_method", None)
        self.__dict__.update(extra)


class FewbitQuantizer(HfQuantizer):
    """Swaps linears and embeddings for packed modules before transformers loads the tensors into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        settings = self.quantization_config.to_dict()
        check_version(settings)
        modules = modules_from_json(settings["modules"])
        dtype = getattr(model, "dtype", torch.float32)
        family = find_family(model.config.model_type)
        if family is not None:
            separate_experts(model, family)
        for name, description in modules.items():
            try:
                original = model.get_submodule(name)
            except AttributeError as error:
                raise CorruptFile(f"the checkpoint describes {name}, which this model does not have") from error
            with torch.device("meta"):
                packed: nn.Module
                if isinstance(original, nn.Embedding):
                    packed = FewbitEmbedding(description, dtype, _embedding_scale(original))
                else:
                    packed = FewbitLinear(description, original.bias is not None, dtype)
            model.set_submodule(name, packed)
        if settings.get("rotated_output") and family is not None:
            with torch.device("meta"):
                rotate_output(model.get_submodule(family.final_norm))
        self._tie(model)
        return model

    @staticmethod
    def _tie(model: Any) -> None:
        table = model.get_input_embeddings()
        if not isinstance(table, FewbitEmbedding) or not model.config.get_text_config().tie_word_embeddings:
            return
        model.set_output_embeddings(TiedHead(table))
        # The head reads the packed table itself, so there is no weight left for transformers to tie.
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, PackedTensor):
                for part, (shape, dtype) in module.description.layout().items():
                    tensor = getattr(module, part)
                    if name_of(tensor.dtype) != dtype or tuple(tensor.shape) != tuple(shape):
                        raise CorruptFile(
                            f"{name}.{part} arrived as {name_of(tensor.dtype)} {tuple(tensor.shape)} instead of "
                            f"{dtype} {tuple(shape)}; run: fewbit verify on the checkpoint"
                        )
                module.place()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _embedding_scale(original: nn.Embedding) -> float:
    """Gemma scales what it looks up; the factor is a plain number on the module."""
    return float(getattr(original, "scalar_embed_scale", 1.0))


def register() -> None:
    """Make the method "fewbit" known to transformers; safe to call more than once."""
    if "fewbit" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("fewbit")(FewbitConfig)
        register_quantizer("fewbit")(FewbitQuantizer)


register()
