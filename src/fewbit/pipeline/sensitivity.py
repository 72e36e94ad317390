"""Measures what rounding each group of tensors costs alone, in divergence from the full model.

The model is rounded once with few tokens, every group apart from the others. Then the full model runs over a few
windows, one layer in memory; at each group a copy of the stream branches off that has this group rounded and
everything else in full, and at the end every branch's predictions are compared with the full model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.damage import read_json
from fewbit.checkpoint.source import Source, SourceRows
from fewbit.checkpoint.store import write_json
from fewbit.errors import CorruptFile
from fewbit.models import get_family
from fewbit.pipeline.batches import BatchFiles
from fewbit.pipeline.calibrate import LayerStream
from fewbit.pipeline.jobs import read_shard, shard_path
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.progress import Progress
from fewbit.pipeline.teacher import Divergence

WINDOWS = 2  # windows on which branches are compared
SENSITIVITY = "sensitivity.json"


class Sensitivities:
    """The branches of one model; `plan` is the uniform plan that `work` holds the shards of."""

    def __init__(self, source: Source, plan: Plan, windows: torch.Tensor, work: Path, progress: Progress) -> None:
        self.source = source
        self.plan = plan
        self.work = work
        self.progress = progress
        self.family = get_family(plan.model_type)
        dtype = getattr(torch, plan.options["calib_dtype"])
        self.stream = LayerStream(source, self.family, windows[:WINDOWS], dtype, WINDOWS)
        self.branches = BatchFiles(work / "branches")
        self.units: dict[str, list[PlannedTensor]] = {}
        for tensor in plan.quantized:
            self.units.setdefault(tensor.unit, []).append(tensor)
        self.numbers = {unit: number + 1 for number, unit in enumerate(self.units)}

    def measure(self) -> dict[str, float]:
        """Mean divergence in nats that each unit costs; found again in a file where it was measured before."""
        path = self.work / SENSITIVITY
        if path.exists():
            return {unit: float(value) for unit, value in read_json(path, "delete it and run again").items()}
        self._embed()
        self.progress.stage("measuring sensitivities", len(self.stream))
        latest = self.branches.latest()
        assert latest is not None
        self.progress.advance(latest)
        for index in range(latest, len(self.stream)):
            self._layer(index)
            self.progress.advance()
        found = self._compare()
        write_json(path, found)
        self.branches.discard(len(self.stream))
        return found

    def _weight(self, tensor: PlannedTensor) -> torch.Tensor:
        shard = read_shard(self.work, self.plan, tensor)
        if shard is None:
            raise CorruptFile(f"{shard_path(self.work, tensor)} is missing or damaged; start again with --fresh")
        return shard.weight(tensor)

    def _embed(self) -> None:
        if self.branches.latest() is not None:
            self.stream.prepare()
            return
        with self.branches.writing(0) as write:
            write(0, {"hidden": next(self.stream.embed())})
            for unit, tensors in self.units.items():
                for tensor in tensors:
                    if tensor.kind == "embed":
                        used, ids = torch.unique(self.stream.batches[0], return_inverse=True)
                        write(self.numbers[unit], {"hidden": self.stream.set_rows(self._weight(tensor)[used])(ids)})

    def _layer(self, index: int) -> None:
        """Take every branch through one layer, and begin those of its own units."""
        prefix = f"{self.family.layers}.{index}"
        self.stream.load(prefix)
        with self.branches.writing(index + 1) as write:
            for number in (0, *self.numbers.values()):
                if self.branches.holds(index, number):
                    write(number, {"hidden": self._run(index, number)})
            for unit, tensors in self.units.items():
                if tensors[0].kind == "body" and tensors[0].layer == index:
                    with self._rounded(tensors):
                        write(self.numbers[unit], {"hidden": self._run(index, 0)})
        self.stream.unload(prefix)
        self.branches.discard(index)

    def _run(self, index: int, number: int) -> torch.Tensor:
        return self.stream.run_layer(index, self.branches.read(index, number)["hidden"])

    @contextmanager
    def _rounded(self, tensors: list[PlannedTensor]) -> Iterator[None]:
        modules: list[Any] = [self.stream.model.get_submodule(tensor.module) for tensor in tensors]
        full = [module.weight.data for module in modules]
        for module, tensor in zip(modules, tensors, strict=True):
            module.weight.data = self._weight(tensor)
        yield
        for module, weight in zip(modules, full, strict=True):
            module.weight.data = weight

    def _compare(self) -> dict[str, float]:
        """Divergence of every branch's predictions; the head's unit branches off here."""
        norm = self.stream.load(self.family.final_norm)
        name = f"{self.family.embed if self.source.tied_embeddings else self.family.head}.weight"
        rows = SourceRows(self.source, name)
        head = rows[0 : rows.shape[0]]
        end = len(self.stream)
        full = norm(self.branches.read(end, 0)["hidden"]).flatten(0, 1)
        found = {}
        for unit, tensors in self.units.items():
            table = next((tensor for tensor in tensors if tensor.name == name), None)
            number = self.numbers[unit] if self.branches.holds(end, self.numbers[unit]) else 0
            hidden = norm(self.branches.read(end, number)["hidden"]).flatten(0, 1)
            other = head if table is None else self._weight(table)
            found[unit] = float(Divergence.apply(hidden, other, full, head))
        self.stream.unload(self.family.final_norm)
        return found
