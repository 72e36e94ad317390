"""One tensor's rounding as a function of files, so that any process on any machine may do it.

A job reads the plan, the source's rows and what calibration made of their inputs, and writes a shard. What it
writes depends on nothing else: not on the executor, not on the number of threads.
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.damage import parse_json
from fewbit.checkpoint.equivalent import equivalent
from fewbit.checkpoint.source import Source, SourceRows, open_source
from fewbit.checkpoint.store import read_tensors, tensors_hash, write_tensors
from fewbit.errors import CorruptFile, NonFiniteWeights
from fewbit.formats import TensorSpec, get_format
from fewbit.formats.twinquant import branch_axes
from fewbit.math.hadamard import pack_signs, random_signs, rotate, unrotate
from fewbit.math.lowrank import INITS
from fewbit.math.rounding import decoded_error, one_thread
from fewbit.pipeline.plan import Plan, PlannedTensor

PLAN_FILE = "plan.json"
BRANCHES = "branches.safetensors"


@dataclass(frozen=True)
class RoundJob:
    """Round the tensor `name` of the plan in `work`; `calibration` is a file in `work` with what the format made of the
    input's statistics, or "" for plain rounding.

    `facts` are recorded with the result.
    """

    work: str
    name: str
    calibration: str = ""
    facts: tuple[tuple[str, float], ...] = ()


@functools.lru_cache(maxsize=1)
def _plan(path: Path, modified: int) -> tuple[Plan, dict[str, PlannedTensor], Source]:
    plan = Plan.load(path)
    source = equivalent(open_source(plan.source), path.parent)
    return plan, {tensor.name: tensor for tensor in plan.quantized}, source


def tensor_signs(tensor: PlannedTensor) -> torch.Tensor | None:
    """The signs of a planned tensor's inputs, float32 `[K]`; None where its format does not rotate."""
    assert tensor.spec is not None
    return random_signs(tensor.spec.cols, tensor.signs_seed) if tensor.spec.block > 1 else None


def shard_path(work: Path, tensor: PlannedTensor) -> Path:
    return work / "shards" / f"{tensor.module}.safetensors"


@torch.no_grad()
def round_tensor(job: RoundJob) -> dict[str, Any]:
    """Write the shard of a job; returns the line that the log gets. Raises `NonFiniteWeights` for NaN or infinity."""
    started = time.monotonic()
    work = Path(job.work)
    path = work / PLAN_FILE
    plan, tensors, source = _plan(path, path.stat().st_mtime_ns)
    tensor = tensors[job.name]
    spec = tensor.spec
    assert spec is not None
    calibration = read_tensors(work / job.calibration)[0] if job.calibration else {}
    signs = tensor_signs(tensor)
    rows = SourceRows(source, tensor.name)
    try:
        if spec.rank and (work / BRANCHES).exists():
            calibration["directions"] = read_tensors(work / BRANCHES)[0][tensor.module]
        elif spec.rank and plan.options["init"] != INITS[0] and calibration and spec.format == "twinquant":
            calibration["directions"] = _directions(rows, spec, signs, calibration["hessian"], plan.options["init"])
        quantized = get_format(spec.format).quantize(rows, spec, signs, calibration)
    except NonFiniteWeights as error:
        raise NonFiniteWeights(f"{tensor.name} holds NaN or infinity; the source model is damaged") from error
    parts = {f"{tensor.module}.{name}": part for name, part in quantized.parts.items()}
    if signs is not None:
        parts[f"{tensor.module}.signs"] = pack_signs(signs)
    facts = {"relative_error": quantized.relative_error, **dict(job.facts)}
    write_shard(work, plan, tensor, parts, facts)
    return {
        "tensor": tensor.name,
        "format": spec.format,
        "bits_per_weight": round(tensor.bits_per_weight, 4),
        **{key: float(f"{value:.6g}") for key, value in facts.items()},
        "seconds": round(time.monotonic() - started, 3),
    }


def _directions(
    rows: SourceRows, spec: TensorSpec, signs: torch.Tensor | None, hessian: torch.Tensor, init: str
) -> torch.Tensor:
    """Where the branch of a weight begins that no learning has begun, float32 `[r, K]`."""
    weight = rows[0 : spec.rows].float()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteWeights("a weight is not finite")
    with one_thread():
        return branch_axes(weight if signs is None else rotate(weight, signs, spec.block), spec.rank, hessian, init)


def write_shard(
    work: Path, plan: Plan, tensor: PlannedTensor, parts: dict[str, torch.Tensor], facts: dict[str, float]
) -> None:
    """Write a shard; `facts` are what fewbit.json tells of the tensor."""
    metadata = {"plan": plan.identity, "facts": json.dumps(facts), "sha256": tensors_hash(parts)}
    write_tensors(shard_path(work, tensor), parts, metadata)


def relative_error(source: Source, tensor: PlannedTensor, parts: dict[str, torch.Tensor]) -> float:
    """|W - W^|^2 / |W|^2 of stored parts."""
    spec = tensor.spec
    assert spec is not None
    rows = SourceRows(source, tensor.name)
    lost, energy = decoded_error(get_format(spec.format), parts, spec, rows, tensor_signs(tensor))
    return lost / energy if energy > 0.0 else 0.0


@dataclass(frozen=True)
class Shard:
    """What a shard holds: the stored parts by their short names, and the facts about them."""

    parts: dict[str, torch.Tensor]
    facts: dict[str, float]

    def weight(self, tensor: PlannedTensor) -> torch.Tensor:
        """`W`, float32 `[N, K]`, on the inputs' own axes."""
        assert tensor.spec is not None
        values = get_format(tensor.spec.format).dequantize(self.parts, tensor.spec)
        signs = tensor_signs(tensor)
        return values if signs is None else unrotate(values, signs, tensor.spec.block)


def read_shard(work: Path, plan: Plan, tensor: PlannedTensor) -> Shard | None:
    """The shard of a tensor, or None where there is none that this plan made and that is whole."""
    path = shard_path(work, tensor)
    if not path.exists():
        return None
    try:
        parts, metadata = read_tensors(path)
        facts = parse_json(metadata.get("facts", ""), path)
    except CorruptFile:
        return None
    if not isinstance(facts, dict) or not all(type(fact) in (int, float) for fact in facts.values()):
        return None
    if metadata.get("plan") != plan.identity or metadata.get("sha256") != tensors_hash(parts):
        return None
    short = {name.removeprefix(f"{tensor.module}."): part for name, part in parts.items()}
    return Shard(short, facts)
