"""Writes a checkpoint, a GGUF file or any other model as a plain Hugging Face directory that needs no fewbit.

The directory holds decoded weights in one float type under the names that the model's original release has. It is built
under a temporary name and renamed at the end, and memory holds about one tensor.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from fewbit import __version__
from fewbit.checkpoint.artifact import Artifact, is_artifact
from fewbit.checkpoint.decoded import DecodedSource
from fewbit.checkpoint.plain import DTYPES
from fewbit.checkpoint.source import Source, open_source
from fewbit.checkpoint.store import ShardedWriter, disk_errors, write_json
from fewbit.errors import FewbitError, NonFiniteWeights, UsageError
from fewbit.math.rounding import CHUNK_WEIGHTS
from fewbit.models import Experts, find_family
from fewbit.pipeline.progress import Progress, Silent
from fewbit.pipeline.workdir import locked
from fewbit.resident import peak_resident_bytes

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportResult:
    """What was written, as `fewbit export --json` prints it; `notes` say what a plain model does otherwise."""

    output: str
    source: str
    dtype: str
    tensors: int
    weights: int
    bytes: int
    files: int
    notes: list[str]
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    path: str | Path,
    output: str | Path,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the model at `path` (a fewbit checkpoint, or what `quantize` takes) into the new directory `output`.

    Safetensors of `dtype` in files of about `shard_bytes`, configuration, tokenizer, generation configuration and a
    model card. Raises `UsageError` where the output exists or a weight does not fit the type, and other `FewbitError`s
    for damaged files or a full disk; the output appears only when it is complete.
    """
    started = time.monotonic()
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}': choose {', '.join(DTYPES)}")
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists already; choose another output, or remove it")
    source = DecodedSource(Artifact.open(path)) if is_artifact(Path(path)) else open_source(path)
    target = output.resolve()
    built = target.with_name(f".{target.name}.partial")
    with locked(built, "choose another output"):
        _check_space(target, source, DTYPES[dtype], shard_bytes)
        try:
            with disk_errors(built):
                shutil.rmtree(built, ignore_errors=True)
                built.mkdir(parents=True)
                notes = _write(source, built, DTYPES[dtype], shard_bytes, progress or Silent())
                os.replace(built, target)
        finally:
            shutil.rmtree(built, ignore_errors=True)
    files = list(target.glob("*.safetensors"))
    return ExportResult(
        output=str(output),
        source=str(path),
        dtype=dtype,
        tensors=len(source.names()),
        weights=source.weights(),
        bytes=sum(file.stat().st_size for file in files),
        files=len(files),
        notes=notes,
        seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=peak_resident_bytes(),
    )


def _write(source: Source, built: Path, dtype: torch.dtype, shard_bytes: int, progress: Progress) -> list[str]:
    """Everything of the directory; returns the notes of its card."""
    family = find_family(source.config.model_type)
    experts = family.experts if family else None
    names = source.names()
    progress.stage("writing the model", len(names))
    writer = ShardedWriter(built, shard_bytes)
    for name in names:
        writer.add(checkpoint_name(name, experts), _converted(source, name, dtype))
        progress.advance()
    writer.close()
    notes = _notes(source)
    if not _companions(source, built):
        notes.append("The source has no tokenizer, and so has this model.")
    write_json(built / "config.json", plain_config(source.config, dtype))
    (built / "README.md").write_text(_card(source, dtype, notes), encoding="utf-8")
    return notes


def checkpoint_name(name: str, experts: Experts | None) -> str:
    """The name of a tensor in the family's released checkpoints, which every version of transformers reads."""
    for old, new in reversed(experts.renames if experts else ()):
        name = name.replace(new, old)
    return name


def _converted(source: Source, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in its final type, read in slices of rows, since tables are large in float32."""
    shape = source.shape(name)
    if not shape:
        return source.tensor(name).to(dtype)
    plain = torch.empty(shape, dtype=dtype)
    rows = max(1, CHUNK_WEIGHTS * shape[0] // max(1, plain.numel()))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        piece = source.rows(name, start, stop)
        plain[start:stop] = piece
        if bool(torch.isfinite(plain[start:stop]).all()):
            continue
        if bool(torch.isfinite(piece).all()):
            raise UsageError(
                f"{name}: values up to {piece.abs().max().item():.4g} do not fit {str(dtype).removeprefix('torch.')}; "
                "use --dtype bfloat16"
            )
        raise NonFiniteWeights(f"{name} holds NaN or infinity; the source model is damaged")
    return plain


def _companions(source: Source, built: Path) -> bool:
    """Write the files of tokenizer and generation configuration; returns whether the source has a tokenizer."""
    try:
        source.copy_tokenizer(built)
        found = any(built.glob("tokenizer*")) or any(built.glob("*.model"))
    except UsageError:
        found = False
    if not (built / "generation_config.json").exists():
        GenerationConfig.from_model_config(source.config).save_pretrained(built)
    return found


def plain_config(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of a plain model, with the keys of older releases of transformers beside those of this one.

    Before version 5 rotary parameters and the type of the weights had other names, and a reader that misses them takes
    defaults without a word.
    """
    found = config.to_dict()
    for key in ("_name_or_path", "quantization_config"):
        found.pop(key, None)
    found["dtype"] = found["torch_dtype"] = str(dtype).removeprefix("torch.")
    found["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    parameters = found.get("rope_parameters") or {}
    whole = parameters.get("full_attention", parameters)
    if "rope_theta" in whole:
        found["rope_theta"] = whole["rope_theta"]
        scaled = whole.get("rope_type", "default") != "default"
        found["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"} if scaled else None
    if "sliding_attention" in parameters:
        found["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    return found


def _notes(source: Source) -> list[str]:
    if not isinstance(source, DecodedSource):
        return []
    notes = list(source.notes)
    if source.input_bits:
        bits = " or ".join(map(str, source.input_bits))
        notes.append(
            f"fewbit quantizes the inputs of compressed linears to {bits} bits when it runs the checkpoint; here they "
            "keep the model's own type, so answers may differ slightly."
        )
    return notes


def _card(source: Source, dtype: torch.dtype, notes: list[str]) -> str:
    kind = str(dtype).removeprefix("torch.")
    if isinstance(source, DecodedSource):
        inside = source.artifact.inspect()
        stored = sorted({module.spec.format for module in source.artifact.modules.values()})
        bits = inside["bits_per_weight"]
        origin = (
            f"The weights of a checkpoint that fewbit {source.artifact.record['fewbit_version']} compressed "
            f"({', '.join(stored)}; {bits['body']:.3f} bits per weight in the decoder layers, {bits['total']:.3f} over "
            f"everything), decoded and stored as {kind}. They take the space of the original model and have the "
            "accuracy of the compressed one."
        )
    else:
        origin = f"The weights of `{source.path.name}`, stored as {kind}."
    lines = [f"- {note}" for note in notes]
    return "\n".join(
        [
            "---\nlibrary_name: transformers\n---\n",
            f"{origin}\n",
            "Plain safetensors: `AutoModelForCausalLM.from_pretrained` loads them, and fewbit is not needed.\n",
            *lines,
            *([""] if lines else []),
            f"Written by fewbit {__version__} (`fewbit export`).",
            "",
        ]
    )


def _check_space(target: Path, source: Source, dtype: torch.dtype, shard_bytes: int) -> None:
    """Refuse to begin what the disk has no room for; a file is copied once while its header is made."""
    size = source.weights() * dtype.itemsize
    needed = size + min(size, shard_bytes)
    free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
    if free < needed:
        raise FewbitError(
            f"the disk of {target} has {free / 1e6:.0f} MB free and the model needs about {needed / 1e6:.0f} MB; free "
            "some space, write to another disk, or use a smaller --shard-size"
        )
