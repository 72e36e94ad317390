"""Qwen2, Qwen2.5 (biases on q/k/v) and Qwen3 (norms on the heads of q and k)."""

from fewbit.models.base import LLAMA_INPUTS, Family, register

QWEN = register(
    Family(
        model_types=("qwen2", "qwen3"),
        inputs=LLAMA_INPUTS,
        gguf_arch=("qwen2", "qwen3"),
    )
)
