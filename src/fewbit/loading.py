"""Gives a fewbit checkpoint back as a transformers model.

The packed tensors stay packed; this is the documented way in, because the format is sure to be registered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit.checkpoint.artifact import Artifact, is_artifact
from fewbit.checkpoint.damage import damage_named, tried
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import CorruptFile


def load(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load a fewbit checkpoint; returns a transformers model in evaluation mode and its tokenizer.

    `path` is a checkpoint directory; `dtype` is that of activations and unquantized parameters. Raises
    `UsageError` for another kind of directory and `CorruptFile` for a damaged one.
    """
    artifact = Artifact.open(path)
    for module in artifact.modules.values():
        for part in module.layout():
            if f"{module.name}.{part}" not in artifact.files:
                raise CorruptFile(f"{path} lacks the tensor {module.name}.{part}; copy the checkpoint again")
    artifact.check_config()
    with damage_named(artifact.path, "copy the checkpoint again"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(artifact.path), dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    model, loading = loaded
    # transformers would fill it with random numbers.
    if lost := {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}:
        raise CorruptFile(f"{path} lacks the tensor {min(lost)}, or it has another shape; copy the checkpoint again")
    with damage_named(artifact.path, "copy the tokenizer's files from the original model"):
        tokenizer = tried(AutoTokenizer.from_pretrained(str(artifact.path), trust_remote_code=False))
    return model.eval(), tokenizer


def load_any(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load a fewbit checkpoint or a full-precision model (directory, hub id, `.gguf`); model and tokenizer."""
    if is_artifact(Path(path)):
        return load(path, dtype)
    source = open_source(path)
    return load_plain(source, dtype), source.tokenizer()
