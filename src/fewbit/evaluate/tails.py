"""How heavy the tails of a layer's weights are, before and after its rotation.

A code of few bits has no room for outliers; what is measured here is what the rotation does about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.checkpoint.source import Source
from fewbit.formats import TensorSpec, group_format
from fewbit.math.hadamard import rotate
from fewbit.math.rounding import quantize_rotated

EDGE, BINS = 8.0, 81
CELLS = 48
"""Cells of an outlier map at most, along the rows and along the columns."""


@dataclass(frozen=True)
class RotatedLayer:
    """A linear by the name of its weight, how it is stored, and the signs of its rotation, float32 `[cols]`."""

    name: str
    spec: TensorSpec
    signs: torch.Tensor


def unit_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`[N, K]` with every run of `group` inputs of a row divided by its root mean square (zeros stay zeros)."""
    grouped = weight.float().view(weight.shape[0], -1, group)
    return (grouped / grouped.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)).view(weight.shape)


def kurtosis(values: torch.Tensor) -> float:
    """Fourth moment over squared second moment: 3 for a normal distribution, more for heavier tails."""
    centred = (values - values.mean()).double()
    return float(centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-300))


def density(values: torch.Tensor, edge: float = EDGE, bins: int = BINS) -> list[float]:
    """Share of the values per unit of width in `bins` equal bins over [-edge, edge]; those outside count too."""
    counts = torch.histc(values.float(), bins=bins, min=-edge, max=edge)
    return (counts.double() / values.numel() / (2 * edge / bins)).tolist()


def heaviest_tails(
    source: Source, layers: Sequence[RotatedLayer], progress: Callable[[int, int], None] | None = None
) -> RotatedLayer:
    """The layer of the highest kurtosis; `progress` takes (layers read, layers in all)."""
    worst, highest = layers[0], -math.inf
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(number, len(layers))
        found = kurtosis(unit_groups(source.tensor(layer.name), layer.spec.group))
        if found > highest:
            worst, highest = layer, found
    if progress is not None:
        progress(len(layers), len(layers))
    return worst


@torch.inference_mode()
def tails(layer: RotatedLayer, weight: torch.Tensor) -> dict[str, Any]:
    """Histogram, kurtosis and outliers of one layer's `weight [N, K]`, plain and rotated."""
    spec = layer.spec
    plain = {"before": weight.float(), "after": rotate(weight.float(), layer.signs, spec.block)}
    grouped = {name: unit_groups(values, spec.group) for name, values in plain.items()}
    width = 2 * EDGE / BINS
    return {
        "tensor": layer.name,
        "rows": spec.rows,
        "cols": spec.cols,
        "block": spec.block,
        "group": spec.group,
        "centers": [-EDGE + width * (index + 0.5) for index in range(BINS)],
        **{name: density(values) for name, values in grouped.items()},
        **{f"kurtosis_{name}": kurtosis(values) for name, values in grouped.items()},
        **{f"outliers_{name}": outlier_map(values) for name, values in plain.items()},
        **{f"largest_{name}": round(float(values.abs().max() / rms(values)), 3) for name, values in plain.items()},
    }


@torch.inference_mode()
def rounding_errors(layer: RotatedLayer, weight: torch.Tensor) -> dict[str, float]:
    """The relative errors of rounding `weight [N, K]` to the nearest point of its code, plain and rotated."""
    spec = layer.spec
    fmt = group_format(spec.format)
    return {
        "error_before": quantize_rotated(fmt, weight, spec).relative_error,
        "error_after": quantize_rotated(fmt, rotate(weight, layer.signs, spec.block), spec).relative_error,
    }


def rms(values: torch.Tensor) -> float:
    """The root mean square, at least a tiny positive number."""
    return max(1e-30, float(values.double().square().mean().sqrt()))


def outlier_map(weight: torch.Tensor, cells: int = CELLS) -> list[list[float]]:
    """The largest |w| of every cell of `weight [N, K]` over the matrix's root mean square, as rows of cells.

    Cells are equal parts of the rows and of the columns, at most `cells` of each.
    """
    shape = [min(cells, size) for size in weight.shape]
    largest = torch.nn.functional.adaptive_max_pool2d(weight.float().abs()[None], shape)[0]
    return [[round(value, 2) for value in row] for row in (largest / rms(weight)).tolist()]
