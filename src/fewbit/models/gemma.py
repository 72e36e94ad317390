"""Gemma 3, text only: norms before and behind each block, local and global layers, scaled embeddings.

Its norms multiply with 1 plus what is stored, and those behind a block do not commute with a turn of the residual
stream; so no norm is named here and nothing is folded into one.
"""

from fewbit.models.base import Family, SharedInput, register

GEMMA = register(
    Family(
        model_types=("gemma3_text",),
        inputs=(
            SharedInput(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            SharedInput(("self_attn.o_proj",), writes_residual=True, values="self_attn.v_proj"),
            SharedInput(("mlp.gate_proj", "mlp.up_proj")),
            SharedInput(("mlp.down_proj",), writes_residual=True, scaled_by="mlp.up_proj"),
        ),
        gguf_arch=("gemma3",),
        gguf_norms_plus_one=True,
    )
)
