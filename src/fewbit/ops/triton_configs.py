"""Tile sizes of the Triton kernels, as data: which one a launch takes, and which others `benchmarks/gpu.py` may try.

None was timed: they are those that compile without spilling registers and fill a large card. A choice depends on
shapes alone, never on a measurement at run time, so that launches can be captured in CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

PROGRAMS = 264  # that split K aims at: two for each of an H100's 132 multiprocessors


@dataclass(frozen=True)
class Config:
    """Tokens, rows and columns of a tile, and how it is compiled."""

    tokens: int
    rows: int
    cols: int
    warps: int
    stages: int


# The first of a list is taken where tokens are at most the limit before it.
CONFIGS: dict[str, tuple[tuple[int, tuple[Config, ...]], ...]] = {
    "packed": (
        (16, (Config(16, 64, 64, 4, 2), Config(16, 32, 64, 2, 2), Config(16, 128, 64, 8, 2))),
        (128, (Config(64, 64, 64, 8, 2), Config(64, 128, 32, 8, 2), Config(128, 64, 64, 8, 2))),
        # Prompts: a weight is decoded once for 256 tokens.
        (1 << 31, (Config(256, 64, 32, 8, 2), Config(128, 128, 32, 8, 2), Config(64, 64, 64, 8, 2))),
    ),
    # Points and signs of the grid take the registers that larger tiles would need.
    "packed, iq3_s": (
        (16, (Config(16, 64, 64, 4, 2), Config(16, 32, 64, 2, 2), Config(16, 128, 64, 8, 2))),
        (1 << 31, (Config(64, 64, 64, 8, 2), Config(64, 128, 32, 8, 2))),
    ),
    "plain": (
        (16, (Config(16, 64, 64, 4, 2), Config(16, 32, 64, 2, 2))),
        (1 << 31, (Config(64, 64, 64, 8, 2), Config(64, 128, 64, 8, 2))),
    ),
    "inverse": (
        (16, (Config(16, 16, 256, 8, 1), Config(16, 32, 256, 8, 1))),
        (1 << 31, (Config(64, 32, 256, 8, 1), Config(64, 64, 256, 8, 1))),
    ),
    "twin": (
        (16, (Config(16, 32, 64, 4, 2), Config(16, 64, 64, 4, 2))),
        (1 << 31, (Config(64, 64, 64, 8, 2), Config(64, 128, 64, 8, 2))),
    ),
    "rotate": ((1 << 31, (Config(16, 0, 0, 4, 1), Config(32, 0, 0, 8, 1), Config(8, 0, 0, 4, 1))),),
    "folded": ((1 << 31, (Config(16, 0, 64, 8, 1), Config(16, 0, 32, 8, 1))),),
}


def candidates(kernel: str, tokens: int) -> tuple[Config, ...]:
    """What a launch for so many tokens may take, the usual one first."""
    for limit, found in CONFIGS[kernel]:
        if tokens <= limit:
            return found
    raise ValueError(f"{tokens} tokens are too many")


def columns(wanted: int, group: int) -> int:
    """The largest power of two up to `wanted` that divides a scale group."""
    return min(wanted, group & -group)


def splits(tokens: int, rows: int, groups: int, config: Config) -> tuple[int, int]:
    """In how many parts K is cut, and how many scale groups each has: enough programs to fill a card, and one part
    where the tiles do that by themselves."""
    tiles = -(-rows // config.rows) * -(-tokens // config.tokens)
    wanted = max(1, min(groups, PROGRAMS // tiles))
    each = -(-groups // wanted)
    return -(-groups // each), each


# A multiprocessor's shares of an A100, for the choice below.
SHARE_OF_L2 = 37e9  # bytes per second
SHARE_OF_PRODUCTS = 2.9e12  # int8 multiply-adds per second
SHARED_BY = 108


def folds(tokens: int, rows: int, cols: int, rank: int, act_bits: int) -> bool:
    """Whether the low-rank product is cheaper in the quantizing kernel than in every column tile of the product.

    Both read U, `rank * cols / 2` bytes, out of the second-level cache in every program; what counts is how many waves
    of programs there are and that few programs then rotate all inputs.
    """
    config = candidates("twin", tokens)[0]
    fold = candidates("folded", tokens)[0]
    branch = rank * cols

    def wave(size: int) -> float:
        return max(size * branch / SHARE_OF_PRODUCTS, branch / 2 / SHARE_OF_L2)

    apart = -(-rows // config.rows) * -(-tokens // config.tokens)
    recomputed = -(-apart // SHARED_BY) * wave(config.tokens)
    together = -(-tokens // fold.tokens)
    folded = -(-together // SHARED_BY) * (wave(fold.tokens) + min(tokens, fold.tokens) * cols * 2 / SHARE_OF_L2)
    return act_bits != 16 and folded < recomputed
