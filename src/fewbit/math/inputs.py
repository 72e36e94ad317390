"""What quantized inputs are worth: the floats that a kernel's integers and scales stand for."""

from __future__ import annotations

from fewbit.math.hadamard import rotate, unpack_signs
from fewbit.torch_later import torch


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
