"""Tuning after rounding: scales, norms and biases follow the full model's predictions, codes stay as they are.

Every tuned number is a gain around 1 on something that is stored: one per (row, group) of scales, because the
rotation stays inside a group of columns and the gain therefore scales the same columns of the plain weight, and
one per channel of norms and biases. The loss is the divergence KL(full || compressed) over all positions of the
calibration windows, and held-out windows decide when to stop and which state to keep.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fewbit.checkpoint.damage import read_json
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import read_tensors, write_json, write_tensors
from fewbit.errors import CorruptFile
from fewbit.formats import get_format
from fewbit.models import get_family
from fewbit.pipeline.calibrate import LayerStream, bfloat16_products
from fewbit.pipeline.descent import WINDOWS_PER_STEP, Descent, held_batches, mean_loss
from fewbit.pipeline.gains import Gain, GainLinear, TwinGainLinear, with_gains
from fewbit.pipeline.jobs import Shard, read_shard, relative_error, write_shard
from fewbit.pipeline.memory import activation_bytes, computed_again
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.progress import Progress
from fewbit.pipeline.teacher import Divergence, Teacher
from fewbit.pipeline.tune_layers import LayerTuner

TUNED = "tuned"  # the directory of tuned shards
STATE = "tuning.safetensors"
PLAIN = "tuned-plain.safetensors"
TEACHER = "tuning-full"
REPORT = "tuning.json"


class Tuner:
    """The whole compressed model with gains, and the full model's last hidden states to learn from."""

    def __init__(self, source: Source, plan: Plan, windows: torch.Tensor, work: Path, progress: Progress) -> None:
        self.source = source
        self.plan = plan
        self.work = work
        self.progress = progress
        self.family = get_family(plan.model_type)
        self.dtype = getattr(torch, plan.options["calib_dtype"])
        self.windows = windows[: windows.shape[0] // WINDOWS_PER_STEP * WINDOWS_PER_STEP]
        self.stream = LayerStream(source, self.family, self.windows, self.dtype, WINDOWS_PER_STEP)
        self.teacher = Teacher(self.stream, work / TEACHER, progress)
        self.linears: dict[str, GainLinear | TwinGainLinear] = {}
        self.gains: dict[str, nn.Parameter] = {}
        # Activations that are kept for the way back take memory, those that are computed again take time; the values
        # are the same.
        kept = activation_bytes(plan, WINDOWS_PER_STEP * self.windows.shape[1])
        self.recompute = computed_again(kept)

    def run(self) -> None:
        """Tune and write the tuned shards and plain tensors; does nothing where that is done."""
        if (self.work / REPORT).exists() and (self.work / PLAIN).exists():
            return
        least = 2 * WINDOWS_PER_STEP
        if self.windows.shape[0] < least:
            self.progress.note(f"not tuned: that takes {least} windows of calibration text at least")
            return
        self.teacher.run()
        self._load()
        with bfloat16_products(self.dtype):
            report = self._learn()
        self._store()
        write_json(self.work / REPORT, report)
        self.teacher.discard()

    def _shard(self, tensor: PlannedTensor) -> Shard:
        shard = read_shard(self.work, self.plan, tensor)
        if shard is None:
            raise CorruptFile(f"the shard of {tensor.name} is missing or damaged; start again with --fresh")
        return shard

    def _table(self, module: str) -> torch.Tensor:
        """A table as the compressed model has it, float32 `[vocabulary, hidden]`."""
        tensor = next(tensor for tensor in self.plan.tensors if tensor.module == module)
        return self.source.tensor(tensor.name) if tensor.spec is None else self._shard(tensor).weight(tensor)

    @torch.no_grad()
    def _load(self) -> None:
        """Fill the model: decoded weights with gains, norms with gains, tables."""
        model = self.stream.model
        linears = {tensor.module: tensor for tensor in self.plan.quantized if tensor.kind == "body"}
        for name, tensor in linears.items():
            linear: Any = model.get_submodule(name)
            bias = None if linear.bias is None else self.source.tensor(f"{name}.bias")
            tuned = with_gains(tensor, self._shard(tensor), bias)
            model.set_submodule(name, tuned)
            self.linears[name] = tuned
            self.gains |= {f"{name}.{part}": gain for part, gain in tuned.gains.items()}
        for part in (*(f"{self.family.layers}.{index}" for index in range(len(self.stream))), self.family.final_norm):
            self.stream.load(part)
        for name, module in list(model.named_modules()):
            weight = getattr(module, "weight", None)
            if name.endswith("norm") and isinstance(weight, nn.Parameter):
                gain = Gain(weight)
                parametrize.register_parametrization(module, "weight", gain)
                self.gains[f"{name}.weight"] = gain.gain
        table = self._table(self.family.embed)
        tied = self.source.tied_embeddings
        self.head = table if tied else self._table(self.family.head)
        # The full model's head; where it is kept as it is there is no second one.
        name = f"{self.family.embed if tied else self.family.head}.weight"
        kept = all(tensor.name != name for tensor in self.plan.quantized)
        self.full_head = self.head if kept else self.source.tensor(name)
        used, self.ids = torch.unique(self.windows, return_inverse=True)
        self.embed = self.stream.set_rows(table[used])

    def _embedded(self, batch: int) -> torch.Tensor:
        return self.embed(self.ids.split(WINDOWS_PER_STEP)[batch])

    def _loss(self, batch: int) -> torch.Tensor:
        """The divergence over one batch of windows."""
        hidden = self._embedded(batch)
        for index in range(len(self.stream)):
            layer = partial(self.stream.call_layer, index)
            hidden = checkpoint(layer, hidden, use_reentrant=False) if self.recompute else layer(hidden)
        norm = self.stream.model.get_submodule(self.family.final_norm)
        full = self.teacher.hidden(batch)
        return Divergence.apply(norm(hidden).flatten(0, 1), self.head, full, self.full_head)

    def _learn(self) -> dict[str, Any]:
        """Descend until the steps are used up or the held-out windows gain no more; leaves the best gains in place."""
        batches = len(self.stream.batches)
        held = held_batches(batches)
        state = Descent(self.gains, self.plan.options["tune_rate"], self.work / STATE)
        rounded = mean_loss(self._loss, held)
        self.progress.note(f"before tuning: divergence {rounded:.5f}")
        layers = self._learn_layers(held.start)
        state.restore()
        steps = int(self.plan.options["tune_steps"])
        self.progress.stage("tuning", steps)
        self.progress.advance(state.step)

        def looked(divergence: float) -> None:
            place = f"tuning, step {state.step}" if state.step else "tuned layer by layer"
            self.progress.note(f"{place}: divergence {divergence:.5f}")

        state.run(self._loss, batches, steps, self.progress.advance, looked)
        tokens = WINDOWS_PER_STEP * self.windows.shape[1]
        return {
            "steps": state.step,
            "tokens_per_step": tokens,
            "rounded": rounded,
            "layers": layers,
            "history": state.history,
        }

    def _learn_layers(self, batches: int) -> list[dict[str, float]]:
        """Each layer by itself first, on the first so many batches; what that gained."""
        full = LayerStream(self.source, self.family, self.windows, self.dtype, WINDOWS_PER_STEP)
        tuner = LayerTuner(full, self.stream, self.gains, self._embedded, batches, self.work)
        self.progress.stage("tuning the layers", len(self.stream))
        found = []
        for entry in tuner.run():
            found.append(entry)
            self.progress.advance()
        return found

    @torch.no_grad()
    def _store(self) -> None:
        """Fold the gains into scales, norms and biases, and write what results."""
        folded: set[str] = set()
        for tensor in self.plan.quantized:
            if tensor.spec is None or tensor.module not in self.linears:
                continue
            shard = self._shard(tensor)
            gains = {part: gain for part, gain in self.linears[tensor.module].gains.items() if part != "bias"}
            folded |= {f"{tensor.module}.{part}" for part in gains}
            parts = get_format(tensor.spec.format).rescale(shard.parts, tensor.spec, gains)
            error = relative_error(self.source, tensor, parts)
            named = {f"{tensor.module}.{name}": part for name, part in parts.items()}
            write_shard(self.work / TUNED, self.plan, tensor, named, {**shard.facts, "relative_error": error})
        plain = {name: self.source.tensor(name) * gain for name, gain in self.gains.items() if name not in folded}
        write_tensors(self.work / PLAIN, plain)


def tuning_result(work: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tuned plain tensors of a run and its report; both empty where nothing was tuned."""
    if not (work / REPORT).exists():
        return {}, {}
    return read_tensors(work / PLAIN)[0], read_json(work / REPORT, "delete it and run again")
