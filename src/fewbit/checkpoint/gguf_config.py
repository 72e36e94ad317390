"""Recovers a transformers configuration from the metadata of a GGUF file.

transformers reads the common keys; what it leaves to a default, which is another model's value, is put right here
from the metadata and from the tensors that are there. What cannot be expressed is refused, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PretrainedConfig

from fewbit.checkpoint.damage import damage_named
from fewbit.checkpoint.source import strip_quantization
from fewbit.errors import UsageError

LOCAL_THETA = 10000.0  # of Gemma's local layers, where the file does not say
GEMMA_27B_LAYERS = 62  # the one Gemma 3 whose scores are not scaled by its head's size, as llama.cpp tells it apart
ROPE_FREQS = "rope_freqs.weight"
_EXACT = 1e-4  # of a stored rotary factor, which is float32


class Metadata:
    """The fields of a GGUF file; `get` takes keys without the architecture's name in front."""

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        self.file = file
        self._fields = fields
        self.architecture = str(fields["general.architecture"].contents())

    def get(self, key: str, default: Any = None) -> Any:
        return self.whole(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default


def read_config(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> PretrainedConfig:
    """The configuration of the model whose tensors have these `shapes`, by their names in the file.

    `rope_factors`, float32 `[head_dim / 2]`, are what the file divides rotary frequencies by. Raises `CorruptFile`
    for metadata that make no model and `UsageError` for a model that transformers cannot express.
    """
    file = metadata.file
    with damage_named(file, "no usable configuration; download it again"):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        changes = _changes(metadata, shapes, config, rope_factors)
        if "model_type" in changes:
            return _mixtral(config, changes)
        changes = {key: value for key, value in changes.items() if getattr(config, key, None) != value}
        if changes:
            # Layer types follow from the numbers of layers, and are made anew.
            known = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
            config = type(config)(**{**known, **changes})
        return strip_quantization(config)


def _changes(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], config: Any, rope_factors: np.ndarray | None
) -> dict[str, Any]:
    heads = int(metadata.get("attention.head_count"))
    default_size = int(metadata.get("embedding_length")) // heads
    head_size = int(metadata.get("attention.key_length", metadata.get("rope.dimension_count", default_size)))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(metadata.get(key, head_size)) != head_size:
            raise UsageError(
                f"{metadata.file}: {key} is {metadata.get(key)} and a head has {head_size} numbers, which no known "
                "family has; give the model's Hugging Face directory"
            )
    found: dict[str, Any] = {
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "eos_token_id": _ends(metadata, config, shapes["token_embd.weight"][0]),
    }
    if getattr(config, "head_dim", None) not in (head_size, None) or head_size != default_size:
        found["head_dim"] = head_size
    found |= _by_architecture(metadata, shapes, head_size)
    rope = _rope(metadata, head_size, rope_factors)
    if metadata.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base_swa", LOCAL_THETA))}
        rope = {"full_attention": rope, "sliding_attention": local}
    found["rope_parameters"] = rope
    return found


def _by_architecture(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], head_size: int) -> dict[str, Any]:
    """What only some architectures have."""
    layers = int(metadata.get("block_count"))
    if metadata.architecture == "gemma3":
        whole = int(metadata.get("embedding_length")) // int(metadata.get("attention.head_count"))
        window = metadata.get("attention.sliding_window")
        return {
            "query_pre_attn_scalar": whole if layers == GEMMA_27B_LAYERS else head_size,
            "final_logit_softcapping": metadata.get("final_logit_softcapping"),
            **({} if window is None else {"sliding_window": int(window)}),
        }
    experts = int(metadata.get("expert_count", 0))
    if metadata.architecture == "llama" and experts:
        return {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": int(metadata.get("expert_used_count")),
        }
    if metadata.architecture == "qwen3moe":
        dense = [layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" not in shapes]
        return {
            "moe_intermediate_size": int(metadata.get("expert_feed_forward_length")),
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
        }
    if metadata.architecture == "llama":
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_down.bias"}
        # A file that is called mistral gets the window of Mistral's first model, which llama.cpp does not have.
        return {"sliding_window": None, **{key: name in shapes for key, name in biases.items()}}
    return {}


def _ends(metadata: Metadata, config: Any, vocabulary: int) -> int | list[int] | None:
    """The tokens that end an answer: that of the text, and those of a turn and of a message where a file has them."""
    found = getattr(config, "eos_token_id", None)
    ends = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    for key in ("eot", "eom"):
        end = metadata.whole(f"tokenizer.ggml.{key}_token_id")
        if end is not None and int(end) not in ends and 0 <= int(end) < vocabulary:
            ends.append(int(end))
    return ends if len(ends) > 1 else found


def _mixtral(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A mixture has LLaMA's architecture in GGUF files, and transformers takes it for one."""
    shared = ("max_position_embeddings", "num_hidden_layers", "intermediate_size", "hidden_size", "rms_norm_eps",
              "num_attention_heads", "num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id",
              "pad_token_id")  # fmt: skip
    known = {key: getattr(config, key, None) for key in shared}
    return AutoConfig.for_model(changes.pop("model_type"), **{**known, **changes})


def _rope(metadata: Metadata, head_size: int, factors: np.ndarray | None) -> dict[str, Any]:
    """The rotary parameters of a model, or of the global layers of one that has local ones."""
    theta = float(metadata.get("rope.freq_base", LOCAL_THETA))
    if factors is not None:
        return {"rope_theta": theta, **_llama3_rule(metadata.file, theta, head_size, factors)}
    kind = metadata.get("rope.scaling.type", "none")
    # Early files have the factor of linear scaling alone.
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    if metadata.get("rope.scaling.type") is None and factor is not None:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": float(factor)}
    plain = all(metadata.get(f"rope.scaling.{key}", 1.0) == 1.0 for key in ("attn_factor", "yarn_attn_factor"))
    if kind != "yarn" or factor is None or not plain or metadata.get("rope.scaling.yarn_log_multiplier"):
        raise UsageError(
            f"{metadata.file}: rotary scaling '{kind}' with these parameters is not read; give the model's Hugging "
            "Face directory"
        )
    found = {"rope_theta": theta, "rope_type": "yarn", "factor": float(factor)}
    original = metadata.get("rope.scaling.original_context_length")
    if original is not None:
        found["original_max_position_embeddings"] = int(original)
    for key in ("beta_fast", "beta_slow"):
        value = metadata.get(f"rope.scaling.yarn_{key}")
        if value is not None:
            found[key] = float(value)
    return found


def _llama3_rule(file: Path, theta: float, head_size: int, factors: np.ndarray) -> dict[str, Any]:
    """The rule behind LLaMA 3's rotary factors, which a file stores as numbers.

    The rule has a factor, which the slowest frequency shows, and two wavelengths between which it sets in; the models
    that there are differ in the context that both are shares of.
    """
    factor = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    for exponent in range(5, 21):
        original = 1 << exponent
        smooth = np.clip((original / wavelengths - 1.0) / 3.0, 0.0, 1.0)
        rule = 1.0 / ((1.0 - smooth) / factor + smooth)
        if rule.shape == factors.shape and np.allclose(rule, factors, rtol=_EXACT, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise UsageError(
        f"{file}: scaled rotary frequencies ({ROPE_FREQS}) are stored as numbers, and no known rule gives them; "
        "give the model's Hugging Face directory"
    )
