"""Mixtral: LLaMA's attention in front of a mixture of experts."""

from fewbit.models.base import MIXTURE_INPUTS, Experts, Family, register

MIXTRAL = register(
    Family(
        model_types=("mixtral",),
        inputs=MIXTURE_INPUTS,
        experts=Experts(
            renames=(
                (".block_sparse_moe.", ".mlp."),
                (".w1.weight", ".gate_proj.weight"),
                (".w3.weight", ".up_proj.weight"),
                (".w2.weight", ".down_proj.weight"),
            )
        ),
        gguf_arch=("llama",),
        gguf_permuted=True,
    )
)
