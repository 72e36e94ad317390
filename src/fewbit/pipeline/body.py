"""Rounds the decoder layers in order, each calibrated behind what is rounded already.

Inside a layer the inputs follow one another too: query, key and value are rounded before the input of the output
projection is measured, and so on. Between layers only files remain (hidden states, shards), so a run that is killed
goes on at the tensor where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.checkpoint.store import write_tensors
from fewbit.errors import CorruptFile
from fewbit.formats import get_format
from fewbit.modules import FewbitLinear
from fewbit.pipeline.batches import BatchFiles
from fewbit.pipeline.calibrate import InputAxes, InputCollector, LayerStream
from fewbit.pipeline.damping import choose_damping
from fewbit.pipeline.executors import Executor
from fewbit.pipeline.jobs import RoundJob, Shard, read_shard, shard_path, tensor_signs
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.progress import Progress

Group = list[PlannedTensor]
"""Tensors that read one input and share its Hessian."""


class Body:
    """The layers' part of a run with calibration."""

    def __init__(self, stream: LayerStream, plan: Plan, work: Path, executor: Executor, progress: Progress) -> None:
        self.stream = stream
        self.plan = plan
        self.work = work
        self.executor = executor
        self.progress = progress
        self.sequential = bool(plan.options["sequential"])
        self.hidden = BatchFiles(work / "hidden")
        self.spilled = BatchFiles(work / "spilled")
        self.resumed = 0
        self._replaced: dict[str, nn.Module] = {}

    def run(self) -> None:
        """Round every layer that is not yet done; afterwards the hidden states behind the last layer are on disk."""
        start = self._start()
        steps = 2 * len(self.stream.batches) * (len(self.stream) - start)
        self.progress.stage("calibrating and rounding the layers", steps)
        for index in range(start, len(self.stream)):
            prefix = f"{self.stream.family.layers}.{index}"
            self.stream.load(prefix)
            if self.sequential:
                self._sequential_layer(index)
            else:
                self._independent_layer(index)
            self._put_back()
            self.stream.unload(prefix)
            self.hidden.discard(index)

    def _start(self) -> int:
        """The first layer to do; its hidden states are made or found."""
        latest = self.hidden.latest()
        if latest is None:
            with self.hidden.writing(0) as write:
                for number, batch in enumerate(self.stream.embed()):
                    write(number, {"hidden": batch})
            return 0
        self.stream.prepare()
        for tensor in self.plan.quantized:
            if tensor.kind == "body" and tensor.layer < latest:
                if read_shard(self.work, self.plan, tensor) is None:
                    raise CorruptFile(
                        f"{shard_path(self.work, tensor)} is missing or damaged; start again with --fresh"
                    )
                self.resumed += 1
        return latest

    def _groups(self, index: int) -> list[list[Group]]:
        """The layer's groups in the order of the family's inputs; the experts of a mixture are measured together."""
        stages: dict[str, dict[str, Group]] = {}
        for tensor in self.plan.quantized:
            if tensor.kind == "body" and tensor.layer == index:
                stage = ".".join(tensor.shared_input.split(".")[:2])
                stages.setdefault(stage, {}).setdefault(tensor.shared_input, []).append(tensor)
        return [list(stages[stage].values()) for stage in sorted(stages, key=lambda name: int(name.split(".")[1]))]

    def _module(self, tensor: PlannedTensor) -> nn.Module:
        return self.stream.model.get_submodule(tensor.module)

    def _sequential_layer(self, index: int) -> None:
        stages = self._groups(index)
        for number, groups in enumerate(stages):
            if number == len(stages) - 1 and self._adds_to_stream(groups):
                self._last_stage(index, groups[0])
                return
            self._round(groups, partial(self._measure, index, groups))
        with self.hidden.writing(index + 1) as write:
            for number in range(len(self.stream.batches)):
                hidden = self.hidden.read(index, number)["hidden"]
                write(number, {"hidden": self.stream.run_layer(index, hidden)})
                self.progress.advance()

    def _adds_to_stream(self, groups: list[Group]) -> bool:
        """Whether the stage is the family's last linear, and its output is added to the stream and that is all."""
        inputs, place = self.stream.family.inputs, int(groups[0][0].shared_input.split(".")[1])
        alone = len(groups) == 1 and len(groups[0]) == 1 and "*" not in inputs[place].linears[0]
        return alone and place == len(inputs) - 1 and inputs[place].writes_residual

    def _independent_layer(self, index: int) -> None:
        """All inputs measured at once in the full layer, which is also what the next layers see."""
        groups = [group for stage in self._groups(index) for group in stage]
        # The hidden states say that the layer is done, so they get their name after the last shard.
        with self.hidden.writing(index + 1) as write:

            def measure() -> InputCollector:
                with self._collector(groups) as collector:
                    for number in range(len(self.stream.batches)):
                        hidden = self.hidden.read(index, number)["hidden"]
                        write(number, {"hidden": self.stream.run_layer(index, hidden)})
                        self.progress.advance(2)
                return collector

            if not self._round(groups, measure, install=False):
                measure()

    def _last_stage(self, index: int, group: Group) -> None:
        """Measure and round the layer's last linear, and run it alone on its inputs, which go through files.

        With its output left out a layer returns the stream that the output is added to, so nothing of the layer
        is computed twice. The inputs are kept in bfloat16: they are many, and their rounding is far below the
        linear's own.
        """
        module: Any = self._module(group[0])

        def measure() -> InputCollector:
            with self._collector([group]) as collector:
                self._spill(index, module)
            return collector

        done = read_shard(self.work, self.plan, group[0]) is not None
        if done:
            self._spill(index, module)
        self._round([group], measure)
        with self.hidden.writing(index + 1) as write:
            for number in range(len(self.stream.batches)):
                parts = self.spilled.read(0, number)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.stream.dtype == torch.bfloat16):
                    output = self._module(group[0])(parts["inputs"].float())
                write(number, {"hidden": parts["stream"] + output.view(parts["stream"].shape)})
                self.progress.advance()
        self.spilled.discard(0)

    def _spill(self, index: int, module: Any) -> None:
        """Run the layer without the output of `module`, and keep the stream and the module's inputs in files."""
        with self.spilled.writing(0) as write:
            for number in range(len(self.stream.batches)):
                inputs: list[torch.Tensor] = []
                with _without_output(module, inputs):
                    stream = self.stream.run_layer(index, self.hidden.read(index, number)["hidden"])
                write(number, {"stream": stream, "inputs": inputs[0].to(torch.bfloat16)})
                self.progress.advance()

    def _collector(self, groups: list[Group]) -> InputCollector:
        axes = {}
        for group in groups:
            spec = group[0].spec
            assert spec is not None
            axes[group[0].shared_input] = InputAxes(
                tensor_signs(group[0]), spec.block, spec.group, spec.act_bits, self.plan.options["center"]
            )
        linears = [(group[0].shared_input, self._module(group[0])) for group in groups]
        return InputCollector(linears, axes, self.stream.dtype)

    def _measure(self, index: int, groups: list[Group]) -> InputCollector:
        """Run the layer as far as the inputs of `groups`."""
        # The experts' inputs come one after the other, so only a single input ends the pass early.
        stop = self._module(groups[0][0]) if len(groups) == 1 else None
        with self._collector(groups) as collector:
            for number in range(len(self.stream.batches)):
                self.stream.run_layer(index, self.hidden.read(index, number)["hidden"], stop)
        return collector

    def _round(self, groups: list[Group], measure: Callable[[], InputCollector], install: bool = True) -> bool:
        """Round the groups' tensors unless their shards are there, and put what they decode to into the layer.

        Returns whether anything had to be measured.
        """
        missing = [[tensor for tensor in group if read_shard(self.work, self.plan, tensor) is None] for group in groups]
        self.resumed += sum(map(len, groups)) - sum(map(len, missing))
        if any(missing):
            collector = measure()
            pairs = zip(groups, missing, strict=True)
            jobs = [job for group, left in pairs if left for job in self._jobs(group, left, collector)]
            del collector
            for record in self.executor.run(jobs):
                self.progress.tensor(record)
            for calibration in {job.calibration for job in jobs}:
                (self.work / calibration).unlink()
        for tensor in (tensor for group in groups for tensor in group if install):
            shard = read_shard(self.work, self.plan, tensor)
            if shard is None:
                raise CorruptFile(f"{shard_path(self.work, tensor)} cannot be read back; check the disk and repeat")
            self._install(tensor, shard)
        return any(missing)

    def _install(self, tensor: PlannedTensor, shard: Shard) -> None:
        """Let the layer compute with a rounded tensor, quantized inputs included where the format has them."""
        module: Any = self._module(tensor)
        if tensor.spec is None or not tensor.spec.act_bits:
            module.weight.data = shard.weight(tensor)
            return
        packed = FewbitLinear(QuantizedModule(tensor.module, tensor.spec, tensor.kind), False, torch.float32)
        for name, part in shard.parts.items():
            setattr(packed, name, part)
        packed.bias = module.bias
        self._replaced[tensor.module] = module
        self.stream.model.set_submodule(tensor.module, packed)

    def _put_back(self) -> None:
        """The layer's own linears in the place of packed ones."""
        for name, module in self._replaced.items():
            self.stream.model.set_submodule(name, module)
        self._replaced.clear()

    def _jobs(self, group: Group, missing: Group, collector: InputCollector) -> Iterator[RoundJob]:
        """One job per missing tensor, once what the group shares is on disk.

        The whole group chooses the damping, so that a run that goes on chooses as one that was never stopped.
        """
        key, spec = group[0].shared_input, group[0].spec
        assert spec is not None
        inputs = collector.take(key, spec.cols)
        tokens, damping = inputs.tokens, self.plan.options["damping"]
        if damping == "auto":
            # Over the whole group, so that a run that goes on in the middle of one chooses the same.
            damping = choose_damping(self.stream.source, group, inputs)
        calibration = f"calibration-{key}.safetensors"
        wanted = get_format(spec.format).calibration(inputs, damping)
        del inputs
        write_tensors(self.work / calibration, wanted)
        for tensor in missing:
            yield RoundJob(str(self.work), tensor.name, calibration, (("tokens", tokens), ("damping", damping)))

    def head_hessian(self) -> torch.Tensor:
        """The second moment of the output head's inputs, on their own axes, float32 `[hidden, hidden]`."""
        norm: Any = self.stream.load(self.stream.family.final_norm)
        total = torch.zeros(0)
        count = 0
        for number in range(len(self.stream.batches)):
            x = norm(self.hidden.read(len(self.stream), number)["hidden"]).flatten(0, 1)
            total = total if total.numel() else torch.zeros(x.shape[1], x.shape[1])
            total.addmm_(x.T, x)
            count += x.shape[0]
        self.stream.unload(self.stream.family.final_norm)
        return total / count


@contextmanager
def _without_output(module: Any, inputs: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the linear `module` notes its inputs and returns zeros."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        inputs.append(x)
        return x.new_zeros(*x.shape[:-1], module.weight.shape[0])

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
