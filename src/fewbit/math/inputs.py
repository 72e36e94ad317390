"""What quantized inputs are worth: the floats that a kernel's integers and scales stand for."""

from __future__ import annotations

from fewbit.math.hadamard import rotate, unpack_signs
from fewbit.torch_later import torch


def straight_through(x: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """Values rounded to nearest in groups along the last axis, as inputs are (8 or 4 bits; 16 round nothing), in a form
    that gradients pass: the integers stand still, and the scales move with the values that set them.

    So a loss tells values that make a group's scale larger from those that do not; with scales that stand still,
    too, rounding noise would look as if it were the same whatever is learned.
    """
    if bits == 16:
        return x
    groups = x.view(*x.shape[:-1], -1, group)
    # Gradients go to one value of a group, where those of amin and amax would be shared among equals.
    least, most = groups.min(-1, keepdim=True).values, groups.max(-1, keepdim=True).values
    largest = torch.where(most > -least, most, least)
    scale, low, high = (largest / -8, -8, 7) if bits == 4 else (largest / 127, -127, 127)
    with torch.no_grad():
        exact = groups / torch.where(scale == 0, torch.ones_like(scale), scale)
        error = exact.round().clamp_(low, high).sub_(exact)
    return x + (error * scale).view(x.shape)


def quantized_inputs(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Inputs `[T, K]` as the product with a packed matrix sees them, float32 on the rotated axes.

    Arguments as for `torch.ops.fewbit.rotate_quantize`, with packed `signs`; 16 bits round nothing.
    """
    # Imported here, because operators are specified in terms of formats, and formats use this.
    import fewbit.ops.cpu  # noqa: F401

    if bits == 16:
        moved = x.float() if shift is None else x.float() - shift.float()
        return moved if signs is None else rotate(moved, unpack_signs(signs, x.shape[1]), block)
    q, scale, _ = torch.ops.fewbit.rotate_quantize(x, signs, block, group, bits, shift)
    return (q.view(x.shape[0], -1, group).float() * scale[..., None]).view(x.shape)
