"""Rounding to integers times a scale per group in a form that gradients pass: the integers stand still, and the scales
move with the values that set them.

So a loss tells values that make a group's scale larger from those that do not; with scales that stand still, too,
rounding noise would look as if it were the same whatever is learned.
"""

from __future__ import annotations

from typing import Any

import torch

from fewbit.ops.extension import load_native


def straight_through(x: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """Values `[..., K]` rounded to nearest in groups along the last axis, as inputs are, to 8 or 4 bits; 16 round
    nothing."""
    if bits == 16:
        return x
    if x.dtype == torch.float32 and load_native() is not None:
        return _Rounded.apply(x, group, bits)
    return reference(x, group, bits)


def reference(x: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """The same for 8 or 4 bits, of any floating type, in operations of torch."""
    groups = x.view(*x.shape[:-1], -1, group)
    # Gradients go to one value of a group, where those of amin and amax would be shared among equals.
    least, most = groups.min(-1, keepdim=True).values, groups.max(-1, keepdim=True).values
    largest = torch.where(most > -least, most, least)
    scale, low, high = (largest / -8, -8, 7) if bits == 4 else (largest / 127, -127, 127)
    with torch.no_grad():
        exact = groups / torch.where(scale == 0, torch.ones_like(scale), scale)
        error = exact.round().clamp_(low, high).sub_(exact)
    return x + (error * scale).view(x.shape)


class _Rounded(torch.autograd.Function):
    """The reference in one pass over float32 values each way, which keeps nothing but them."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: int, bits: int) -> torch.Tensor:
        x = x.contiguous()
        context.save_for_backward(x)
        context.group, context.bits = group, bits
        rows, out = x.view(-1, x.shape[-1]), torch.empty_like(x)
        native: Any = load_native()
        native.round_groups(rows.detach(), group, bits, out.view(rows.shape))
        return out

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,) = context.saved_tensors
        rows, out = x.view(-1, x.shape[-1]), torch.empty_like(x)
        gradient = gradients[0].contiguous().view(rows.shape)
        native: Any = load_native()
        native.round_groups_back(rows.detach(), gradient, context.group, context.bits, out.view(rows.shape))
        return out, None, None
