"""Chooses how much the diagonal of a Hessian is raised before error feedback trusts it.

Too little follows the noise of a short calibration text, too much wastes what the text tells; held-out tokens
decide, on a sample of rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fewbit.checkpoint.source import Source, SourceRows
from fewbit.formats import GroupFormat, get_format, group_format
from fewbit.formats.base import InputStatistics
from fewbit.math.hadamard import rotate
from fewbit.math.rounding import inverse_factor, quantize_rotated
from fewbit.pipeline.jobs import tensor_signs
from fewbit.pipeline.plan import PlannedTensor

USUAL = 0.01
CANDIDATES = (0.003, USUAL, 0.03, 0.1)
WORTH = 0.99  # another candidate has to leave less than this share of the usual one's error
SAMPLE_ROWS, SAMPLE_COLS = 64, 2048


def choose_damping(source: Source, tensors: Sequence[PlannedTensor], inputs: InputStatistics) -> float:
    """The candidate with the least output error on held inputs, or the usual one where that is a matter of luck.

    `tensors` read the input that `inputs` tell of; the held ones are taken out of the Hessian for the choice. Formats
    that round whole matrices get the usual damping.
    """
    hessian, held, tokens = inputs.hessian, inputs.held, inputs.tokens
    cols = min(hessian.shape[0], SAMPLE_COLS)
    grouped = all(tensor.spec and isinstance(get_format(tensor.spec.format), GroupFormat) for tensor in tensors)
    if held.shape[0] >= tokens or not grouped:
        return USUAL
    samples = []
    for tensor in tensors:
        assert tensor.spec is not None
        cols = min(cols, max(tensor.spec.group, SAMPLE_COLS // tensor.spec.group * tensor.spec.group))
        samples.append((tensor.spec, _sample(source, tensor)))
    seen = held[:, :cols]
    rest = (hessian[:cols, :cols] * tokens - seen.T @ seen) / (tokens - held.shape[0])
    losses: dict[float, float] = {}
    for damping in CANDIDATES:
        factor = inverse_factor(rest, damping)
        loss = 0.0
        for spec, weight in samples:
            weight = weight[:, :cols]
            small = replace(spec, rows=weight.shape[0], cols=cols)
            values = quantize_rotated(group_format(spec.format), weight, small, factor).values
            loss += float((seen @ (values - weight).T).double().square().sum())
        losses[damping] = loss
    best = min(losses, key=losses.__getitem__)
    return best if losses[best] < WORTH * losses[USUAL] else USUAL


def _sample(source: Source, tensor: PlannedTensor) -> torch.Tensor:
    """Some rows from the middle of a matrix, rotated."""
    assert tensor.spec is not None
    start = max(0, (tensor.shape[0] - SAMPLE_ROWS) // 2)
    rows = SourceRows(source, tensor.name)[start : min(start + SAMPLE_ROWS, tensor.shape[0])]
    signs = tensor_signs(tensor)
    return rows if signs is None else rotate(rows, signs, tensor.spec.block)
