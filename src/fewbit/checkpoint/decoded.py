"""Reads a finished checkpoint as the full-precision model that its stored tensors stand for.

Weights are decoded and put back on their inputs' own axes. What a format does around a weight goes where a plain model
has a place for it: the constants that TwinQuant adds to a linear's outputs into its bias, and the rotation in front of
a tied head into a head of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fewbit.checkpoint.artifact import Artifact, QuantizedModule
from fewbit.checkpoint.damage import damage_named
from fewbit.checkpoint.source import Source, copy_companions, fingerprint_files, load_tokenizer, strip_quantization
from fewbit.errors import CorruptFile
from fewbit.experts import separate_experts
from fewbit.formats import get_format
from fewbit.math.hadamard import unpack_signs, unrotate
from fewbit.math.rounding import CHUNK_WEIGHTS
from fewbit.models import OUTPUT_ROTATION, find_family

ROW_GROUP = 16  # formats cut their parts at multiples of so many rows
WINDOW_KEYS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
LLAMA_WITH_OTHER_NAMES = ("mistral", "qwen2")  # without sliding windows; LLaMA's code has optional biases


@dataclass(frozen=True)
class _Module:
    """A quantized module with its stored parts in memory."""

    name: str
    description: QuantizedModule
    parts: dict[str, torch.Tensor]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Decoded rows, float32 `[stop - start, K]`, on the inputs' own axes."""
        spec, fmt = self.description.spec, get_format(self.description.spec.format)
        first, last = start // ROW_GROUP * ROW_GROUP, min(-(-stop // ROW_GROUP) * ROW_GROUP, spec.rows)
        stored = {name: part for name, part in self.parts.items() if name != "signs"}
        weight = fmt.dequantize(*fmt.slice_rows(stored, spec, first, last))
        if spec.block > 1:
            weight = unrotate(weight, unpack_signs(self.parts["signs"], spec.cols), spec.block)
        return weight[start - first : stop - first]


class DecodedSource(Source):
    """The decoded weights of a checkpoint, under the names of the transformers state dict, experts one by one.

    `lost_constants` names linears that add a constant to their outputs which no bias of a plain model holds, and
    `notes` says in words what is not where it was.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.path = artifact.path
        self.artifact = artifact
        artifact.check_config()
        with damage_named(artifact.path, "copy the checkpoint again"):
            config = AutoConfig.from_pretrained(artifact.path, trust_remote_code=False)
        self.config = strip_quantization(config)
        self.notes: list[str] = []
        self._held: _Module | None = None
        self._family = find_family(self.config.model_type)
        self._recorded = {entry["name"]: tuple(entry["shape"]) for entry in artifact.record["tensors"]}
        self._untie()
        self._place_constants()

    def _untie(self) -> None:
        """A tied head that reads rotated states becomes a table of its own, since plain models rotate nothing."""
        self._rotation = None
        final_norm = self._family.final_norm if self._family else ""
        name = f"{final_norm}.{OUTPUT_ROTATION}"
        if self._family is None or self._recorded.pop(name, None) is None:
            return
        self._rotation = self.artifact.tensors([name])[name].float()
        self._recorded[f"{self._family.head}.weight"] = self._recorded[f"{self._family.embed}.weight"]
        self.config.tie_word_embeddings = False
        self.notes.append(
            "The output head is a table of its own: the checkpoint rotates the last hidden states in front of the "
            "embedding table, which a plain model has no place for."
        )

    def _place_constants(self) -> None:
        """Choose a configuration whose linears have biases where the checkpoint adds constants."""
        wanted = {name for name, module in self.artifact.modules.items() if "offset" in module.layout()}
        known = {name.removesuffix(".bias") for name in self._recorded if name.endswith(".bias")}
        self._biases, self.lost_constants = known, []
        if not wanted - known:
            return
        for config in with_biases(self.config):
            found = biased_linears(config)
            if len(wanted & found) > len(wanted & self._biases):
                self.config, self._biases = config, found
            if wanted <= found:
                break
        for name in sorted(self._biases - known):
            self._recorded[f"{name}.bias"] = (self._recorded[f"{name}.weight"][0],)
        self.lost_constants = sorted(wanted - self._biases)
        if self._biases - known:
            self.notes.append(
                f"{len(self._biases - known)} linears have biases that the original has not: they hold the constants "
                f"that the checkpoint adds to outputs. The model type is {self.config.model_type}."
            )
        if self.lost_constants:
            self.notes.append(
                f"{len(self.lost_constants)} linears add constants to their outputs in the checkpoint and have no bias "
                f"in a {self.config.model_type} model ({self.lost_constants[0]} first); those constants are lost, so "
                "this model is a little worse than the checkpoint."
            )

    @cached_property
    def input_bits(self) -> list[int]:
        """To how many bits the checkpoint's linears quantize their inputs, which a plain model does not."""
        trellis = {8 for module in self.artifact.modules.values() if module.spec.format == "trellis"}
        given = {module.spec.act_bits for module in self.artifact.modules.values() if 0 < module.spec.act_bits < 16}
        return sorted(trellis | given)

    def names(self) -> list[str]:
        return list(self._recorded)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._recorded:
            raise CorruptFile(f"{self.path}: has no tensor {name}; copy the checkpoint again")
        return self._recorded[name]

    def tensor(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stop = min(stop, self.shape(name)[0])
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module in self._biases:
            return self._bias(module)[start:stop]
        if self._rotation is not None and self._family is not None and module == self._family.head:
            return self.rows(f"{self._family.embed}.weight", start, stop) @ self._rotation.T
        if kind == "weight" and module in self.artifact.modules:
            return self._module(module).rows(start, stop)
        return self.artifact.tensors([name])[name][start:stop].float()

    def _module(self, name: str) -> _Module:
        if self._held is None or self._held.name != name:
            description = self.artifact.modules[name]
            self._held = _Module(name, description, self.artifact.parts(description))
        return self._held

    def _bias(self, module: str) -> torch.Tensor:
        """What is added to a linear's outputs, float32 `[N]`: `W (x - shift) + offset + bias = W x + this`."""
        stored = f"{module}.bias"
        total = torch.zeros(self.shape(stored)[0])
        if stored in self.artifact.files:
            total += self.artifact.tensors([stored])[stored].float()
        if module not in self.artifact.modules or "offset" not in self.artifact.modules[module].layout():
            return total
        packed = self._module(module)
        total += packed.parts["offset"]
        shift = packed.parts["shift"].float()
        each = max(ROW_GROUP, CHUNK_WEIGHTS // packed.description.spec.cols)
        for start in range(0, len(total), each):
            stop = min(start + each, len(total))
            total[start:stop] -= packed.rows(start, stop) @ shift
        return total

    def fingerprint(self) -> str:
        files = ("config.json", *sorted(set(self.artifact.files.values())))
        return fingerprint_files([self.path / file for file in files])

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def copy_tokenizer(self, out_dir: str | Path) -> None:
        copy_companions(self.path, Path(out_dir))


def with_biases(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Configurations of the same model that have more biases, the nearest to the original first."""
    found = []
    if hasattr(config, "attention_bias"):
        found.append(_changed(config, config.model_type, ()))
    layer_types = getattr(config, "layer_types", None) or ()
    windows = getattr(config, "sliding_window", None) or "sliding_attention" in layer_types
    if config.model_type in LLAMA_WITH_OTHER_NAMES and not windows:
        found.append(_changed(config, "llama", WINDOW_KEYS))
    return found


def _changed(config: PretrainedConfig, model_type: str, without: tuple[str, ...]) -> PretrainedConfig:
    known = copy.deepcopy(config.to_dict())
    for key in ("model_type", "architectures", *without):
        known.pop(key, None)
    changed = AutoConfig.for_model(model_type, **{**known, "attention_bias": True})
    if hasattr(changed, "mlp_bias"):
        changed.mlp_bias = True
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(changed)]
    changed.architectures = [model_class.__name__]
    return changed


def biased_linears(config: PretrainedConfig) -> set[str]:
    """The names of a model's linears that have a bias."""
    family = find_family(config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if family is not None:
            separate_experts(model, family)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.bias is not None
    }
