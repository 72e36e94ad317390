"""Qwen3 with a mixture of experts in every layer, or in all but some."""

from fewbit.models.base import LLAMA_INPUTS, MIXTURE_INPUTS, Experts, Family, register

QWEN_MOE = register(
    Family(
        model_types=("qwen3_moe",),
        inputs=(*MIXTURE_INPUTS, *LLAMA_INPUTS[2:]),
        experts=Experts(),
        gguf_arch=("qwen3moe",),
    )
)
