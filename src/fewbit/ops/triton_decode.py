"""Weights of a tile from their codes, in Triton: one function per code, chosen when a kernel is compiled.

What differs between the codes is all in this file. `decode_tile` gives integers, `load_zeros` what a group's dot
product needs beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW_GROUP = tl.constexpr(16)


@triton.jit
def trellis_tile(codes, tables, rows, N, K, g, k0, G: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr):
    """Integers int8 `[BN, BK]` of the trellis, columns `k0` to `k0 + BK` of group g: four weights of one row have
    their windows in `12 + 3 BITS` neighbouring bits, which are cut out of two words; the two halves of a window of 12
    bits are looked up in 64 sums each, all of which are one line of the first-level cache."""
    quads = k0 // 4 + tl.arange(0, BK // 4)
    first = BITS * (64 * quads[None, :] + 4 * (rows % ROW_GROUP)[:, None]) - (12 - BITS)
    start = (rows // ROW_GROUP).to(tl.int64)[:, None] * (K * BITS // 2) + g * (G * BITS // 2)
    word = first >> 5
    inside = (rows < N)[:, None]
    low = tl.load(codes + start + word, mask=inside & (word >= 0), other=0).to(tl.uint32, bitcast=True)
    more = inside & (word + 1 < G * BITS // 2)
    high = tl.load(codes + start + word + 1, mask=more, other=0).to(tl.uint32, bitcast=True)
    shift = (first & 31).to(tl.uint32)
    windows = (low >> shift) | ((high << 1) << (31 - shift))
    steps = BITS * tl.arange(0, 4).to(tl.uint32)
    window = tl.reshape((windows[:, :, None] >> steps[None, None, :]) & 4095, (rows.shape[0], BK)).to(tl.int32)
    return tl.load(tables + (window & 63)) + tl.load(tables + 64 + (window >> 6))


@triton.jit
def nibble_tile(codes, rows, N, K, g, k0, G: tl.constexpr, BK: tl.constexpr):
    """Integers int8 `[BN, BK]` of the int4 format: a word holds eight columns of a row, the first four in the low
    halves of its bytes."""
    words = (g * G + k0) // 8 + tl.arange(0, BK // 8)
    start = (rows // ROW_GROUP).to(tl.int64)[:, None] * (2 * K) + words[None, :] * 16 + (rows % ROW_GROUP)[:, None]
    found = tl.load(codes + start, mask=(rows < N)[:, None], other=0).to(tl.uint32, bitcast=True)
    place = tl.arange(0, 8)
    steps = ((place % 4) * 8 + (place // 4) * 4).to(tl.uint32)
    nibbles = tl.reshape((found[:, :, None] >> steps[None, None, :]) & 15, (rows.shape[0], BK))
    return (nibbles.to(tl.int32) - 8).to(tl.int8)


@triton.jit
def ternary_tile(codes, rows, N, g, k0, G: tl.constexpr, BK: tl.constexpr):
    """Integers int8 `[BN, BK]`, -1, 0 or 1: a word holds sixteen columns of a row in fields of two bits."""
    padded = (N + 15) // 16 * 16
    words = (g * G + k0) // 16 + tl.arange(0, BK // 16)
    start = words[None, :].to(tl.int64) * padded + rows[:, None]
    found = tl.load(codes + start, mask=(rows < N)[:, None], other=0).to(tl.uint32, bitcast=True)
    steps = 2 * tl.arange(0, 16).to(tl.uint32)
    fields = tl.reshape((found[:, :, None] >> steps[None, None, :]) & 3, (rows.shape[0], BK))
    return (fields.to(tl.int32) - 1).to(tl.int8)


@triton.jit
def iq3_s_tile(codes, tables, rows, N, g, k0, G: tl.constexpr, BK: tl.constexpr):
    """Signed grid points int8 `[BN, BK]` and the odd factors `1 + 2 s` of their sub-blocks, int32 `[BN, BK / 32]`."""
    BN: tl.constexpr = rows.shape[0]
    padded = (N + 15) // 16 * 16
    inside = (rows < N)[:, None, None]
    # Words 0 and 1 of a sub-block: low bytes of its grid numbers; word 2: signs; half a word: ninth bits, sub-scale.
    unit = ((g * G + k0) // 32 + tl.arange(0, BK // 32)).to(tl.int64) * (padded * 7 // 2)
    eighth = tl.arange(0, 8).to(tl.uint32)[None, None, :]
    start = codes + unit[None, :, None]
    row = rows[:, None, None]
    low = tl.load(start + row + (eighth // 4) * padded, mask=inside, other=0).to(tl.uint32, bitcast=True)
    low = (low >> ((eighth % 4) * 8)) & 255
    signs = tl.load(start + 2 * padded + row, mask=inside, other=0).to(tl.uint32, bitcast=True)
    pair = tl.load(start + 3 * padded + row // 2, mask=inside, other=0).to(tl.uint32, bitcast=True)
    half = (pair >> ((row % 2) * 16).to(tl.uint32)) & 0xFFFF
    number = (low | (((half >> eighth) & 1) << 8)).to(tl.int32)
    point = tl.load(tables + number[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]).to(tl.int32)
    column = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    negative = ((signs >> column) & 1).to(tl.int32)
    signed = tl.reshape(point, (BN, BK // 32, 32)) * (1 - 2 * negative)
    factor = tl.reshape(1 + 2 * (half >> 8).to(tl.int32), (BN, BK // 32))
    return tl.reshape(signed, (BN, BK)).to(tl.int8), factor


@triton.jit
def decode_tile(
    codes, tables, rows, N, K, g, k0, CODE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BK: tl.constexpr
):
    """Integers int8 `[BN, BK]`, and factors int32 `[BN, BK / 32]` that multiply each 32 columns (iq3_s; else ones)."""
    factor = tl.full((rows.shape[0], BK // 32), 1, tl.int32)
    if CODE == "tiles":
        found = trellis_tile(codes, tables, rows, N, K, g, k0, G, BITS, BK)
    elif CODE == "nibbles":
        found = nibble_tile(codes, rows, N, K, g, k0, G, BK)
    elif CODE == "ternary":
        found = ternary_tile(codes, rows, N, g, k0, G, BK)
    else:
        found, factor = iq3_s_tile(codes, tables, rows, N, g, k0, G, BK)
    return found, factor


@triton.jit
def load_zeros(tables, rows, N, groups, g):
    """The ternary code's zero points of group g, int32 `[BN]`, from fp16 `[N, groups]`."""
    return tl.load(tables + rows * groups + g, mask=rows < N, other=0).to(tl.int32)
