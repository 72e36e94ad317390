"""Blockwise Walsh-Hadamard rotation with random signs.

With `H` the orthonormal Walsh-Hadamard matrix of `block` points (symmetric, its own inverse) applied
block by block and `s` a vector of signs, weights become `W' = (W diag s) H` and activations
`x' = H (s * x)`, so that `W x == W' x'`. This module holds the transform and both placements of it;
formats see only what is already rotated.
"""

from __future__ import annotations

import functools
import math

from fewbit.torch_later import torch

MAX_BLOCK = 256
MIN_BLOCK = 32


def rotation_block(cols: int, max_block: int = MAX_BLOCK) -> int:
    """The largest power of two that divides `cols`, at most `max_block`."""
    if cols < 1:
        raise ValueError(f"a rotation needs at least one input, got {cols}")
    return min(cols & -cols, max_block)


def scale_group(cols: int, block: int, limit: int = 256) -> int:
    """The largest multiple of `block` that is at most `limit` and divides `cols`."""
    for multiple in range(limit // block, 0, -1):
        if cols % (multiple * block) == 0:
            return multiple * block
    raise ValueError(f"block {block} does not divide {cols}")


def random_signs(cols: int, seed: int) -> torch.Tensor:
    """A reproducible vector of +1 and -1, float32 `[cols]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (cols,), generator=generator).float() * 2 - 1


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Pack signs `[K]` into bits, uint8 `[ceil(K / 8)]`: bit `j % 8` of byte `j // 8` is set where sign j is -1."""
    negative = torch.nn.functional.pad((signs < 0).to(torch.uint8), (0, -signs.numel() % 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (negative.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_signs(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """The inverse of `pack_signs`: float32 `[cols]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:cols].float()


def fwht(x: torch.Tensor, block: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of the last axis, block by block.

    `x` is any floating tensor `[..., K]` with `block` (a power of two) dividing K; the result has its
    shape and dtype. The transform is its own inverse and preserves norms. Blocks of up to 256 points run as
    one matrix product, which is faster in torch than eight passes of butterflies.
    """
    cols = x.shape[-1]
    if block < 1 or block & (block - 1):
        raise ValueError(f"the block must be a power of two, got {block}")
    if cols % block:
        raise ValueError(f"{cols} inputs are not a multiple of the rotation block {block}")
    inner = min(block, MAX_BLOCK)
    y = x.reshape(-1, block // inner, inner) @ hadamard_matrix(inner).to(x)
    if block > inner:
        # H of a product of sizes is a Kronecker product, so the other factor acts on the other axis.
        y = fwht(y.transpose(1, 2), block // inner).transpose(1, 2)
    return y.reshape(x.shape)


@functools.cache
def hadamard_matrix(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix, float64 `[size, size]`, `size` a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def rotate(x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """`H (s * x)` along the last axis: activations `[..., K]` or, row by row, weights `[N, K]`."""
    return fwht(x * signs.to(x.dtype), block)


def unrotate(x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of `rotate`: the paper's weight-side placement, which gives plain weights back."""
    return fwht(x, block) * signs.to(x.dtype)


def rotate_hessian(hessian: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """The second moment of the rotated inputs, `H S E[x x'] S H`, float `[K, K]`."""
    half = rotate(hessian, signs, block)
    return rotate(half.transpose(0, 1).contiguous(), signs, block)


def rotate_moment(moment: torch.Tensor, signs: torch.Tensor, block: int) -> None:
    """`rotate_hessian` of a float32 `[K, K]` in its own place, some rows at a time."""
    rows = max(block, MAX_BLOCK)
    for start in range(0, moment.shape[0], rows):
        part = moment[start : start + rows]
        # From the right, and then from the left: blocks of rows are turned as those of columns are.
        part.copy_(rotate(part, signs, block))
        part.copy_(rotate(part.T.contiguous(), signs[start : start + rows], block).T)
