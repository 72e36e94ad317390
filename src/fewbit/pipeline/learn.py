"""TwinQuant's learning: axes on which a model, once quantized, predicts most like the full one.

The residual stream's rotation and those of the heads' values move on the Stiefel manifold, the factor between the two
parts of each branch on the general linear group (`G = P S`), and the scales of inputs, positive numbers, by their
logarithms; all of them jointly. The loss is KL(full || quantized) from end to end, with weights, branches and inputs
rounded to nearest as the format does; gradients pass the integers and move the scales. What is learned goes into the
transform and, for the branches, into the rows of U that rounding starts from.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbit.checkpoint.equivalent import TRANSFORM, EquivalentSource, Transform, loose_norm
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import write_json, write_tensors
from fewbit.formats.base import TensorSpec
from fewbit.math.hadamard import rotate
from fewbit.math.lowrank import INITS, balanced, leading_directions
from fewbit.math.manifolds import MOST_CONDITION, Invertible, Orthogonal
from fewbit.math.straight_through import straight_through
from fewbit.models import Family, get_family
from fewbit.pipeline.calibrate import LayerStream, full_precision
from fewbit.pipeline.descent import WINDOWS_PER_STEP, Descent
from fewbit.pipeline.jobs import BRANCHES, tensor_signs
from fewbit.pipeline.memory import activation_bytes, computed_again
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.progress import Progress
from fewbit.pipeline.teacher import Divergence, Teacher

WEIGHT_COPIES = 8  # of a weight that a step keeps for the way back
LEAST_SHARE = 1e-7  # of the mean diagonal, added where branches are solved for
RATES = {"residual": 5e-4, "values": 5e-4, "gains": 5e-3, "scales": 5e-3, "branches": 1e-3}
STATE = "learning.safetensors"
REPORT = "learning.json"
TEACHER = "learning-full"


class Axes(nn.Module):
    """Everything that is learned, from a smoothing transform on; `residual` is None where the stream stays as it is."""

    def __init__(self, source: Source, family: Family, start: Transform, width: int) -> None:
        super().__init__()
        self.source = source
        self.family = family
        self.start = start
        self.residual = None if loose_norm(source) else Orthogonal(torch.eye(width))
        self.gains = _zeros(start.gains)
        self.scales = _zeros(start.scales)
        self.values = nn.ModuleDict({_key(name): Orthogonal(_identities(head)) for name, head in start.values.items()})
        self.branches = nn.ModuleDict()

    def transform(self) -> Transform:
        """The transform as it stands; gradients flow through its tensors."""
        return Transform(
            None if self.residual is None else self.residual(),
            {name: gain * self.gains[_key(name)].exp() for name, gain in self.start.gains.items()},
            {name: scale * self.scales[_key(name)].exp() for name, scale in self.start.scales.items()},
            {name: heads @ self.values[_key(name)]() for name, heads in self.start.values.items()},
        )

    def equivalent(self) -> EquivalentSource:
        return EquivalentSource(self.source, self.transform(), torch.float32)

    def rate(self, name: str) -> float:
        return RATES[name.partition(".")[0]]

    def deviation(self) -> float:
        """How far the rotations are from orthogonal, in the worst entry."""
        rotations = [*([] if self.residual is None else [self.residual]), *self.values.values()]
        return max((rotation.deviation() for rotation in rotations), default=0.0)  # type: ignore[operator]

    def condition(self) -> float:
        """The worst condition number of a branch's factor."""
        return max((branch.positive.condition() for branch in self.branches.values()), default=1.0)  # type: ignore[operator, union-attr]

    def restrain(self) -> None:
        for branch in self.branches.values():
            branch.positive.restrain(MOST_CONDITION)  # type: ignore[operator, union-attr]


def _key(name: str) -> str:
    """A module's name as the key of a module dictionary, which takes no dots."""
    return name.replace(".", "/")


def _zeros(tensors: dict[str, torch.Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({_key(name): nn.Parameter(torch.zeros_like(value)) for name, value in tensors.items()})


def _identities(heads: torch.Tensor) -> torch.Tensor:
    return torch.eye(heads.shape[1]).expand(heads.shape).contiguous()


class LearnedLinear(nn.Module):
    """A linear whose weight and inputs are quantized on axes that are learned; `[..., K]` to `[..., N]`.

    `weight [N, K]` and `bias [N]` are the source's. A branch has `U = G start` on the axes of the moment, and V takes
    what U can give, so that `V U` does not depend on G but for rounding. `start` is on axes of h that suit the first
    inputs to come; with `init` "whitened" these decide on its directions, too. `behind_norm` says that nothing but one
    map `[K, K]` happens to the weight's columns.
    """

    def __init__(
        self,
        tensor: PlannedTensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        center: bool = True,
        behind_norm: bool = False,
        init: str = INITS[0],
    ) -> None:
        super().__init__()
        assert tensor.spec is not None
        self.init = init
        self.center = center
        self.name = tensor.module
        self.unit = tensor.unit
        self.behind_norm = behind_norm
        self.spec: TensorSpec = tensor.spec
        self.signs = tensor_signs(tensor)
        self.weight = weight
        self.bias = bias
        self.axes: EquivalentSource
        self.onto: torch.Tensor | None = None  # the map `[K, K]` to the axes of the moment, for inputs that share it
        self.moved_ahead: torch.Tensor | None = None  # what `moved` gives in this step
        self.start: torch.Tensor | None = None
        self.balanced = False
        self.factor: Any = None

    def _rotated(self, columns: torch.Tensor) -> torch.Tensor:
        return columns if self.signs is None else rotate(columns, self.signs, self.spec.block)

    def map_onto(self) -> torch.Tensor:
        """What brings a row to the axes of the moment, `[K, K]`."""
        return self._rotated(self.axes.columns(torch.eye(self.spec.cols), self.name))

    def moved(self) -> torch.Tensor:
        """The weight `[N, K]` on the axes of the moment."""
        if self.onto is not None:
            return self.axes.outputs(self.weight @ self.onto, self.name)
        return self.axes.outputs(self._rotated(self.axes.columns(self.weight, self.name)), self.name)

    def begin_branch(self, factor: nn.Module) -> None:
        """Take the leading directions of the weight as it is now; the first inputs to come decide on their axes."""
        self.start = leading_directions(self.moved(), self.spec.rank, None, "svd")
        # Registered where everything is that is learned.
        object.__setattr__(self, "factor", factor)

    def down(self) -> torch.Tensor:
        """U `[r, K]` of the moment, before rounding."""
        with full_precision():
            return self.factor() @ self.start

    @torch.no_grad()
    def _balance(self, start: torch.Tensor, seen: torch.Tensor) -> None:
        """Begin on the axes of h where its rounding costs least, by the rows of `seen` inputs and one that is white."""
        rows = seen.flatten(0, -2).float()
        h, energy = rows @ start.T, float(rows.square().mean())
        if energy == 0.0:
            return
        if self.init != INITS[0]:
            hessian = rows.T @ rows + energy * torch.eye(self.spec.cols)
            start = leading_directions(self.moved(), self.spec.rank, hessian / (rows.shape[0] + 1), self.init)
            h = rows @ start.T
        moment = h.T @ h + energy * start @ start.T
        self.start, self.balanced = balanced(start, moment / (rows.shape[0] + 1), energy), True

    def balance_unseen(self) -> None:
        """Where no first input came, or only one like all others (an expert that few tokens chose), begin on axes that
        suit white inputs."""
        if self.start is not None and not self.balanced:
            self.start, self.balanced = balanced(self.start, self.start @ self.start.T, 1.0), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group, act_bits = self.spec.group, self.spec.act_bits
        weight = self.moved() if self.moved_ahead is None else self.moved_ahead
        mean = x.detach().flatten(0, -2).mean(0) * self.center
        seen = straight_through(self._rotated(x - mean), group, act_bits)
        y, residual = self._rotated(mean) @ weight.T, weight
        if self.start is not None:
            if not self.balanced:
                self._balance(self.start, seen)
            down = straight_through(self.down(), group, 4)
            with full_precision():
                # Branches of weights that are zero, or nearly, have nothing to be solved for.
                gram = down @ down.T
                ridge = float(gram.detach().diagonal().mean()) * LEAST_SHARE + 1e-20
                fitted = torch.linalg.solve(gram + ridge * torch.eye(self.spec.rank), down @ weight.float().T).T
            up = straight_through(fitted, group, 4)
            residual = weight - up @ down
            y = y + straight_through(seen @ down.T, group, act_bits) @ up.T
        y = y + seen @ straight_through(residual, group, 4).T
        return y if self.bias is None else y + self.axes.outputs(self.bias, self.name)


class Learner:
    """The whole model on learned axes, quantized on the way, and the full one to learn from."""

    def __init__(
        self, source: Source, plan: Plan, start: Transform, windows: torch.Tensor, work: Path, progress: Progress
    ) -> None:
        """`start` is the transform to begin with, `windows` token ids int64 `[n, window]`."""
        self.source = source
        self.plan = plan
        self.work = work
        self.progress = progress
        self.family = get_family(plan.model_type)
        self.windows = windows[: windows.shape[0] // WINDOWS_PER_STEP * WINDOWS_PER_STEP]
        self.dtype = getattr(torch, plan.options["calib_dtype"])
        self.stream = LayerStream(source, self.family, self.windows, self.dtype, WINDOWS_PER_STEP)
        self.teacher = Teacher(self.stream, work / TEACHER, progress)
        width = source.shape(f"{self.family.embed}.weight")[1]
        self.axes = Axes(source, self.family, start, width)
        self.linears: dict[str, LearnedLinear] = {}
        self.layers: list[list[LearnedLinear]] = [[] for _ in range(len(self.stream))]
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}  # weights and biases in full precision
        # As in tuning: what is kept for the way back takes memory, what is computed again takes time.
        kept = weight_bytes(plan) + activation_bytes(plan, WINDOWS_PER_STEP * self.windows.shape[1])
        self.recompute = computed_again(kept)
        # Of all that is computed again, the weights on the axes of the moment take the most time for their memory.
        self.keeps_moved = self.recompute and not computed_again(moved_bytes(plan))

    def run(self) -> None:
        """Learn, and write the transform and the branches; does nothing where that is done."""
        if (self.work / TRANSFORM).exists():
            self.teacher.discard()
            return
        least = 2 * WINDOWS_PER_STEP
        if self.windows.shape[0] < least:
            self.progress.note(f"not learned: that takes {least} windows of calibration text at least")
            # The plan counts on a stream that is turned where it can be, if only by the identity.
            turn = self.axes.residual
            residual = None if turn is None else torch.eye(turn().shape[0])
            replace(self.axes.start, residual=residual).save(self.work / TRANSFORM)
            return
        self.teacher.run()
        self._load()
        write_json(self.work / REPORT, self._learn())
        self._store()
        self.teacher.discard()

    @torch.no_grad()
    def _load(self) -> None:
        """Fill the model: linears that quantize themselves, everything else as it is."""
        model = self.stream.model
        for tensor in self.plan.quantized:
            if tensor.kind != "body":
                continue
            linear: Any = model.get_submodule(tensor.module)
            bias = None if linear.bias is None else self.source.tensor(f"{tensor.module}.bias")
            norm = self.family.inputs[tensor.input_number].norm
            self.linears[tensor.module] = LearnedLinear(
                tensor,
                self.source.tensor(tensor.name),
                bias,
                bool(self.plan.options["center"]),
                norm is not None,
                self.plan.options["init"],
            )
            self.layers[tensor.layer].append(self.linears[tensor.module])
            model.set_submodule(tensor.module, self.linears[tensor.module])
        for part in (*(f"{self.family.layers}.{index}" for index in range(len(self.stream))), self.family.final_norm):
            self.stream.load(part)
        self.gain = self.source.tensor(f"{self.family.final_norm}.weight")
        if self.axes.residual is not None:
            _set(model.get_submodule(self.family.final_norm), "weight", torch.ones_like(self.gain))
        self._find_kept()
        table = self.source.tensor(f"{self.family.embed}.weight")
        used, self.ids = torch.unique(self.windows, return_inverse=True)
        self.embed = self.stream.set_rows(table[used])
        self.head = table if self.source.tied_embeddings else self.source.tensor(f"{self.family.head}.weight")
        self._move()
        branches = [linear for linear in self.linears.values() if linear.spec.rank]
        self.progress.stage("finding the branches", len(branches))
        for linear in branches:
            factor = Invertible(linear.spec.rank)
            self.axes.branches[_key(linear.name)] = factor
            linear.begin_branch(factor)
            self.progress.advance()
        # Branches begin on the axes that suit the first inputs to come: always these, however often a run is resumed.
        self._loss(0)
        for linear in branches:
            linear.balance_unseen()

    def _find_kept(self) -> None:
        """Matrices of the layers that are not rounded have to follow the axes, too."""
        names = {tensor.module for tensor in self.plan.tensors if tensor.kind == "body" and tensor.spec is None}
        for index in range(len(self.stream)):
            names |= {f"{self.family.layers}.{index}.{router}" for s in self.family.inputs for router in s.routers}
        for name in sorted(names):
            if f"{name}.weight" in self.source.names():
                bias = f"{name}.bias"
                found = self.source.tensor(bias) if bias in self.source.names() else None
                self.kept[name] = (self.source.tensor(f"{name}.weight"), found)

    def _move(self) -> torch.Tensor | None:
        """Put the axes of the moment into the model; the residual stream's rotation, if it is turned.

        All that happens to inputs behind a norm is one matrix, which takes a single product with the weight where its
        factors would go over it one by one. It is made here, as layers may be computed twice.
        """
        live, maps = self.axes.equivalent(), dict[str, torch.Tensor]()
        for linear in self.linears.values():
            linear.axes = live
            if linear.behind_norm and linear.unit not in maps:
                maps[linear.unit] = linear.map_onto()
            linear.onto, linear.moved_ahead = maps.get(linear.unit), None
        for name in self.axes.start.gains:
            _set(self.stream.model.get_submodule(name), "weight", live.gain(name))
        for name, (weight, bias) in self.kept.items():
            module = self.stream.model.get_submodule(name)
            _set(module, "weight", live.outputs(live.columns(weight, name), name))
            if bias is not None:
                _set(module, "bias", live.outputs(bias, name))
        return live.transform.residual

    def _loss(self, batch: int) -> torch.Tensor:
        """The divergence over one batch of windows."""
        residual = self._move()
        hidden = self.embed(self.ids.split(WINDOWS_PER_STEP)[batch])
        hidden = hidden if residual is None else hidden @ residual
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for index in range(len(self.stream)):
                layer = partial(self.stream.call_layer, index)
                if self.keeps_moved and torch.is_grad_enabled():
                    for linear in self.layers[index]:
                        linear.moved_ahead = linear.moved()
                hidden = checkpoint(layer, hidden, use_reentrant=False) if self.recompute else layer(hidden)
        norm = self.stream.model.get_submodule(self.family.final_norm)
        last = norm(hidden).flatten(0, 1)
        if residual is not None:
            last = last @ residual.T * self.gain
        return Divergence.apply(last, self.head, self.teacher.hidden(batch), self.head)

    def _learn(self) -> dict[str, Any]:
        """Descend until the steps are used up or the held-out windows gain no more; leaves the best axes in place."""
        parameters = dict(self.axes.named_parameters())
        state = Descent(parameters, 1.0, self.work / STATE, {name: self.axes.rate(name) for name in parameters})
        state.restore()
        steps = int(self.plan.options["learn_steps"])
        self.progress.stage("learning the axes", steps)
        self.progress.advance(state.step)

        def stepped() -> None:
            self.axes.restrain()
            self.progress.advance()

        def looked(divergence: float) -> None:
            health = self._health()
            self.progress.note(
                f"learning, step {state.step}: divergence {divergence:.5f}, rotations off by "
                f"{health['deviation']:.1e}, condition {health['condition']:.3g} at most"
            )

        state.run(self._loss, len(self.stream.batches), steps, stepped, looked)
        tokens = WINDOWS_PER_STEP * self.windows.shape[1]
        return {"steps": state.step, "tokens_per_step": tokens, "history": state.history, **self._health()}

    def _health(self) -> dict[str, float]:
        return {"deviation": self.axes.deviation(), "condition": self.axes.condition()}

    @torch.no_grad()
    def _store(self) -> None:
        """The rows of U that rounding starts from, and the transform, its rotation orthogonal to float64: the last
        file, which says that all is done."""
        found = self.axes.transform()
        branches = {name: linear.down() for name, linear in self.linears.items() if linear.start is not None}
        write_tensors(self.work / BRANCHES, branches)
        if found.residual is not None:
            left, _, right = torch.linalg.svd(found.residual.double())
            found = replace(found, residual=left @ right)
        found.save(self.work / TRANSFORM)


def moved_bytes(plan: Plan) -> int:
    """What the weights on the axes of the moment take."""
    return 4 * sum(tensor.weights for tensor in plan.tensors if tensor.kind == "body")


def weight_bytes(plan: Plan) -> int:
    """What a step keeps of the weights for the way back."""
    return WEIGHT_COPIES * moved_bytes(plan)


def _set(module: Any, name: str, tensor: torch.Tensor) -> None:
    """Let a module compute with a tensor that is not its own parameter."""
    module._parameters.pop(name, None)
    setattr(module, name, tensor)
