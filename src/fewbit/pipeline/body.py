"""Rounds the decoder layers in order, each calibrated behind what is rounded already.

Inside a layer the inputs follow one another too: query, key and value are rounded before the input of the output
projection is measured, and so on. Between layers only files remain (hidden states, shards), so a run that is killed
goes on at the tensor where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.checkpoint.store import write_tensors
from fewbit.errors import CorruptFile
from fewbit.formats import get_format
from fewbit.models.base import SharedInput
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
        self.inputs = BatchFiles(work / "inputs")
        self.resumed = 0
        self._replaced: dict[str, nn.Module] = {}
        self._memory: dict[int, torch.Tensor] = {}  # of earlier Hessians: new memory is slow where a host gives it
        self._rounded: list[PlannedTensor] = []  # linears of this layer whose inputs are kept

    def run(self) -> None:
        """Round every layer that is not yet done; afterwards the hidden states behind the last layer are on disk."""
        start = self._start()
        passes = sum(self._passes(index) for index in range(start, len(self.stream)))
        self.progress.stage("calibrating and rounding the layers", passes * len(self.stream.batches))
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
        self._memory.clear()

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
        stages: dict[int, dict[str, Group]] = {}
        for tensor in self.plan.quantized:
            if tensor.kind == "body" and tensor.layer == index:
                stages.setdefault(tensor.input_number, {}).setdefault(tensor.shared_input, []).append(tensor)
        return [list(stages[number].values()) for number in sorted(stages)]

    def _module(self, tensor: PlannedTensor) -> nn.Module:
        return self.stream.model.get_submodule(tensor.module)

    def _passes(self, index: int) -> int:
        """How often the calibration text goes through a layer, or through a part of it."""
        return 1 + (len(self._groups(index)) if self.sequential else 0)

    def _sequential_layer(self, index: int) -> None:
        for groups in self._groups(index):
            kept = self._ends_block(groups)
            measure = partial(self._measure, index, groups, kept)
            if not self._round(groups, measure):
                if kept:
                    # The shards of a run that was killed are there, but not these inputs.
                    measure()
                else:
                    self.progress.advance(len(self.stream.batches))
            if kept:
                self._rounded.append(groups[0][0])
        with self.hidden.writing(index + 1) as write:
            for number in range(len(self.stream.batches)):
                write(number, {"hidden": self._run_layer(index, number)})
        for place in range(len(self._rounded)):
            self.inputs.discard(place)
        self._rounded.clear()

    def _shared(self, group: Group) -> SharedInput:
        return self.stream.family.inputs[group[0].input_number]

    def _ends_block(self, groups: list[Group]) -> bool:
        """Whether the stage is one linear whose output is that of the attention, or of the feed-forward block."""
        alone = len(groups) == 1 and len(groups[0]) == 1
        shared = self._shared(groups[0])
        return alone and shared.writes_residual and "*" not in shared.linears[0]

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
                        self.progress.advance()
                return collector

            if not self._round(groups, measure, install=False):
                measure()

    def _run_layer(self, index: int, number: int, stop: nn.Module | None = None) -> torch.Tensor:
        """Run a batch through the layer, or up to the input of `stop`; blocks whose last linear is rounded are not
        computed again, as that linear's inputs are kept."""
        hidden = self.hidden.read(index, number)["hidden"]
        with ExitStack() as known:
            for place, tensor in enumerate(self._rounded):
                inputs = self.inputs.read(place, number)["inputs"].float()
                with_weights = self._shared([tensor]).values is not None
                known.enter_context(_block_of(self.stream.model, tensor.module, inputs, with_weights))
            result = self.stream.run_layer(index, hidden, stop)
        self.progress.advance()
        return result

    def _collector(self, groups: list[Group]) -> InputCollector:
        axes = {}
        for group in groups:
            spec = group[0].spec
            assert spec is not None
            axes[group[0].shared_input] = InputAxes(
                tensor_signs(group[0]), spec.block, spec.group, spec.act_bits, self.plan.options["center"]
            )
        linears = [(group[0].shared_input, self._module(group[0])) for group in groups]
        return InputCollector(linears, axes, self.stream.dtype, self._memory)

    def _measure(self, index: int, groups: list[Group], kept: bool) -> InputCollector:
        """Run the layer as far as the inputs of `groups`, which with `kept` go into files.

        They are kept in bfloat16: they are many, and their rounding is far below the linear's own.
        """
        # The experts' inputs come one after the other, so only a single input ends the pass early.
        stop = self._module(groups[0][0]) if len(groups) == 1 else None
        with self._collector(groups) as collector, ExitStack() as files:
            write = files.enter_context(self.inputs.writing(len(self._rounded))) if kept else None
            seen: list[torch.Tensor] = []
            if kept and stop is not None:
                files.enter_context(_noting(stop, seen))
            for number in range(len(self.stream.batches)):
                self._run_layer(index, number, stop)
                if write is not None:
                    write(number, {"inputs": seen.pop().to(torch.bfloat16)})
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
        self._memory[spec.cols] = inputs.hessian
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
def _noting(module: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    """Inside, what `module` is called with is added to `seen`."""
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _block_of(model: Any, name: str, inputs: torch.Tensor, with_weights: bool) -> Iterator[None]:
    """Inside, the block that ends with the linear `name` is that linear alone, on `inputs` that it is known to get;
    attention returns its weights too (`with_weights`), which nobody reads."""
    linear, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])

    def forward(*unused: Any, **options: Any) -> Any:
        output = linear(inputs)
        return (output, None) if with_weights else output

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
