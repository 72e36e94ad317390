"""Products with packed matrices in Triton: quantized inputs, plain inputs, and the paper's weight-side transform."""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_decode import decode_tile, load_zeros
from fewbit.ops.triton_rotate import signs_16


@triton.jit
def weight_scales(scales, rows, N, g, row_stride, group_stride, tensor_scale):
    """Full scales of group g, float32 `[BN]`."""
    found = tl.load(scales + rows.to(tl.int64) * row_stride + g * group_stride, mask=rows < N, other=0)
    return found.to(tl.float32) * tl.load(tensor_scale)


@triton.jit
def group_product(
    q, codes, tables, tokens, rows, T, N, K, groups, g, stride, sums,
    CODE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The exact dot products of group g, int32 `[BM, BN]`: of `q` int8 with `stride` entries to a token."""
    column = tl.arange(0, BK)
    dots = tl.zeros((tokens.shape[0], rows.shape[0]), tl.int32)
    for k0 in range(0, G, BK):
        place = tokens.to(tl.int64)[:, None] * stride + g * G + k0 + column[None, :]
        x = tl.load(q + place, mask=(tokens < T)[:, None], other=0)
        w, factor = decode_tile(codes, tables, rows, N, K, g, k0, CODE, BITS, G, BK)
        if CODE == "iq3_s":
            part = tl.dot(x, tl.trans(w), out_dtype=tl.int32)
            dots += part * tl.trans(factor)
        else:
            dots = tl.dot(x, tl.trans(w), dots, out_dtype=tl.int32)
    if CODE == "ternary":
        total = tl.load(sums + tokens * groups + g, mask=tokens < T, other=0)
        dots -= total[:, None] * load_zeros(tables, rows, N, groups, g)[None, :]
    return dots


@triton.jit
def store_rows(total, out, bias, tokens, rows, T, N, HAS_BIAS: tl.constexpr):
    """The epilogue: bias, and `total` float32 `[BM, BN]` in out's dtype."""
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < N, other=0).to(tl.float32)[None, :]
    place = tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(tokens < T)[:, None] & (rows < N)[None, :])


@triton.jit
def packed_kernel(
    q, scale, sums, codes, scales, tensor_scale, tables, bias, out, T, N, K, row_stride, group_stride, per_split,
    CODE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`[BM, BN]` of quantized inputs times a packed matrix: the GEMV where tokens are few, else the GEMM. Where K is
    split, split s sums `per_split` groups in order into row block s of `out`, float32 `[SPLIT, T, N]`."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    groups = K // G
    first = tl.program_id(2) * per_split
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(first, tl.minimum(first + per_split, groups)):
        dots = group_product(q, codes, tables, tokens, rows, T, N, K, groups, g, K, sums, CODE, BITS, G, BK)
        steps = weight_scales(scales, rows, N, g, row_stride, group_stride, tensor_scale)
        inputs = tl.load(scale + tokens * groups + g, mask=tokens < T, other=0)
        total += dots.to(tl.float32) * (steps[None, :] * inputs[:, None])
    if SPLIT > 1:
        out += tl.program_id(2).to(tl.int64) * T * N
    store_rows(total, out, bias, tokens, rows, T, N, HAS_BIAS)


@triton.jit
def reduce_kernel(parts, bias, out, T, N, SPLIT: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The splits of one token added in order, so that the result does not depend on which program ends first."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1)
    place = token.to(tl.int64) * N + rows
    total = tl.load(parts + place, mask=rows < N, other=0)
    for split in range(1, SPLIT):
        total += tl.load(parts + split * tl.num_programs(1).to(tl.int64) * N + place, mask=rows < N, other=0)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < N, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def plain_group(
    x, codes, tables, tokens, rows, T, N, K, g, stride, total, steps,
    CODE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`total` plus group g's product with 16-bit inputs: integers are exact in them, scales come after the product."""
    column = tl.arange(0, BK)
    part = tl.zeros((tokens.shape[0], rows.shape[0]), tl.float32)
    for k0 in range(0, G, BK):
        place = tokens.to(tl.int64)[:, None] * stride + g * G + k0 + column[None, :]
        inputs = tl.load(x + place, mask=(tokens < T)[:, None], other=0)
        w, _ = decode_tile(codes, tables, rows, N, K, g, k0, CODE, BITS, G, BK)
        part = tl.dot(inputs, tl.trans(w.to(tl.float32).to(x.dtype.element_ty)), part)
    return total + part * steps[None, :]


@triton.jit
def plain_kernel(
    x, codes, scales, tensor_scale, tables, bias, out, T, N, K, row_stride, group_stride,
    CODE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`[BM, BN]` of rotated inputs of 16 bits times a packed matrix (not of ternary and iq3_s codes)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(K // G):
        steps = weight_scales(scales, rows, N, g, row_stride, group_stride, tensor_scale)
        total = plain_group(
            x, codes, tables, tokens, rows, T, N, K, g, K, total, steps, CODE, BITS, G, BK
        )  # fmt: skip
    store_rows(total, out, bias, tokens, rows, T, N, HAS_BIAS)


@triton.jit
def turned_back(levels, BLOCK: tl.constexpr):
    """The transform, not normalized, of levels `[BN, BLOCK]`, float32. Of levels within +-127 it is exact, as sums of
    16 have 11 bits, which is what a half holds; those of iq3_s reach 465, and their sums are rounded."""
    ROWS: tl.constexpr = levels.shape[0]
    SQUARES: tl.constexpr = ROWS * BLOCK // 256
    w = tl.dot(tl.reshape(levels.to(tl.float16), (SQUARES * 16, 16)), signs_16(16).to(tl.float16))
    w = tl.permute(tl.reshape(w.to(tl.float16), (SQUARES, 16, 16)), (0, 2, 1))
    w = tl.dot(tl.reshape(w, (SQUARES * 16, 16)), signs_16(BLOCK // 16).to(tl.float16))
    return tl.reshape(tl.permute(tl.reshape(w, (SQUARES, 16, 16)), (0, 2, 1)), (ROWS, BLOCK))


@triton.jit
def inverse_kernel(
    x, codes, scales, tensor_scale, tables, signs, bias, out, T, N, K, row_stride, group_stride,
    CODE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NORMALIZED: tl.constexpr, HAS_SIGNS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The paper's placement: a tile is decoded, transformed back on chip, scaled, and multiplied with inputs of 16 bits
    as they are. Where one program has all tokens, no weight is turned back twice."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    groups = K // G
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(groups):
        steps = weight_scales(scales, rows, N, g, row_stride, group_stride, tensor_scale) * NORMALIZED
        for k0 in range(0, G, BLOCK):
            levels, factor = decode_tile(codes, tables, rows, N, K, g, k0, CODE, BITS, G, BLOCK)
            levels = levels.to(tl.float32)
            if CODE == "iq3_s":
                wide = tl.reshape(levels, (BN, BLOCK // 32, 32)) * factor.to(tl.float32)[:, :, None]
                levels = tl.reshape(wide, (BN, BLOCK))
            w = turned_back(levels, BLOCK)
            if CODE == "ternary":  # the transform of a constant is all in its first coefficient
                zeros = load_zeros(tables, rows, N, groups, g).to(tl.float32) * BLOCK
                w -= tl.where(column == 0, 1.0, 0.0)[None, :] * zeros[:, None]
            w = w * steps[:, None]
            col = g * G + k0 + column
            if HAS_SIGNS:
                bits = tl.load(signs + col // 8).to(tl.int32)
                w = tl.where(((bits >> (col % 8)) & 1)[None, :] != 0, -w, w)
            place = tokens.to(tl.int64)[:, None] * K + col[None, :]
            inputs = tl.load(x + place, mask=(tokens < T)[:, None], other=0)
            total = tl.dot(inputs, tl.trans(w.to(x.dtype.element_ty)), total)
    store_rows(total, out, bias, tokens, rows, T, N, HAS_BIAS)
