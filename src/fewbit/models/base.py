"""What the pipeline has to know about a model family, and the table of families.

A family says where its linears, norms, embedding and head are, which linears read the same input and
which norm feeds them. Everything else comes from the model's own code in transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewbit.errors import UsageError

OUTPUT_ROTATION = "rotation"
"""The name of the final norm's further parameter, a matrix `[H, H]` that its output is multiplied with."""


@dataclass(frozen=True)
class SharedInput:
    """Linears of one decoder layer that read the same activations (names relative to the layer).

    `norm` is the RMSNorm whose output they read, None off the residual stream, and `routers` are matrices that read
    it too and stay as they are. `writes_residual` holds where the outputs are added to the residual stream.

    Off the residual stream, `scaled_by` is the linear whose outputs, each times something, are these inputs, channel
    by channel; `values` is the linear whose outputs, averaged over positions and head by head, are these inputs.
    """

    linears: tuple[str, ...]
    norm: str | None = None
    routers: tuple[str, ...] = ()
    writes_residual: bool = False
    scaled_by: str | None = None
    values: str | None = None


@dataclass(frozen=True)
class Place:
    """A module of a decoder layer: the layer's name and number, the name within it as in `Family.inputs`, and the
    number that stands for the `*` of an expert."""

    prefix: str
    layer: int
    name: str
    expert: str | None = None

    def beside(self, name: str) -> str:
        """The full name of another module of the same layer and expert."""
        return f"{self.prefix}.{name.replace('*', self.expert or '*')}"


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, which transformers holds as two three-dimensional parameters of one module.

    `module` is that module relative to the layer; it has `gate_up_proj [E, 2 I, H]`, gates first, and
    `down_proj [E, H, I]`. Here every expert is three linears, `<module>.<expert>.gate_proj`, `up_proj` and
    `down_proj`, whichever way a checkpoint stores them; `renames` turn the names of checkpoints into these.
    """

    module: str = "mlp.experts"
    renames: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """Where things are in a family's transformers implementation.

    In the names of `inputs` a `*` stands for the number of an expert. `gguf_arch` is the architecture name in
    GGUF files; `gguf_permuted` says that query and key rows are stored there in the interleaved rotary order, and
    `gguf_norms_plus_one` that norms are stored there with the 1 that the family's code adds to them.
    """

    model_types: tuple[str, ...]
    inputs: tuple[SharedInput, ...]
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    experts: Experts | None = None
    gguf_arch: tuple[str, ...] = ()
    gguf_permuted: bool = False
    gguf_norms_plus_one: bool = False

    def place(self, module: str) -> Place | None:
        """Where a module of a decoder layer is; None for everything else."""
        match = re.fullmatch(rf"({re.escape(self.layers)}\.(\d+))\.(.+)", module)
        if match is None:
            return None
        general, expert = match[3], None
        if self.experts is not None:
            within = re.fullmatch(rf"({re.escape(self.experts.module)})\.(\d+)\.(.+)", general)
            if within:
                general, expert = f"{within[1]}.*.{within[3]}", within[2]
        return Place(match[1], int(match[2]), general, expert)


LLAMA_INPUTS = (
    SharedInput(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
    SharedInput(("self_attn.o_proj",), writes_residual=True, values="self_attn.v_proj"),
    SharedInput(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    SharedInput(("mlp.down_proj",), writes_residual=True, scaled_by="mlp.up_proj"),
)

MIXTURE_INPUTS = (
    *LLAMA_INPUTS[:2],
    SharedInput(
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), norm="post_attention_layernorm", routers=("mlp.gate",)
    ),
    SharedInput(("mlp.experts.*.down_proj",), writes_residual=True, scaled_by="mlp.experts.*.up_proj"),
)

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Enter a family into the table under each of its transformers model types."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def get_family(model_type: str) -> Family:
    """The family of a transformers `model_type`; raises `UsageError` with the known ones."""
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UsageError(
            f"model type '{model_type}' is not known: known are {known}; "
            "a new family is one short file in fewbit/models (docs/add-a-model.md)"
        )
    return _FAMILIES[model_type]


def find_family(model_type: str) -> Family | None:
    """The family of a transformers `model_type`, or None."""
    return _FAMILIES.get(model_type)


def families() -> tuple[Family, ...]:
    """Every registered family once."""
    return tuple(dict.fromkeys(_FAMILIES.values()))
