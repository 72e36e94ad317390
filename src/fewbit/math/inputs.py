"""What quantized inputs are worth: the floats that a kernel's integers and scales stand for."""

from __future__ import annotations

from fewbit.math.hadamard import rotate, unpack_signs
from fewbit.torch_later import torch


def straight_through(x: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """Values rounded to nearest in groups along the last axis, as inputs are (8 or 4 bits; 16 round nothing), in a form
    that gradients pass unchanged."""
    if bits == 16:
        return x
    with torch.no_grad():
        groups = x.view(*x.shape[:-1], -1, group)
        if bits == 4:
            least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = torch.where(most > -least, most, least) / -8
            low, high = -8, 7
        else:
            scale, low, high = groups.abs().amax(-1, keepdim=True) / 127, -127, 127
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        error = ((groups / scale).round_().clamp_(low, high) * scale).view(x.shape) - x
    return x + error


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
