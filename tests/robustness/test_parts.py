"""Malformed codes, scales, signs and tables: any bits are weights, and what does not fit is a typed error.

Also run under AddressSanitizer and UndefinedBehaviorSanitizer (`make test-sanitize`).
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.formats.trellis import load_tables
from fewbit.ops.extension import load_native

native = load_native()
pytestmark = pytest.mark.skipif(native is None, reason="the native extension is not built")

ROWS, COLS, GROUP, BITS = 33, 192, 64, 3


def parts(random: np.random.Generator, code: str) -> dict:
    """Everything that `Matrix` takes, honest in shape and random in content."""
    bits = 4 if code == "nibbles" else BITS
    shape = (-(-ROWS // 16), 2 * bits * COLS)
    return {
        "codes": random.integers(0, 256, shape, np.uint8),
        "scales": random.integers(0, 1 << 16, (ROWS, COLS // GROUP), np.uint16),  # NaN and infinity among them
        "tensor_scale": float(random.choice([0.5, 0.0, 1e30, -1e30, np.nan, np.inf])),
        "tables": None if code == "nibbles" else load_tables(bits)[0].numpy(),
        "bias": random.standard_normal(ROWS, np.float32) if random.random() < 0.5 else None,
        "cols": COLS,
        "bits": bits,
        "code": code,
    }


def damaged(random: np.random.Generator, given_parts: dict) -> dict:
    """One part of another shape, size, content or type."""
    name = str(random.choice([name for name, part in given_parts.items() if part is not None]))
    part = given_parts[name]
    if isinstance(part, np.ndarray):
        cut = tuple(slice(0, int(random.integers(0, size + 1))) for size in part.shape)
        full = np.full_like(part, 255 if part.dtype == np.uint8 else 127)
        others = (
            part[cut],
            np.concatenate([part, part]),
            part.ravel(),
            part[None],
            part[::2],
            part.astype(np.int64),
            full,
        )
        return {**given_parts, name: others[int(random.integers(len(others)))]}
    wrong = [-1, 0, 1, 2, 5, 16, 48, 191, 193, 1 << 31, 1 << 40, (1 << 63) - 1, None, "lanes", "magic", 0.5]
    return {**given_parts, name: wrong[int(random.integers(len(wrong)))]}


def used(found, random: np.random.Generator) -> None:
    """One product with a matrix that was accepted, by one token and by many."""
    for tokens in (1, 9):
        x = random.standard_normal((tokens, COLS), np.float32)
        signs = random.integers(0, 256, COLS // 8, np.uint8)
        out = np.empty((tokens, ROWS), np.float32)
        native.linear(x, signs, 64, 8, [found], [out])
        assert out.shape == (tokens, ROWS)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), code=st.sampled_from(["trellis", "nibbles"]), whole=st.booleans())
def test_malformed_parts_are_weights_or_a_typed_error(seed, code, whole):
    random = np.random.default_rng(seed)
    own = parts(random, code)
    arguments = own if whole else damaged(random, own)
    try:
        found = native.Matrix(**arguments)
        used(found, random)
    except (ValueError, TypeError, OverflowError):
        assert not whole


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_malformed_signs_shifts_and_inputs_are_refused_or_used(seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((3, COLS), np.float32) * np.float32(random.choice([0, 1e-40, 1, 1e30, np.inf, np.nan]))
    size, block, group = (int(random.choice(values)) for values in ([0, 1, 23, 24, 25, 400], [0, 1, 32, 48, 64, 256],
                                                                     [0, 16, 32, 64, 96, 192, 256, 512]))  # fmt: skip
    signs = None if random.random() < 0.2 else random.integers(0, 256, size, np.uint8)
    shift = None if random.random() < 0.5 else np.zeros(int(random.choice([COLS, COLS - 1, 0])), np.float32)
    groups = COLS // max(1, group)
    q, scale, sums = np.empty((3, COLS), np.int8), np.empty((3, groups), np.float32), np.empty((3, groups), np.int32)
    fits = block in (1, 32, 64) and group in (32, 64, 96, 192) and max(block, group) % min(block, group) == 0
    fits = fits and (signs is None or (size == COLS // 8 and block > 1)) and (shift is None or shift.size == COLS)
    try:
        native.rotate_quantize(x, signs, block, group, 8, q, scale, sums, shift)
    except ValueError:
        assert not fits
    else:
        assert fits
        assert np.array_equal(sums, q.reshape(3, groups, -1).sum(2))
