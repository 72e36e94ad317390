"""TwinQuant's dual-component product in Triton: `h = x~ U` stays on chip and is quantized there.

Two ways to share h between column tiles. Recomputed: every program computes the h of its tokens itself, and no
intermediate reaches global memory. Folded: the kernel that quantizes the inputs computes h, too, and appends it to
them, r bytes and r / G scales per token; the product is then the plain one over K + r inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_decode import nibble_tile
from fewbit.ops.triton_linear import group_product, plain_group, store_rows, weight_scales
from fewbit.ops.triton_rotate import quantized, rotated_tile


@triton.jit
def one_group(values, i, GROUPS: tl.constexpr):
    """Group i of `[TOKENS, GROUPS, ...]`; a tensor in registers has no other way to be cut."""
    if GROUPS == 1:
        found = tl.sum(values, 1)
    else:
        shape: tl.constexpr = (1, GROUPS, 1) if len(values.shape) == 3 else (1, GROUPS)
        chosen = tl.reshape(tl.arange(0, GROUPS) == i, shape)
        found = tl.sum(tl.where(chosen, values, tl.zeros_like(values)), 1)
    return found


@triton.jit
def folded_kernel(
    x, shift, signs, down_codes, down_scales, down_scale, q, scale, sums, T, K, R, row_stride, group_stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, SPAN: tl.constexpr, TOKENS: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, HAS_SIGNS: tl.constexpr, HAS_SHIFT: tl.constexpr, SHORT: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens rotated and quantized, and behind them their h: `q` int8 `[T, K + R]`, `scale` and `sums`
    `[T, (K + R) / G]`. BR is R rounded up to a power of two."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    branch = tl.arange(0, BR)
    GROUPS: tl.constexpr = SPAN // G
    groups = (K + R) // G
    column = tl.arange(0, SPAN)
    mask = (tokens < T)[:, None]
    h = tl.zeros((TOKENS, BR), tl.float32)
    for tile in range(K // SPAN):
        y, bad = rotated_tile(
            x, x, x, shift, signs, tokens, x, T, K, tile,
            "plain", BLOCK, SPAN, SPAN, HAS_SIGNS, HAS_SHIFT, SHORT, NORMALIZED,
        )  # fmt: skip
        found, steps, totals = quantized(tl.reshape(y, (TOKENS, GROUPS, G)), bad, G, BITS)
        place = tokens.to(tl.int64)[:, None] * (K + R) + tile * SPAN + column[None, :]
        tl.store(q + place, tl.reshape(found, (TOKENS, SPAN)).to(tl.int8), mask=mask)
        where = tokens[:, None] * groups + tile * GROUPS + tl.arange(0, GROUPS)[None, :]
        tl.store(scale + where, steps, mask=mask)
        tl.store(sums + where, totals, mask=mask)
        pieces = tl.reshape(found, (TOKENS, SPAN // BK, BK))
        for i in range(GROUPS):
            g = tile * GROUPS + i
            dots = tl.zeros((TOKENS, BR), tl.int32)
            for j in range(G // BK):
                u = nibble_tile(down_codes, branch, R, K, g, j * BK, G, BK)
                part = one_group(pieces, i * (G // BK) + j, SPAN // BK).to(tl.int8)
                dots = tl.dot(part, tl.trans(u), dots, out_dtype=tl.int32)
            down = weight_scales(down_scales, branch, R, g, row_stride, group_stride, down_scale)
            h += dots.to(tl.float32) * (down[None, :] * one_group(steps, i, GROUPS)[:, None])
    fine = tl.zeros((TOKENS,), tl.int32)
    found, steps, totals = quantized(tl.reshape(h, (TOKENS, BR // G, G)), fine, G, BITS)
    place = tokens.to(tl.int64)[:, None] * (K + R) + K + branch[None, :]
    tl.store(q + place, tl.reshape(found, (TOKENS, BR)).to(tl.int8), mask=mask & (branch < R)[None, :])
    group = tl.arange(0, BR // G)
    where = tokens[:, None] * groups + K // G + group[None, :]
    tl.store(scale + where, steps, mask=mask & (group < R // G)[None, :])
    tl.store(sums + where, totals, mask=mask & (group < R // G)[None, :])


@triton.jit
def twin_kernel(
    q, scale, sums, down_codes, down_scales, down_scale, codes, scales, tensor_scale, bias, out, T, N, K, R,
    down_row_stride, down_group_stride, row_stride, group_stride,
    BITS: tl.constexpr, G: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`[BM, BN]` of `[x~, h] [R, V]'` with the h of its tokens computed and quantized on chip."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    branch = tl.arange(0, BR)
    groups = K // G
    h = tl.zeros((BM, BR), tl.float32)
    for g in range(groups):
        dots = group_product(q, down_codes, q, tokens, branch, T, R, K, groups, g, K, sums, "nibbles", 4, G, BK)
        steps = weight_scales(down_scales, branch, R, g, down_row_stride, down_group_stride, down_scale)
        inputs = tl.load(scale + tokens * groups + g, mask=tokens < T, other=0)
        h += dots.to(tl.float32) * (steps[None, :] * inputs[:, None])
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(groups):
        dots = group_product(q, codes, q, tokens, rows, T, N, K + R, groups, g, K, sums, "nibbles", 4, G, BK)
        steps = weight_scales(scales, rows, N, g, row_stride, group_stride, tensor_scale)
        inputs = tl.load(scale + tokens * groups + g, mask=tokens < T, other=0)
        total += dots.to(tl.float32) * (steps[None, :] * inputs[:, None])
    GROUPS: tl.constexpr = BR // G
    fine = tl.zeros((BM,), tl.int32)
    found, steps_h, _ = quantized(tl.reshape(h, (BM, GROUPS, G)), fine, G, BITS)
    for i in tl.static_range(GROUPS):
        if i < R // G:
            v = nibble_tile(codes, rows, N, K + R, groups + i, 0, G, G)
            dots = tl.dot(one_group(found, i, GROUPS).to(tl.int8), tl.trans(v), out_dtype=tl.int32)
            steps = weight_scales(scales, rows, N, groups + i, row_stride, group_stride, tensor_scale)
            total += dots.to(tl.float32) * (steps[None, :] * one_group(steps_h, i, GROUPS)[:, None])
    store_rows(total, out, bias, tokens, rows, T, N, HAS_BIAS)


@triton.jit
def twin_plain_kernel(
    x, down_codes, down_scales, down_scale, codes, scales, tensor_scale, bias, out, T, N, K, R,
    down_row_stride, down_group_stride, row_stride, group_stride,
    G: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The same with rotated inputs of 16 bits, and h rounded to their dtype."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    branch = tl.arange(0, BR)
    groups = K // G
    h = tl.zeros((BM, BR), tl.float32)
    for g in range(groups):
        steps = weight_scales(down_scales, branch, R, g, down_row_stride, down_group_stride, down_scale)
        h = plain_group(
            x, down_codes, x, tokens, branch, T, R, K, g, K, h, steps, "nibbles", 4, G, BK
        )  # fmt: skip
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(groups):
        steps = weight_scales(scales, rows, N, g, row_stride, group_stride, tensor_scale)
        total = plain_group(x, codes, x, tokens, rows, T, N, K + R, g, K, total, steps, "nibbles", 4, G, BK)
    GROUPS: tl.constexpr = BR // G
    h = tl.reshape(h, (BM, GROUPS, G))
    for i in tl.static_range(GROUPS):
        if i < R // G:
            v = nibble_tile(codes, rows, N, K + R, groups + i, 0, G, G).to(tl.float32)
            part = tl.zeros((BM, BN), tl.float32)
            inputs = one_group(h, i, GROUPS).to(x.dtype.element_ty)
            part = tl.dot(inputs, tl.trans(v.to(x.dtype.element_ty)), part)
            steps = weight_scales(scales, rows, N, groups + i, row_stride, group_stride, tensor_scale)
            total += part * steps[None, :]
    store_rows(total, out, bias, tokens, rows, T, N, HAS_BIAS)
