"""fewbit checkpoints in transformers: a quantization config and a quantizer under the method "fewbit".

transformers finds them once this module is imported, which `import fewbit` does; without the import it
skips an unknown method with a warning. A checkpoint's configuration therefore names a file of weights that does not
exist (`transformers_weights`), where transformers then stops; with the import that name is taken out in time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.checkpoint.artifact import check_version, modules_from_json, read_record
from fewbit.checkpoint.equivalent import rotate_output
from fewbit.checkpoint.store import FORMAT_VERSION, IMPORT_FIRST, RECORD, tensors_hash
from fewbit.dtypes import name_of
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.experts import separate_experts
from fewbit.formats.trellis import check_tables
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
    _record: dict[str, Any] | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Not about attention: this is what transformers shows the configuration to before it looks for files."""
        if getattr(config, "transformers_weights", None) == IMPORT_FIRST:
            del config.transformers_weights
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same for the first releases of transformers 5, which call this one alone."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        settings = self.quantization_config.to_dict()
        check_version(settings)
        files = kwargs.get("checkpoint_files")
        self._record = read_record(Path(files[0]).parent) if files else None
        modules = modules_from_json(settings["modules"])
        dtype = getattr(model, "dtype", torch.float32)
        family = find_family(model.config.model_type)
        if family is not None:
            separate_experts(model, family)
        for name, description in modules.items():
            try:
                original = model.get_submodule(name)
            except AttributeError as error:
                raise _without(model, name) from error
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
                if module.description.spec.format == "trellis" and not module.tables.is_meta:
                    check_tables(module.tables)
                if not module.qweight.is_meta:  # as it is while accelerate keeps it elsewhere
                    module.place()
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """What `fewbit.json` records, for the header of the files of `save_pretrained`, which writes no other file."""
        if self._record is None:
            return None, {}
        state = model.state_dict()
        tensors = [_as_stored(entry, state) for entry in self._record["tensors"]]
        return None, {RECORD: json.dumps({**self._record, "tensors": tensors})}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through packed linears to adapters; the packed tensors themselves never change."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _without(model: Any, name: str) -> FewbitError:
    """Why a model has no module of this name."""
    if model.get_output_embeddings() is None:
        return UsageError(
            f"a fewbit checkpoint is a language model with its head, and {type(model).__name__} has no {name}; load it "
            "with AutoModelForCausalLM, whose attribute base_model is the model without the head"
        )
    return CorruptFile(f"the checkpoint describes {name}, which this model does not have; copy the checkpoint again")


def _as_stored(entry: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The record of a tensor, renewed where it is a plain one that now has another dtype or other values."""
    tensor = state.get(entry["name"])
    if entry["format"] or tensor is None or tensor.is_meta:
        return entry
    return {
        **entry,
        "bytes": tensor.numel() * tensor.element_size(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": tensors_hash({entry["name"]: tensor.detach().cpu()}),
    }


def _embedding_scale(original: nn.Embedding) -> float:
    """Gemma scales what it looks up; the factor is a plain number on the module."""
    return float(getattr(original, "scalar_embed_scale", 1.0))


def register() -> None:
    """Make the method "fewbit" known to transformers; safe to call more than once."""
    if "fewbit" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("fewbit")(FewbitConfig)
        register_quantizer("fewbit")(FewbitQuantizer)


register()
