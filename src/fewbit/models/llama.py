"""LLaMA 2/3, SmolLM and Mistral: pre-norm decoders without projection biases."""

from fewbit.models.base import LLAMA_INPUTS, Family, register

LLAMA = register(
    Family(
        model_types=("llama", "mistral"),
        inputs=LLAMA_INPUTS,
        gguf_arch=("llama",),
        gguf_permuted=True,
    )
)
