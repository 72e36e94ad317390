"""The specification of every operator, in plain torch and in the order of operations native code follows.

Float operations are rounded one by one to float32, so native results equal these bit for bit.
"""

from __future__ import annotations

import torch

from fewbit.formats.int4 import unpack_nibbles
from fewbit.formats.trellis import TILE, from_stream, unpack_windows, window_values
from fewbit.math.hadamard import unpack_signs
from fewbit.ops.gpu_layouts import CODES_OF, tile_values
from fewbit.ops.layouts import from_lanes
from fewbit.ops.schemas import LARGEST, PLAIN

SMALLEST = 1e-30  # groups whose largest magnitude is below this count as zero


def butterflies(x: torch.Tensor, block: int) -> torch.Tensor:
    """The Walsh-Hadamard transform of float32 `[T, K]` by blocks: sums and differences at distance 1, 2, 4, ...,
    then one product with `1 / sqrt(block)` rounded to float32. A block of 1 changes nothing."""
    tokens, cols = x.shape
    stride = 1
    while stride < block:
        low, high = x.view(tokens, cols // (2 * stride), 2, stride).unbind(2)
        x = torch.stack([low + high, low - high], 2).view(tokens, cols)
        stride *= 2
    return x * torch.tensor(block, dtype=torch.float64).rsqrt().float()


def exp_minus(x: torch.Tensor) -> torch.Tensor:
    """`exp(-x)` of float32 `x`, limited to [-89, 86] first; infinity below -88.73, within 1 ulp above.

    With `n = nearest(-x / ln 2)` and `r = x + n ln 2`, ln 2 being split in two so that n's product with the larger
    part is exact, it is `2^n (1 - r + r^2 p(r))` with the polynomial p whose largest relative error is smallest.
    """
    x = x.clamp(-89.0, 86.0)
    shifted = x * -1.44269502 + 12583038.0  # 1.5 * 2^23 + 126: leaves n + 126 in the low bits
    n = shifted - 12583038.0
    r = (x + n * 0.693145752) + n * 1.4286068e-06
    square = r * r
    upper = ((square * 0.00138214685 + r * -0.00836866256) + 0.0416682549) * square
    lower = r * -0.166665211 + 0.49999994
    p = ((upper + lower) * square - r) + 1.0
    return (p + p) * (shifted.view(torch.int32) << 23).view(torch.float32)  # n + 126 as the exponent: 2^(n - 1)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up` in float32, for float tensors of one shape.

    Both activations are `gate / (1 + exp(-t))`: "silu" with `t = gate`; "gelu_tanh", GELU in its tanh form, with
    `t = 2 sqrt(2 / pi) (gate + 0.044715 gate^3)`, which is the tanh written as an exponential.
    """
    gate = gate.float()
    t = gate * (gate * gate * 0.0713548139 + 1.59576917) if activation == "gelu_tanh" else gate
    return gate / (exp_minus(t) + 1.0) * up.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x * (1 / sqrt(mean(x^2) + eps)) * weight` in float32, for float `x [T, K]` and `weight [K]`.

    The squares go into 64 interleaved partial sums (sum l takes columns l, l + 64, ... in order), whose upper half
    is added to the lower one until one is left. A row of zeros needs eps > 0.
    """
    x = x.float()
    partial = torch.zeros(x.shape[0], 64, device=x.device)
    for columns in torch.nn.functional.pad(x * x, (0, -x.shape[1] % 64)).split(64, 1):
        partial = partial + columns
    while partial.shape[1] > 1:
        low, high = partial.chunk(2, 1)
        partial = low + high
    mean = partial / torch.full_like(partial, x.shape[1])
    root = (mean + eps).double().sqrt().float()  # torch's own float32 root is not always the nearest
    return x * (torch.ones_like(root) / root) * weight.float()


def rotate_quantize(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift and rotate inputs and quantize them to 8 or 4 bits, symmetrically, one scale per token and group.

    `x` is float `[T, K]`, from which `shift`, float `[K]`, is subtracted first (None: nothing), `signs` packed bits
    uint8 `[ceil(K / 8)]` (None: all +1), `block` 32, 64, 128 or 256, or 1 for no rotation, which takes no signs;
    `group` is a multiple of 32 up to 256 and a multiple or a divisor of the block. Returns `q` int8 `[T, K]`, `scale`
    float32 `[T, K / group]` (largest magnitude / m) and `sums` int32 `[T, K / group]`, the sums of q's groups. q is
    `rotated * (m / largest)`, at most 127 or 7, rounded to the nearest, ties to even.
    m is 127 for 8 bits. For 4 bits it is 8 where the value of the largest magnitude is negative (or both signs have
    it) and -8 elsewhere, so that this value becomes -8 and all sixteen levels are used. A group whose largest
    magnitude is below 1e-30 gets scale 0, one that holds NaN or infinity scale NaN; q is 0 in both.
    """
    tokens, cols = x.shape
    y = x.float()
    if shift is not None:
        y = y - shift.float()
    if signs is not None:
        y = y * unpack_signs(signs, cols)
    y = butterflies(y, block).view(tokens, cols // group, group)
    largest = y.abs().amax(2)
    usable = torch.isfinite(largest) & (largest >= SMALLEST)
    whole = torch.full_like(largest, LARGEST[bits])  # a tensor: torch turns `127 / x` into two roundings
    if bits == 4:
        whole = torch.where(y.amin(2) == -largest, 8.0, -8.0)
    inverse = torch.where(usable, whole / largest, torch.zeros_like(largest))
    levels = (y * inverse[..., None]).clamp(max=LARGEST[bits]).round()
    q = torch.where(usable[..., None], levels, torch.zeros_like(y)).to(torch.int8)
    scale = torch.where(usable, largest / whole, torch.zeros_like(largest))
    scale = torch.where(torch.isfinite(largest), scale, torch.full_like(scale, torch.nan))
    return q.view(tokens, cols), scale, q.sum(2, dtype=torch.int32)


def rms_norm_rotate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rms_norm`, then `rotate_quantize`."""
    return rotate_quantize(rms_norm(x, weight, eps), signs, block, group, bits, shift)


def gated_rotate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gated`, then `rotate_quantize`."""
    return rotate_quantize(gated(gate, up, activation), signs, block, group, bits, shift)


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
    if code in CODES_OF:
        return CODES_OF[code](codes, tables, rows, groups)
    streams = codes.reshape(codes.shape[0] * groups, 2 * bits * group)
    by_window = tile_values(tables) if code == "tiles" else window_values(tables)
    values = from_stream(by_window[unpack_windows(streams, bits)])
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

    `q` lies within +-127, as inputs are quantized; kernels may take -128 for another number.

    `q`, `scale`, `sums` as from `rotate_quantize`; `codes`, `scales`, `tensor_scale` and, for the trellis, `tables` as
    the format stores them: `code` is "trellis" (2, 3 or 4 bits), "lanes" (the same, rearranged: ops/layouts.py),
    "nibbles" (the int4 format), or "tiles", "ternary" or "iq3_s" (ops/gpu_layouts.py). `bias` is float `[N]` or None.
    Per (token, row, group) the integer dot product is exact; it is multiplied by `(scales * tensor_scale) * scale`,
    groups are added in order, the bias is added, all in float32. `sums` is what native code needs and what this
    function does not.
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
    act_bits: int = 8,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotate_quantize` to `act_bits`, then `packed_linear`: inputs `[..., K]` to outputs `[..., N]` of the inputs'
    dtype. With 16 bits the inputs are shifted, rotated and rounded to their dtype, and that is all."""
    rows = x.reshape(-1, x.shape[-1])
    if act_bits == PLAIN:
        inputs = rotated(rows, signs, block, shift).float()
        y = inputs @ float_weights(codes, scales, tensor_scale, tables, x.shape[-1], bits, code).T
        y = (y if bias is None else y + bias.float()).to(x.dtype)
        return y.view(*x.shape[:-1], scales.shape[0])
    q, scale, sums = rotate_quantize(rows, signs, block, x.shape[-1] // scales.shape[1], act_bits, shift)
    y = packed_linear(q, scale, sums, codes, scales, tensor_scale, tables, bias, bits, code, x.dtype)
    return y.view(*x.shape[:-1], scales.shape[0])


def rotated(x: torch.Tensor, signs: torch.Tensor | None, block: int, shift: torch.Tensor | None) -> torch.Tensor:
    """Inputs `[T, K]` shifted and rotated in float32, in their dtype."""
    y = x.float() if shift is None else x.float() - shift.float()
    if signs is not None:
        y = y * unpack_signs(signs, x.shape[1])
    return butterflies(y, block).to(x.dtype)


def float_weights(
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    cols: int,
    bits: int,
    code: str,
) -> torch.Tensor:
    """The weights that a packed matrix stands for, float32 `[N, K]`, on the inputs' rotated axes."""
    rows, groups = scales.shape
    integers = integer_weights(codes, tables, (rows, groups, cols // groups), bits, code).float()
    return (integers * (scales.float() * tensor_scale)[:, :, None]).view(rows, cols)


def linear_inverse(
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
    """The same product with the rotation on the weights' side, as ITQ3_S (arXiv 2603.27914) has it: weights are decoded
    and turned back, and multiply inputs `[..., K]` as they are; outputs `[..., N]` in the inputs' dtype."""
    cols = x.shape[-1]
    weight = butterflies(float_weights(codes, scales, tensor_scale, tables, cols, bits, code), block)
    if signs is not None:
        weight = weight * unpack_signs(signs, cols)
    y = x.reshape(-1, cols).float() @ weight.T
    y = (y if bias is None else y + bias.float()).to(x.dtype)
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
    act_bits: int = 8,
    shift: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """`linear` with several matrices that read the same inputs, as q/k/v and gate/up do: one output each."""
    matrices = zip(codes, scales, tensor_scale, tables, bias, bits, strict=True)
    return [
        linear(x, c, s, t, table, signs, b, width, block, code, act_bits, shift)
        for c, s, t, table, b, width in matrices
    ]


def twin_linear(
    x: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    signs: torch.Tensor | None,
    bias: torch.Tensor | None,
    block: int,
    act_bits: int = 8,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """A low-rank part and a residual, both 4-bit, as one product: TwinQuant (arXiv 2606.01556).

    `down_*` are the int4 parts of `[r, K]` (the paper's U, transposed), the others those of `[N, K + r]`, the residual
    and V side by side. Inputs `[..., K]` are shifted, rotated and quantized to `act_bits`; their product with `down` in
    float32 is quantized in the same groups, unrotated, and follows them as r more inputs of the second product.
    With 16 bits both are rounded to the inputs' dtype instead. Outputs `[..., N]` have the inputs' dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    group = x.shape[-1] // down_scales.shape[1]
    if act_bits == PLAIN:
        plain = rotated(rows, signs, block, shift)
        down = float_weights(down_codes, down_scales, down_scale, None, x.shape[-1], 4, "nibbles")
        plain = torch.cat([plain, (plain.float() @ down.T).to(x.dtype)], 1)
        both = float_weights(codes, scales, tensor_scale, None, plain.shape[1], 4, "nibbles")
        y = plain.float() @ both.T
        y = (y if bias is None else y + bias.float()).to(x.dtype)
        return y.view(*x.shape[:-1], scales.shape[0])
    inputs = rotate_quantize(rows, signs, block, group, act_bits, shift)
    h = packed_linear(*inputs, down_codes, down_scales, down_scale, None, None, 4, "nibbles", torch.float32)
    joined = [torch.cat(pair, 1) for pair in zip(inputs, rotate_quantize(h, None, 1, group, act_bits), strict=True)]
    q, scale, sums = joined
    y = packed_linear(q, scale, sums, codes, scales, tensor_scale, None, bias, 4, "nibbles", x.dtype)
    return y.view(*x.shape[:-1], scales.shape[0])
