"""Writes tiny models as GGUF files, the way llama.cpp's converter does, for tests of the reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotary positions for LLaMA."""
    shape = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape))


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """A model's tensors, float32, under llama.cpp's names and in its layout."""
    config, kind = model.config, model.config.model_type
    found = {}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        if kind == "gemma3_text" and module.endswith("norm"):
            value = value + 1
        if module in OUTSIDE:
            found[f"{OUTSIDE[module]}.{suffix}"] = value
            continue
        _, _, layer, place = module.split(".", 3)
        if place == "mlp.experts":
            parts = (
                {"down": value}
                if suffix == "down_proj"
                else dict(zip(("gate", "up"), np.split(value, 2, 1), strict=True))
            )
            for part, matrix in parts.items():
                found[f"blk.{layer}.ffn_{part}_exps.weight"] = np.ascontiguousarray(matrix)
            continue
        behind = "post_attention_norm" if kind == "gemma3_text" else "ffn_norm"
        stored = behind if place == "post_attention_layernorm" else NAMES[place]
        if ARCHITECTURES[kind] == "llama" and stored in ("attn_q", "attn_k"):
            value = interleaved(value, config.num_attention_heads if stored == "attn_q" else config.num_key_value_heads)
        found[f"blk.{layer}.{stored}.{suffix}"] = value
    return found


def write_gguf(
    path: Path,
    model: Any,
    kind: str = "F32",
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
    fields: Callable[[gguf.GGUFWriter], None] | None = None,
    tokenizer: bool = True,
    encode: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Path:
    """Write `model`; matrices in blocks of `kind`, vectors in float32.

    `change` may alter the tensors before that, `fields` write more metadata, and `encode(kind, matrix)` makes blocks
    that the `gguf` package cannot make.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    add_configuration(writer, config)
    if tokenizer:
        add_tokenizer(writer, config.vocab_size)
    if fields is not None:
        fields(writer)
    tensors = gguf_tensors(model)
    if change is not None:
        change(tensors)
    blocks = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        if value.ndim == 1 or kind == "F32" or value.dtype != np.float32:
            writer.add_tensor(name, value)
        else:
            matrix = gguf.quantize(value, blocks) if encode is None else encode(kind, value)
            writer.add_tensor(name, matrix, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_configuration(writer: gguf.GGUFWriter, config: Any) -> None:
    """A model's sizes, as keys of its architecture."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if writer.arch == "llama":
        writer.add_rope_dimension_count(head_size)
        writer.add_vocab_size(config.vocab_size)
    elif writer.arch != "qwen2":
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-level vocabulary: printable ASCII, one merge, an end of text, and unused tokens up to `size`."""
    tokens = ["\u0120", *(chr(code) for code in range(33, 126)), "th", "<|end|>"]
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    kinds = {"<|end|>": gguf.TokenType.CONTROL}
    unused = gguf.TokenType.UNUSED
    writer.add_token_types(
        [kinds.get(token, unused if token.startswith("[unused") else gguf.TokenType.NORMAL) for token in tokens]
    )
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_bos_token_id(tokens.index("<|end|>"))
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")


def logits(model: Any, vocabulary: int = 96) -> torch.Tensor:
    """A model's logits float32 over a fixed text."""
    ids = torch.arange(40)[None] * 7 % vocabulary
    with torch.no_grad():
        return model(ids).logits.float()
