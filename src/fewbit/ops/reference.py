"""The specification of every operator, in plain torch and in the order of operations native code follows.

Float operations are rounded one by one to float32, so native results equal these bit for bit.
"""

from __future__ import annotations

import torch

from fewbit.formats.int4 import unpack_nibbles
from fewbit.formats.trellis import TILE, from_stream, unpack_windows, window_values
from fewbit.math.hadamard import unpack_signs
from fewbit.ops.layouts import from_lanes

QMAX = 127
SMALLEST = 1e-30  # groups whose largest magnitude is below this count as zero


def butterflies(x: torch.Tensor, block: int) -> torch.Tensor:
    """The Walsh-Hadamard transform of float32 `[T, K]` by blocks: sums and differences at distance 1, 2, 4, ...,
    then one product with `1 / sqrt(block)` rounded to float32."""
    tokens, cols = x.shape
    stride = 1
    while stride < block:
        low, high = x.view(tokens, cols // (2 * stride), 2, stride).unbind(2)
        x = torch.stack([low + high, low - high], 2).view(tokens, cols)
        stride *= 2
    return x * torch.tensor(block, dtype=torch.float64).rsqrt().float()


def rotate_quantize(
    x: torch.Tensor, signs: torch.Tensor | None, block: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate inputs and quantize them to 8 bits, symmetrically, one scale per token and group.

    `x` is float `[T, K]`, `signs` packed bits uint8 `[ceil(K / 8)]` (None: all +1). Returns `q` int8 `[T, K]`,
    `scale` float32 `[T, K / group]` (largest magnitude / 127) and `sums` int32 `[T, K / group]`, the sums of
    q's groups. q is `rotated * (127 / largest)` rounded to the nearest, ties to even. A group whose largest
    magnitude is below 1e-30 gets scale 0, one that holds NaN or infinity scale NaN; q is 0 in both.
    """
    tokens, cols = x.shape
    y = x.float()
    if signs is not None:
        y = y * unpack_signs(signs, cols)
    y = butterflies(y, block).view(tokens, cols // group, group)
    largest = y.abs().amax(2)
    usable = torch.isfinite(largest) & (largest >= SMALLEST)
    most = torch.full_like(largest, QMAX)  # a tensor: torch turns `127 / x` into two roundings
    inverse = torch.where(usable, most / largest, torch.zeros_like(largest))
    q = torch.where(usable[..., None], (y * inverse[..., None]).round(), torch.zeros_like(y)).to(torch.int8)
    scale = torch.where(usable, largest / most, torch.zeros_like(largest))
    scale = torch.where(torch.isfinite(largest), scale, torch.full_like(scale, torch.nan))
    return q.view(tokens, cols), scale, q.sum(2, dtype=torch.int32)


def integer_weights(
    codes: torch.Tensor, tables: torch.Tensor | None, shape: tuple[int, int, int], bits: int, code: str
) -> torch.Tensor:
    """The integers that `codes` stand for, before any scale, in their shape `[N, K / group, group]`."""
    rows, groups, group = shape
    if code == "lanes":
        codes = from_lanes(codes, -(-rows // TILE), groups * group, bits)
    if code == "nibbles":
        return unpack_nibbles(codes, rows, groups).view(rows, groups, -1)
    if tables is None:
        raise ValueError("the trellis needs its tables, int8 [40]")
    streams = codes.reshape(codes.shape[0] * groups, 2 * bits * group)
    values = from_stream(window_values(tables)[unpack_windows(streams, bits)])
    return values.view(codes.shape[0], groups, TILE, -1).transpose(1, 2).reshape(-1, groups, group)[:rows]


def packed_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    code: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of quantized inputs with a packed matrix, `[T, N]` in `dtype`.

    `q`, `scale`, `sums` as from `rotate_quantize`; `codes`, `scales`, `tensor_scale` and, for the trellis, `tables` as
    the format stores them: `code` is "trellis" (2, 3 or 4 bits), "lanes" (the same, rearranged: ops/layouts.py) or
    "nibbles" (the int4 format). `bias` is float `[N]` or None. Per (token, row, group) the integer dot product is
    exact; it is multiplied by `(scales * tensor_scale) * scale`, groups are added in order, the bias is added, all in
    float32. `sums` is what native code needs and what this function does not.
    """
    rows, groups = scales.shape
    tokens, cols = q.shape
    group = cols // groups
    weights = integer_weights(codes, tables, (rows, groups, group), bits, code).double()
    weight_scale = scales.float() * tensor_scale.float()
    total = torch.zeros(tokens, rows, dtype=torch.float32, device=q.device)
    for g in range(groups):
        dots = q[:, g * group : (g + 1) * group].double() @ weights[:, g].T
        total = total + dots.float() * (weight_scale[:, g] * scale[:, g, None])
    if bias is not None:
        total = total + bias.float()
    return total.to(dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    signs: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    code: str = "trellis",
) -> torch.Tensor:
    """`rotate_quantize`, then `packed_linear`: inputs `[..., K]` to outputs `[..., N]` of the inputs' dtype."""
    rows = x.reshape(-1, x.shape[-1])
    q, scale, sums = rotate_quantize(rows, signs, block, x.shape[-1] // scales.shape[1])
    y = packed_linear(q, scale, sums, codes, scales, tensor_scale, tables, bias, bits, code, x.dtype)
    return y.view(*x.shape[:-1], scales.shape[0])


def linears(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    tensor_scale: list[torch.Tensor],
    tables: list[torch.Tensor | None],
    signs: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    bits: list[int],
    block: int,
    code: str = "trellis",
) -> list[torch.Tensor]:
    """`linear` with several matrices that read the same inputs, as q/k/v and gate/up do: one output each."""
    matrices = zip(codes, scales, tensor_scale, tables, bias, bits, strict=True)
    return [linear(x, c, s, t, table, signs, b, width, block, code) for c, s, t, table, b, width in matrices]
