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
from fewbit.checkpoint.artifact import Artifact, QuantizedModule, modules_to_json
from fewbit.checkpoint.damage import read_json
from fewbit.checkpoint.equivalent import TRANSFORM, equivalent
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import (
    FORMAT_VERSION,
    IMPORT_FIRST,
    RECORD,
    ShardedWriter,
    tensors_hash,
    write_json,
)
from fewbit.errors import CorruptFile, NonFiniteWeights, UsageError
from fewbit.math.rounding import CHUNK_WEIGHTS
from fewbit.pipeline.jobs import read_shard, shard_path
from fewbit.pipeline.learn import REPORT as LEARNED
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.progress import Progress
from fewbit.pipeline.tune import TUNED, tuning_result


def finish(source: Source, plan: Plan, work: Path, output: Path, progress: Progress) -> list[dict[str, Any]]:
    """Write the checkpoint, check it against the source and put it in its place; an existing `output` is replaced.

    Returns what `fewbit.json` records of each tensor. Raises `CorruptFile` where a tensor does not decode to what
    was recorded of it.
    """
    # A link keeps its place; what it leads to is replaced.
    output = output.resolve()
    built = output.with_name(f".{output.name}.partial")
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    try:
        source.copy_tokenizer(built)
    except UsageError as error:
        # Rounding to nearest needs none.
        progress.note(f"the checkpoint has no tokenizer: {error}")
    changed = equivalent(source, work)
    if (work / TRANSFORM).exists():
        shutil.copyfile(work / TRANSFORM, built / TRANSFORM)
    writer = ShardedWriter(built)
    progress.stage("writing the checkpoint", len(plan.tensors))
    records = []
    tuned, report = tuning_result(work)
    for tensor in plan.tensors:
        records.append(_add(changed, plan, tensor, work, tuned, writer))
        progress.advance()
    writer.close()
    write_json(built / "config.json", _config(changed, plan))
    write_json(
        built / RECORD,
        {
            "fewbit_version": __version__,
            "format_version": FORMAT_VERSION,
            "options": plan.options,
            "source_fingerprint": plan.fingerprint,
            "tensors": records,
            **({"tuning": report} if report else {}),
            **({"learning": read_json(work / LEARNED, "delete it and run again")} if (work / LEARNED).exists() else {}),
        },
    )
    (built / "README.md").write_text(_card(plan))
    _verify(source, built, len(records), progress)
    _replace(built, output)
    return records


def _verify(source: Source, built: Path, tensors: int, progress: Progress) -> None:
    """Decode everything that was written and compare its error with the one recorded while rounding."""
    progress.stage("checking the checkpoint", tensors)
    for name, problem in Artifact.open(built).verify(source):
        if problem:
            raise CorruptFile(f"{built}: {name}: {problem}; check the disk and run again")
        progress.advance()


def _replace(built: Path, output: Path) -> None:
    """Give the finished directory its name; what stood there before is gone only when that is done."""
    old = built.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(built, output)
    shutil.rmtree(old, ignore_errors=True)


def _add(
    source: Source,
    plan: Plan,
    tensor: PlannedTensor,
    work: Path,
    tuned: dict[str, torch.Tensor],
    writer: ShardedWriter,
) -> dict[str, Any]:
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
        plain = tuned[tensor.name].to(getattr(torch, tensor.dtype)) if tensor.name in tuned else _plain(source, tensor)
        if not torch.isfinite(plain).all():
            raise NonFiniteWeights(f"{tensor.name} holds NaN or infinity; the source model is damaged")
        stored = {tensor.name: plain}
        record |= {"reason": tensor.reason, "dtype": tensor.dtype, "sha256": tensors_hash(stored)}
    else:
        place = work / TUNED if tuned and tensor.kind == "body" else work
        shard = read_shard(place, plan, tensor)
        if shard is None:
            raise CorruptFile(f"{shard_path(place, tensor)} is missing or damaged; start again with --fresh")
        stored = {f"{tensor.module}.{name}": part for name, part in shard.parts.items()}
        record |= {**shard.facts, "sha256": tensors_hash(shard.parts)}
    for name, value in stored.items():
        writer.add(name, value)
    return record


def _plain(source: Source, tensor: PlannedTensor) -> torch.Tensor:
    """An unquantized tensor in the dtype it is stored in, read in slices, since tables are large."""
    dtype = getattr(torch, tensor.dtype)
    if len(tensor.shape) == 1:
        return source.tensor(tensor.name).to(dtype)
    plain = torch.empty(tensor.shape, dtype=dtype)
    rows = max(1, CHUNK_WEIGHTS * tensor.shape[0] // tensor.weights)
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        plain[start:stop] = source.rows(tensor.name, start, stop)
    return plain


def _config(source: Source, plan: Plan) -> dict[str, Any]:
    modules = [QuantizedModule(t.module, t.spec, t.kind) for t in plan.quantized if t.spec is not None]
    config = source.config.to_dict()
    # Where the model was on this machine is nobody's business.
    config.pop("_name_or_path", None)
    config["dtype"] = "bfloat16"
    config["tie_word_embeddings"] = source.tied_embeddings
    config["transformers_weights"] = IMPORT_FIRST
    config["quantization_config"] = {
        "quant_method": "fewbit",
        "format_version": FORMAT_VERSION,
        "requires": f"fewbit>={__version__}",
        "modules": modules_to_json(modules),
        **({"rotated_output": True} if source.rotated_tie else {}),
    }
    return config


def _named(plan: Plan) -> str:
    options = plan.options
    if options["format"] == "twinquant":
        return f"twinquant of rank {options['rank']}, inputs in {options['act_bits']} bits"
    return f"code {options['code']}"


def _card(plan: Plan) -> str:
    bits = plan.bits_per_weight("body")
    return (
        "**Load this with `fewbit.load(path)`, or `import fewbit` before `from_pretrained`; without fewbit, "
        f"transformers asks for `{IMPORT_FIRST}`, a file that is not there.**\n\n"
        f"Compressed by fewbit {__version__} from a `{plan.model_type}` model: {_named(plan)}, "
        f"{bits:.3f} bits per weight in the decoder layers, {plan.bits_per_weight():.3f} over everything. "
        "`fewbit.json` lists every tensor with its error.\n"
    )
