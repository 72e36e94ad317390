"""Joins the shards of a run into a finished checkpoint directory.

The directory is built under a temporary name and renamed at the end, so that an output that exists is
complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fewbit import __version__
from fewbit.checkpoint.artifact import QuantizedModule, modules_to_json
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import FORMAT_VERSION, ShardedWriter, read_tensors, tensors_hash, write_json
from fewbit.errors import CorruptFile, NonFiniteWeights
from fewbit.pipeline.plan import Plan, PlannedTensor


def finish(source: Source, plan: Plan, work: Path, output: Path) -> None:
    """Write the checkpoint and put it in its place; an existing `output` is replaced."""
    built = work / "output"
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir()
    source.copy_tokenizer(built)
    writer = ShardedWriter(built)
    records = [_add(source, plan, tensor, work, writer) for tensor in plan.tensors]
    writer.close()
    write_json(built / "config.json", _config(source, plan))
    write_json(
        built / "fewbit.json",
        {
            "fewbit_version": __version__,
            "format_version": FORMAT_VERSION,
            "options": plan.options,
            "source_fingerprint": plan.fingerprint,
            "tensors": records,
        },
    )
    (built / "README.md").write_text(_card(plan))
    if output.exists():
        shutil.rmtree(output)
    os.replace(built, output)


def _add(source: Source, plan: Plan, tensor: PlannedTensor, work: Path, writer: ShardedWriter) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": tensor.name,
        "kind": tensor.kind,
        "shape": list(tensor.shape),
        "weights": tensor.weights,
        "bytes": tensor.bytes,
        "format": tensor.spec.format if tensor.spec else "",
        "bits": tensor.spec.bits if tensor.spec else 0,
    }
    if tensor.spec is None:
        plain = source.tensor(tensor.name).to(getattr(torch, tensor.dtype))
        if not torch.isfinite(plain).all():
            raise NonFiniteWeights(f"{tensor.name} holds NaN or infinity; the source model is damaged")
        stored = {tensor.name: plain}
        record |= {"reason": tensor.reason, "dtype": tensor.dtype, "sha256": tensors_hash(stored)}
    else:
        stored, metadata = read_tensors(work / "shards" / f"{tensor.module}.safetensors")
        if metadata.get("plan") != plan.identity:
            raise CorruptFile(f"the shard of {tensor.name} belongs to another plan; start again with --fresh")
        parts = {name.removeprefix(f"{tensor.module}."): part for name, part in stored.items()}
        record |= {"relative_error": float(metadata["error"]), "sha256": tensors_hash(parts)}
    for name, value in stored.items():
        writer.add(name, value)
    return record


def _config(source: Source, plan: Plan) -> dict[str, Any]:
    modules = [QuantizedModule(t.module, t.spec, t.kind) for t in plan.quantized if t.spec is not None]
    config = source.config.to_dict()
    config["dtype"] = "bfloat16"
    config["tie_word_embeddings"] = source.tied_embeddings
    config["quantization_config"] = {
        "quant_method": "fewbit",
        "format_version": FORMAT_VERSION,
        "modules": modules_to_json(modules),
    }
    return config


def _card(plan: Plan) -> str:
    bits = plan.bits_per_weight("body")
    return (
        "**Load this with `fewbit.load(path)` (or `import fewbit` before `from_pretrained`); without fewbit, "
        "transformers starts the model with random weights.**\n\n"
        f"Compressed by fewbit {__version__} from a `{plan.model_type}` model: code {plan.options['code']}, "
        f"{bits:.3f} bits per weight in the decoder layers, {plan.bits_per_weight():.3f} over everything. "
        "`fewbit.json` lists every tensor with its error.\n"
    )
