"""The full models that everything is measured against: off the quantization grid, and what they predict, kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fewbit.assets import default_cache_dir, fetch_model
from fewbit.checkpoint.source import open_source
from fewbit.evaluate import windows, write_off_grid
from fewbit.loading import load_any
from fewbit.models import get_family
from fewbit.pipeline.texts import tokens_hash


def reference_dir(model: str, seed: int) -> Path:
    """The off-grid form of a model, made once and kept in the cache."""
    directory = default_cache_dir() / "off-grid" / f"{model}-{seed}"
    if not (directory / "config.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write_off_grid(fetch_model(model), directory, seed=seed)
    return directory


@torch.inference_mode()
def kept_logits(reference: Path, text: str, window: int, tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The float32 logits of the model in `reference`, as a function of a window of `text`.

    The layers run once per text: what the head reads is kept beside the model (4 bytes per token and channel), and
    the function is the head alone. It knows no other token ids than the windows'.
    """
    source = open_source(reference)
    family = get_family(source.config.model_type)
    cuts = windows(source.tokenizer(), text, window, tokens)
    target = reference.with_name(f"{reference.name}-hidden-{tokens_hash(cuts)[:8]}.safetensors")
    if not target.exists():
        model, _ = load_any(reference, torch.float32)
        base = model.get_submodule(family.layers.rpartition(".")[0])
        hidden = [base(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in cuts]
        unfinished = target.with_suffix(".part")
        save_file({"hidden": torch.stack(hidden)}, unfinished)
        unfinished.replace(target)
    hidden_of = dict(zip(map(tuple, cuts.tolist()), load_file(target)["hidden"], strict=True))
    head = source.tensor(f"{family.embed if source.tied_embeddings else family.head}.weight").float()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_of[tuple(ids[0].tolist())], head)[None]

    return logits
