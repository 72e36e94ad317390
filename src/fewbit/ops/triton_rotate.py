"""Inputs on their way into a product, in Triton: norm or gate, shift, signs, Walsh-Hadamard transform, quantization.

The transform of up to 256 points is two products with matrices of 16 x 16 on the tensor cores. They take 11 bits of
an input at a time, so inputs are split in two; what is lost is below 2^-21 of a block's largest value.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2_HIGH = tl.constexpr(0.693145752)
LN2_LOW = tl.constexpr(1.4286068e-06)
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, ties to even
SMALLEST = tl.constexpr(1e-30)
NORM_COLS = tl.constexpr(1024)


@triton.jit
def signs_16(SPAN: tl.constexpr):
    """Walsh-Hadamard matrices of SPAN points along the diagonal of 16 x 16, float32, not normalized."""
    i = tl.arange(0, 16)
    both = i[:, None] & i[None, :] & (SPAN - 1)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    same = (i[:, None] // SPAN) == (i[None, :] // SPAN)
    return tl.where(same, 1 - 2 * (both & 1), 0).to(tl.float32)


@triton.jit
def hadamard(y, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    """The transform, not normalized, of float32 `[ROWS, COLS]` by blocks along the rows; ROWS x COLS is a multiple of
    256, COLS one of BLOCK. SHORT: the inputs have at most 11 significant bits."""
    ROWS: tl.constexpr = y.shape[0]
    COLS: tl.constexpr = y.shape[1]
    SQUARES: tl.constexpr = ROWS * COLS // 256
    y = tl.reshape(y, (SQUARES * 16, 16))
    PRECISION: tl.constexpr = "tf32" if SHORT else "tf32x3"
    y = tl.dot(y, signs_16(16), input_precision=PRECISION)
    y = tl.reshape(tl.permute(tl.reshape(y, (SQUARES, 16, 16)), (0, 2, 1)), (SQUARES * 16, 16))
    y = tl.dot(y, signs_16(BLOCK // 16), input_precision="tf32x3")
    y = tl.permute(tl.reshape(y, (SQUARES, 16, 16)), (0, 2, 1))
    return tl.reshape(y, (ROWS, COLS))


@triton.jit
def exp_minus(x):
    """`exp(-x)`, operation by operation as the specification has it."""
    x = tl.minimum(tl.maximum(x, -89.0), 86.0)
    shifted = x * -1.44269502 + 12583038.0
    n = shifted - 12583038.0
    r = (x + n * LN2_HIGH) + n * LN2_LOW
    square = r * r
    upper = ((square * 0.00138214685 + r * -0.00836866256) + 0.0416682549) * square
    lower = r * -0.166665211 + 0.49999994
    p = ((upper + lower) * square - r) + 1.0
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return (p + p) * power


@triton.jit
def gated(gate, up, KIND: tl.constexpr):
    """SiLU or GELU of `gate`, times `up`, float32."""
    t = gate
    if KIND == "gelu_tanh":
        t = gate * (gate * gate * 0.0713548139 + 1.59576917)
    return tl.div_rn(gate, exp_minus(t) + 1.0) * up


@triton.jit
def inverse_root(x, tokens, T, K, eps):
    """`1 / sqrt(mean(x^2) + eps)` of whole rows, float32 `[TOKENS]`."""
    total = tl.zeros((tokens.shape[0],), tl.float32)
    column = tl.arange(0, NORM_COLS)
    for first in range(0, K, NORM_COLS):
        mask = (tokens < T)[:, None] & (first + column < K)[None, :]
        row = tokens.to(tl.int64)[:, None] * K + first + column[None, :]
        part = tl.load(x + row, mask=mask, other=0).to(tl.float32)
        total += tl.sum(part * part, 1)
    root = tl.sqrt_rn(tl.div_rn(total, K.to(tl.float32)) + eps)
    return tl.div_rn(tl.full((tokens.shape[0],), 1.0, tl.float32), root)


@triton.jit
def rotated_tile(
    x, up, weight, shift, signs, tokens, inverse, T, K, tile,
    KIND: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
    HAS_SIGNS: tl.constexpr, HAS_SHIFT: tl.constexpr, SHORT: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Columns `tile * SPAN` to `(tile + 1) * SPAN` rotated, float32 `[TOKENS, TILE]`, zeros behind them, and int32
    `[TOKENS]`, not 0 where a token's inputs there are not all finite (which then count as zeros)."""
    column = tl.arange(0, TILE)
    col = tile * SPAN + column
    mask = (tokens < T)[:, None] & (column < SPAN)[None, :]
    place = tokens.to(tl.int64)[:, None] * K + col[None, :]
    y = tl.load(x + place, mask=mask, other=0).to(tl.float32)
    if KIND == "norm":
        gain = tl.load(weight + col, mask=column < SPAN, other=0).to(tl.float32)
        y = y * inverse[:, None] * gain[None, :]
    elif KIND != "plain":
        y = gated(y, tl.load(up + place, mask=mask, other=0).to(tl.float32), KIND)
    if HAS_SHIFT:
        y = y - tl.load(shift + col, mask=column < SPAN, other=0).to(tl.float32)[None, :]
        y = tl.where(mask, y, 0.0)
    finite = tl.abs(y) < float("inf")
    bad = tl.max(1 - finite.to(tl.int32), 1)
    y = tl.where(finite, y, 0.0)
    if HAS_SIGNS:
        bits = tl.load(signs + col // 8, mask=column < SPAN, other=0).to(tl.int32)
        y = tl.where(((bits >> (col % 8)) & 1)[None, :] != 0, -y, y)
    if BLOCK > 1:
        y = hadamard(y, BLOCK, SHORT) * NORMALIZED
    return y, bad


@triton.jit
def quantized(y, bad, G: tl.constexpr, BITS: tl.constexpr):
    """Values float32 `[TOKENS, GROUPS, WIDTH]` to integers int32 of that shape, scales float32 and sums int32
    `[TOKENS, GROUPS]`, as the specification has them; `bad` int32 `[TOKENS]` spoils all groups of a token."""
    magnitude = tl.abs(y)
    finite = magnitude < float("inf")
    spoilt = (bad[:, None] | tl.max(1 - finite.to(tl.int32), 2)) != 0
    largest = tl.max(tl.where(finite, magnitude, 0.0), 2)
    usable = (largest >= SMALLEST) & (spoilt == 0)
    whole = tl.full(largest.shape, 127.0, tl.float32)
    most: tl.constexpr = 127.0 if BITS == 8 else 7.0
    if BITS == 4:
        whole = tl.where(tl.min(y, 2) == -largest, 8.0, -8.0)
    inverse = tl.where(usable, tl.div_rn(whole, tl.where(usable, largest, 1.0)), 0.0)
    levels = (tl.minimum(y * inverse[:, :, None], most) + NEAREST) - NEAREST
    q = tl.where(usable[:, :, None], levels, 0.0).to(tl.int32)
    scale = tl.where(usable, tl.div_rn(largest, whole), 0.0)
    scale = tl.where(spoilt, float("nan"), scale)
    return q, scale, tl.sum(q, 2)


@triton.jit
def rotate_quantize_kernel(
    x, up, weight, shift, signs, q, scale, sums, T, K, eps,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, TOKENS: tl.constexpr, HAS_SIGNS: tl.constexpr, HAS_SHIFT: tl.constexpr, SHORT: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """One tile of SPAN columns (a scale group, or a block of several) of TOKENS tokens. With 16 bits q takes the
    rotated inputs themselves."""
    tile = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inverse = tl.zeros((TOKENS,), tl.float32)
    if KIND == "norm":
        inverse = inverse_root(x, tokens, T, K, eps)
    y, bad = rotated_tile(
        x, up, weight, shift, signs, tokens, inverse, T, K, tile,
        KIND, BLOCK, SPAN, TILE, HAS_SIGNS, HAS_SHIFT, SHORT, NORMALIZED,
    )  # fmt: skip
    column = tl.arange(0, TILE)
    mask = (tokens < T)[:, None] & (column < SPAN)[None, :]
    place = q + tokens.to(tl.int64)[:, None] * K + tile * SPAN + column[None, :]
    if BITS == 16:
        y = tl.where(bad[:, None] != 0, float("nan"), y)
        tl.store(place, y.to(q.dtype.element_ty), mask=mask)
    else:
        GROUPS: tl.constexpr = SPAN // G
        found, steps, totals = quantized(tl.reshape(y, (TOKENS, GROUPS, TILE // GROUPS)), bad, G, BITS)
        tl.store(place, tl.reshape(found, (TOKENS, TILE)).to(tl.int8), mask=mask)
        group = tl.arange(0, GROUPS)
        inside = (tokens < T)[:, None] & (group < GROUPS)[None, :]
        where = tokens[:, None] * (K // G) + tile * GROUPS + group[None, :]
        tl.store(scale + where, steps, mask=inside)
        tl.store(sums + where, totals, mask=inside)
