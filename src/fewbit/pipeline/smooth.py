"""Measures the scales that make a model's inputs cheapest to quantize, and keeps them as a transform.

After a rotation mixes the channels of a block, rounding noise has one size for all of them, as large as the block's
mean energy. With channels `x_i` of standard deviation `a_i` that meet columns of norm `b_i`, scaling by `t_i` (undone
in the weight) makes the noise of the outputs `sum(a_i^2 t_i^2) * sum(b_i^2 / t_i^2)`, which is least for
`t_i = sqrt(b_i / a_i)`. Norms' gains, up projections and value projections take the scales in, so they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.equivalent import Transform
from fewbit.checkpoint.source import Source
from fewbit.models import SharedInput, get_family
from fewbit.pipeline.calibrate import LayerStream
from fewbit.pipeline.progress import Progress

SCALES = "scales.safetensors"
WINDOWS = 16  # windows of calibration text that are enough for a variance
FLOOR = 1e-3  # of the mean deviation; channels that hardly move count as that
MOST = 100.0  # no scale is further from the typical one


class _Spread:
    """Mean and variance of the channels of an input."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros(0)
        self.squares = torch.zeros(0)

    def add(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        if not self.count:
            self.sums, self.squares = torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1]).double()
        self.count += x.shape[0]
        self.sums += x.sum(0)
        self.squares += x.square().sum(0)

    def deviations(self) -> torch.Tensor:
        mean = self.sums / self.count
        return (self.squares / self.count - mean.square()).clamp_min(0).sqrt()


def measure_scales(
    source: Source, windows: torch.Tensor, dtype: torch.dtype, work: Path, progress: Progress
) -> Transform:
    """The transform that smooths a model, from `windows` int64 `[n, window]`; found in `work` where it was made before.

    Layers run in full precision, one in memory, with products in `dtype`.
    """
    path = work / SCALES
    if path.exists():
        return Transform.load(path)
    stream = LayerStream(source, get_family(source.config.model_type), windows[:WINDOWS], dtype)
    progress.stage("measuring the inputs", len(stream))
    states = list(stream.embed())
    transform = Transform()
    for index in range(len(stream)):
        prefix = f"{stream.family.layers}.{index}"
        stream.load(prefix)
        states = _layer(stream, index, states, transform)
        stream.unload(prefix)
        progress.advance()
    transform.save(path)
    return transform


def _layer(stream: LayerStream, index: int, states: list[torch.Tensor], transform: Transform) -> list[torch.Tensor]:
    """Run a layer, and enter the scales of its inputs."""
    prefix = f"{stream.family.layers}.{index}"
    layer = stream.model.get_submodule(prefix)
    modules = dict(layer.named_modules())
    inputs = [(shared, _linears(modules, shared)) for shared in stream.family.inputs]
    spreads: dict[str, _Spread] = {}
    handles = []
    for shared, linears in inputs:
        if shared.norm and linears:
            spread = spreads.setdefault(shared.norm, _Spread())
            handles.append(modules[shared.norm].register_forward_hook(_outputs_to(spread)))
        for name in linears if not shared.norm else ():
            handles.append(modules[name].register_forward_pre_hook(_inputs_to(spreads.setdefault(name, _Spread()))))
    states = [stream.run_layer(index, state) for state in states]
    for handle in handles:
        handle.remove()
    for shared, linears in inputs:
        if shared.norm and linears:
            counted = [name for name in linears if any(name == other.values for other in stream.family.inputs)]
            scale = _balance(spreads[shared.norm].deviations(), [modules[name] for name in counted or linears])
            gain = modules[shared.norm].weight.double() * scale
            # A channel that its norm closes stays closed: the weight takes the old gain in.
            transform.gains[f"{prefix}.{shared.norm}"] = torch.where(gain == 0, torch.ones_like(gain), gain).float()
        for name in linears if not shared.norm else ():
            if not spreads[name].count:
                continue
            if shared.scaled_by:
                found = _balance(spreads[name].deviations(), [modules[name]])
                transform.scales[f"{prefix}.{name}"] = found.float()
            elif shared.values:
                heads, size = _heads(stream, modules[shared.values])
                found = _head_balance(spreads[name].deviations(), modules[name], heads, size)
                transform.values[f"{prefix}.{name}"] = torch.diag_embed(found).float()
    return states


def _linears(modules: dict[str, Any], shared: SharedInput) -> list[str]:
    """The linears of an input that this layer has; those of all experts of a mixture."""
    found = []
    for name in shared.linears:
        before, star, after = name.partition("*")
        if not star:
            found += [name] if name in modules else []
            continue
        found += [other for other in modules if other.startswith(before) and other.endswith(after)]
    return found


def _balance(deviations: torch.Tensor, linears: list[Any]) -> torch.Tensor:
    """`sqrt(b / a)`, float64 `[K]`, with a geometric mean of 1."""
    columns = sum(linear.weight.double().square().sum(0) for linear in linears).sqrt()
    return _normalized(deviations, columns)


def _head_balance(deviations: torch.Tensor, linear: Any, heads: int, size: int) -> torch.Tensor:
    """The same for values, float64 `[heads, size]`: query heads that read the same values share their scales."""
    energy = deviations.square().view(heads, -1, size).mean(1)
    columns = linear.weight.double().square().sum(0).view(heads, -1, size).sum(1)
    return _normalized(energy.sqrt().flatten(), columns.sqrt().flatten()).view(heads, size)


def _normalized(deviations: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    a = deviations + FLOOR * deviations.mean().clamp_min(1e-30)
    b = columns + FLOOR * columns.mean().clamp_min(1e-30)
    scale = (b / a).sqrt()
    return (scale / scale.log().mean().exp()).clamp(1 / MOST, MOST)


def _heads(stream: LayerStream, values: Any) -> tuple[int, int]:
    """The number of key/value heads, and their size."""
    heads = int(stream.model.config.num_key_value_heads)
    return heads, values.weight.shape[0] // heads


def _outputs_to(spread: _Spread) -> Callable[[Any, Any, torch.Tensor], None]:
    return lambda module, inputs, output: spread.add(output)


def _inputs_to(spread: _Spread) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    return lambda module, inputs: spread.add(inputs[0]) if inputs[0].numel() else None
