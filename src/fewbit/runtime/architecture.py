"""What a decoder's forward pass needs to know of a model beside its weights, from its transformers configuration.

A family of its own shape is an entry in `_CHANGES`; biases, norms of heads and norms behind a block are found by their
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fewbit.errors import CannotLower

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder.

    `kinds` has an entry per layer: the name of its kind of attention, which decides its rotary positions, and its
    window in positions, or None. `norm_offset` is added to the stored gains of norms. In a mixture, `experts_per_token`
    have weights, which add up to 1 if they are normalized.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str
    kinds: tuple[tuple[str, int | None], ...]
    query_scale: float
    vocabulary: int
    max_positions: int
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    experts_per_token: int = 0
    normalized_experts: bool = True


def describe(config: Any) -> Architecture:
    """The architecture of a model; raises `CannotLower` for families and options that have no steps."""
    if config.model_type not in _CHANGES:
        raise CannotLower(f"models of type '{config.model_type}' have no native steps")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise CannotLower(f"the activation '{activation}' has no native step")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 16 or head_dim > 256:
        raise CannotLower(f"heads of size {head_dim} have no native step: it must be a multiple of 16 up to 256")
    general = Architecture(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[activation],
        kinds=_kinds(config),
        query_scale=head_dim**-0.5,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )
    return _CHANGES[config.model_type](general, config)


def _kinds(config: Any) -> tuple[tuple[str, int | None], ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        # Without a list of kinds all layers are alike.
        types = ["sliding_attention" if window is not None else "full_attention"] * config.num_hidden_layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise CannotLower(f"layers of the kind {min(unknown)} have no native step")
    return tuple((kind, window if kind == "sliding_attention" else None) for kind in types)


def _as_it_is(general: Architecture, config: Any) -> Architecture:
    return general


def _gemma3(general: Architecture, config: Any) -> Architecture:
    caps = ("final_logit_softcapping", "attn_logit_softcapping")
    if any(getattr(config, cap, None) is not None for cap in caps):
        raise CannotLower("soft caps of logits have no native step")
    return replace(
        general,
        query_scale=config.query_pre_attn_scalar**-0.5,
        embedding_scale=config.hidden_size**0.5,
        norm_offset=1.0,
    )


def _mixture(general: Architecture, config: Any) -> Architecture:
    # Mixtral has no choice: its weights are normalized.
    normalized = config.model_type == "mixtral" or config.norm_topk_prob
    return replace(general, experts_per_token=config.num_experts_per_tok, normalized_experts=normalized)


_CHANGES: dict[str, Callable[[Architecture, Any], Architecture]] = {
    "llama": _as_it_is,
    "mistral": _as_it_is,
    "qwen2": _as_it_is,
    "qwen3": _as_it_is,
    "gemma3_text": _gemma3,
    "qwen3_moe": _mixture,
    "mixtral": _mixture,
}
