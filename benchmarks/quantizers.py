"""Gives a model's linears the rounding of llama.cpp's quantizer, to be evaluated beside fewbit's.

ggml makes the blocks and decodes them, from the sources that peers.py fetches; which linear has which type follows
llama.cpp's file types. Embeddings and head stay as they are, since it is the decoder layers that are compared.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import nn

from fewbit.checkpoint.source import Source, open_source
from fewbit.environment import multiplies_bfloat16
from fewbit.loading import load_any
from fewbit.models import Family, get_family
from fewbit.pipeline.texts import CalibrationText, calibration_windows, tokens_hash

MIXES = {
    "Q2_K": "Q2_K",
    "IQ2_M": "IQ2_S",
    "Q3_K_M": "Q3_K",
    "IQ3_S": "IQ3_S",
    "IQ4_XS": "IQ4_XS",
    "Q4_K_M": "Q4_K",
}
"""The type that each mix has for most linears; "pure TYPE" is no mix."""
WINDOW = 512
OPTIONS = {"CMAKE_POSITION_INDEPENDENT_CODE": "ON", "GGML_NATIVE": "OFF"}
# Types with blocks of 32 for rows that blocks of 256 do not divide (llama.cpp's tensor_type_fallback).
FALLBACK = {
    **dict.fromkeys(("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
BLOCK = 256  # weights in a block of all types but the fallbacks
OTHER_BITS = 16  # of a weight outside the decoder layers' linears


@dataclass(frozen=True)
class Recipe:
    """A file type of llama.cpp, or "pure TYPE" for one type everywhere.

    Where blocks do not divide the rows, llama.cpp takes a larger type with smaller blocks; `pad` fills the rows up
    with zeros instead, so that the named types are seen, at the price of storing the padding.
    """

    mix: str
    pad: bool = False

    @property
    def pure(self) -> bool:
        return self.mix.startswith("pure ")


def mixed_type(mix: str, role: str, layer: int, layers: int, queries_per_key: int) -> str:
    """The type of the linear `role` (q_proj, ...) in `layer` of `layers`, given an importance matrix.

    As llama_tensor_get_type_impl in llama.cpp's llama-quant.cpp has it for dense LLaMA and Qwen2 models of less than
    80 layers. Raises `ValueError` for an unknown mix.
    """
    eighth = layers // 8
    # use_more_bits: the first and the last layers, and every third between them.
    favoured = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if mix.startswith("pure "):
        return mix.removeprefix("pure ")
    if mix not in MIXES:
        raise ValueError(f"no mix '{mix}': known are {', '.join(MIXES)} and 'pure TYPE'")
    shared = queries_per_key >= 4  # few value heads, which take larger types
    apart = {
        "Q2_K": {"v_proj": "Q4_K" if shared else "Q3_K", "o_proj": "Q3_K", "down_proj": "Q3_K"},
        "IQ2_M": {
            "v_proj": "Q4_K" if shared else "IQ3_S",
            "o_proj": "IQ3_S",
            "down_proj": "IQ3_S" if layer < eighth else "IQ2_S",
        },
        "Q3_K_M": {
            "v_proj": "Q5_K" if layer < 2 else "Q4_K",
            "o_proj": "Q4_K",
            "down_proj": "Q5_K" if layer < layers // 16 else "Q4_K",
        },
        "IQ3_S": {"v_proj": "Q4_K" if shared else "IQ3_S"},
        "IQ4_XS": {"v_proj": "Q5_K" if shared else "IQ4_XS"},
        "Q4_K_M": dict.fromkeys(("v_proj", "down_proj"), "Q6_K" if favoured else "Q4_K"),
    }
    return apart[mix].get(role, MIXES[mix])


def fitting_type(kind: str, cols: int) -> str:
    """`kind`, or what llama.cpp takes instead where its blocks do not divide rows of `cols` weights."""
    candidates = [kind, *([FALLBACK[kind]] if kind in FALLBACK else []), "F16"]
    return next(name for name in candidates if cols % GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] == 0)


@functools.cache
def library() -> ctypes.CDLL:
    """ggml's quantizers, built on first use."""
    found = ctypes.CDLL(str(peers.build_target("quantize", "quantize", OPTIONS) / "quantize.so"))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.quantize_rows.argtypes = [ctypes.c_int, pointer, count, count, pointer, ctypes.c_int, pointer, pointer]
    found.quantize_rows.restype = ctypes.c_size_t
    return found


def quantize_rows(kind: str, weights: torch.Tensor, importance: torch.Tensor | None) -> tuple[np.ndarray, torch.Tensor]:
    """ggml's blocks, uint8 `[N, bytes of a row]`, and what they decode to, float32 `[N, K]`.

    `weights` is float32 `[N, K]` and `importance` float32 `[K]`. Raises `ValueError` where blocks do not divide K.
    """
    rows, cols = weights.shape
    weights = weights.float().contiguous()
    importance = None if importance is None else importance.float().contiguous()
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = np.zeros((rows, cols // block * size), dtype=np.uint8)
    decoded = torch.empty(rows, cols)
    written = library().quantize_rows(
        GGMLQuantizationType[kind].value,
        weights.data_ptr(),
        rows,
        cols,
        None if importance is None else importance.data_ptr(),
        torch.get_num_threads(),
        blocks.ctypes.data,
        decoded.data_ptr(),
    )
    if written != blocks.nbytes:
        raise ValueError(f"ggml makes no valid {kind} of rows of {cols} weights, which have blocks of {block}")
    return blocks, decoded


def padded(values: torch.Tensor, block: int) -> torch.Tensor:
    """`values` with as many zeros after them as make `block` divide the last dimension.

    Instead of zeros, a mirror image of the row would change the error of the columns beside it by a few percent.
    """
    return nn.functional.pad(values, (0, -values.shape[-1] % block))


def linears(family: Family, layers: int) -> Iterator[tuple[int, str]]:
    """The layer and the full name of every linear in the decoder layers."""
    for layer in range(layers):
        for shared in family.inputs:
            for name in shared.linears:
                yield layer, f"{family.layers}.{layer}.{name}"


def input_widths(source: Source) -> set[int]:
    """How many inputs the linears of the decoder layers have."""
    config = source.config
    return {
        source.tensor(f"{name}.weight").shape[1]
        for layer, name in linears(get_family(config.model_type), config.num_hidden_layers)
        if layer == 0
    }


def fitting(recipes: dict[str, Recipe], source: Source) -> list[str]:
    """The names of recipes that make sense for a model.

    Padding is for rows that blocks do not divide; there, one type alone would be another type without it.
    """
    divided = all(cols % BLOCK == 0 for cols in input_widths(source))
    return [name for name, recipe in recipes.items() if (not recipe.pad if divided else recipe.pad or not recipe.pure)]


@torch.no_grad()
def requantize(model: nn.Module, source: Source, recipe: Recipe, importance: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Leave the linears of the layers of `model`, which is that of `source`, as the recipe has them; in place.

    Returns bits per weight, exactly, and how many linears have which type.
    """
    config, family = source.config, get_family(source.config.model_type)
    queries_per_key = config.num_attention_heads // config.num_key_value_heads
    types: Counter[str] = Counter()
    weights = size = unpadded = 0
    for layer, name in linears(family, config.num_hidden_layers):
        exact = source.tensor(f"{name}.weight")
        cols = exact.shape[1]
        role = name.rpartition(".")[2]
        kind = mixed_type(recipe.mix, role, layer, config.num_hidden_layers, queries_per_key)
        if not recipe.pad:
            kind = fitting_type(kind, cols)
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        blocks, decoded = quantize_rows(kind, padded(exact, block), padded(importance[name], block))
        linear: Any = model.get_submodule(name)
        linear.weight = nn.Parameter(decoded[:, :cols].to(linear.weight.dtype), requires_grad=False)
        types[kind] += 1
        weights += exact.numel()
        size += blocks.nbytes
        unpadded += exact.numel() * block_bytes / block
    others = sum(parameter.numel() for parameter in model.parameters()) - weights
    bits = {
        "body": 8 * size / weights,
        "body_without_padding": 8 * unpadded / weights,
        "total": (8 * size + OTHER_BITS * others) / (weights + others),
    }
    return {"bits_per_weight": bits, "types": dict(sorted(types.items()))}


@torch.inference_mode()
def importance_matrix(model: nn.Module, family: Family, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean square of every input channel of every linear in the layers, float32 `[K]`, as llama-imatrix takes it.

    `windows` are token ids int64 `[n, window]`; only the layers run.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).float().square().sum(0).double()
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    layers = len(model.get_submodule(family.layers))
    names = [name for _, name in linears(family, layers)]
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        base = model.get_submodule(family.layers.rpartition(".")[0])
        for window in windows:
            base(input_ids=window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


def kept_importance_matrix(reference: Path, files: Sequence[Path], tokens: int) -> dict[str, torch.Tensor]:
    """The importance matrix of the model in `reference` on fewbit's calibration windows; kept beside the model.

    The model runs as fewbit's own calibration runs it, in bfloat16 where the processor multiplies that faster.
    """
    source = open_source(reference)
    windows, _ = calibration_windows(source, [CalibrationText(file) for file in files], tokens, WINDOW)
    target = reference.with_name(f"{reference.name}-imatrix-{tokens_hash(windows)[:8]}.safetensors")
    if not target.exists():
        model, _ = load_any(reference, torch.bfloat16 if multiplies_bfloat16() else torch.float32)
        found = importance_matrix(model, get_family(source.config.model_type), windows)
        unfinished = target.with_suffix(".part")
        save_file(found, unfinished)
        unfinished.replace(target)
    return load_file(target)
