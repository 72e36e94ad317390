"""Trains the four additive tables of the trellis code for 2, 3 and 4 bits and writes them for the package.

Gaussian quantiles in random order are refined by alternating between the package's own integer encoder on
N(0, 1) samples and a least-squares refit of one table after the other (back-fitting); the winner of several
seeds is rounded to int8 and refitted on the integers. Needs the native extension.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fewbit.ops.extension import load_native

WINDOW = 12
FIELDS = ((0, 4), (4, 2), (6, 2), (8, 4))  # first bit and number of bits of A, B, C, D
UNIT_LIMIT = 126.0  # largest sum in table units, one short of the format's 127 so that rounding stays inside
LEVELS_PER_UNIT = 256
STREAM = 4096
OUTPUT = Path(__file__).resolve().parent.parent / "src" / "fewbit" / "formats" / "trellis_tables.json"

INDEX = [(np.arange(1 << WINDOW) >> first) & ((1 << width) - 1) for first, width in FIELDS]
native = load_native()


def level_sums(tables: list[np.ndarray]) -> np.ndarray:
    """The value of every window, `[4096]`."""
    return sum(table[index] for table, index in zip(tables, INDEX, strict=True))


def encode(x: np.ndarray, levels: np.ndarray, unit: float, bits: int) -> np.ndarray:
    """Windows `[streams, steps]` that the integer encoder chooses for `x` in sigmas."""
    scale = unit * LEVELS_PER_UNIT
    fixed = np.clip(np.rint(x * scale), -32767, 32767).astype(np.int16)
    symbols = np.empty(x.shape, np.uint8)
    native.trellis_encode_streams(fixed, np.rint(levels * scale).astype(np.int16), bits, symbols)
    windows = np.zeros(x.shape, np.int64)
    for back in range(WINDOW // bits):
        shifted = symbols[:, : x.shape[1] - back].astype(np.int64)
        windows[:, back:] |= shifted << (WINDOW - bits * (back + 1))
    return windows


def mse(x: np.ndarray, tables: list[np.ndarray], unit: float, bits: int) -> float:
    """Mean squared error in sigma^2 of samples `x`."""
    levels = level_sums(tables)
    return float(np.mean((x - levels[encode(x, levels, unit, bits)]) ** 2))


def unit_for(tables: list[np.ndarray]) -> float:
    """Table units per sigma that use the whole int8 range."""
    return UNIT_LIMIT / float(np.abs(level_sums(tables)).max())


def backfit(x: np.ndarray, windows: np.ndarray, tables: list[np.ndarray], sweeps: int, grid: float = 0.0) -> None:
    """Refit one table after the other to samples with fixed windows, on multiples of `grid` if given."""
    counts = np.bincount(windows.ravel(), minlength=1 << WINDOW).astype(float)
    sums = np.bincount(windows.ravel(), weights=x.ravel(), minlength=1 << WINDOW)
    for _ in range(sweeps):
        for table, index in zip(tables, INDEX, strict=True):
            residual = sums - counts * (level_sums(tables) - table[index])
            number = np.bincount(index, weights=counts, minlength=len(table))
            fitted = np.bincount(index, weights=residual, minlength=len(table)) / np.maximum(number, 1)
            table[:] = np.where(number > 8, fitted, table)
            if grid:
                table[:] = np.rint(table / grid) * grid


def samples(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number // STREAM, STREAM))


def train_seed(bits: int, seed: int, rounds: int, number: int) -> list[np.ndarray]:
    """Real-valued tables of one seed, in sigmas."""
    order = np.random.default_rng(seed)
    tables = []
    for _, width in FIELDS:
        size = 1 << width
        quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)])
        tables.append(quantiles[order.permutation(size)] / np.sqrt(len(FIELDS)))
    for step in range(rounds):
        x = samples(1000 * seed + step, number if step < rounds * 3 // 4 else 4 * number)
        backfit(x, encode(x, level_sums(tables), unit_for(tables), bits), tables, sweeps=8)
    return tables


def round_tables(tables: list[np.ndarray], bits: int, number: int) -> tuple[list[np.ndarray], float]:
    """Integer tables and their unit: rounded, refitted on the integers, then entry by entry where it helps."""
    unit = unit_for(tables)
    best = [np.rint(table * unit) / unit for table in tables]
    x = samples(77, number)
    least = mse(x, best, unit, bits)
    for _ in range(10):
        trial = [table.copy() for table in best]
        backfit(x, encode(x, level_sums(trial), unit, bits), trial, sweeps=4, grid=1 / unit)
        if np.abs(level_sums(trial)).max() * unit > 127.5 or (found := mse(x, trial, unit, bits)) >= least:
            break
        best, least = trial, found
    for part, entry in [(p, e) for p in range(len(best)) for e in range(len(best[p]))]:
        for change in (-1, 1):
            trial = [table.copy() for table in best]
            trial[part][entry] += change / unit
            if np.abs(level_sums(trial)).max() * unit < 127.5 and (found := mse(x, trial, unit, bits)) < least:
                best, least = trial, found
    return best, unit


def train(bits: int, seeds: int, rounds: int, number: int) -> dict[str, object]:
    """Best tables of all seeds as the data file stores them."""
    ranked = []
    for seed in range(seeds):
        tables = train_seed(bits, seed, rounds, number)
        ranked.append((mse(samples(99, 4 * number), tables, unit_for(tables), bits), seed, tables))
    ranked.sort(key=lambda entry: entry[0])
    least, seed, tables = ranked[0]
    rounded, unit = round_tables(tables, bits, 4 * number)
    held_out = mse(samples(123456, 16 * number), rounded, unit, bits)
    print(f"{bits} bits: seed {seed} of {seeds}, real tables {least:.5f}, stored {held_out:.5f}", flush=True)
    numbers = [np.rint(table * unit).astype(int).tolist() for table in rounded]
    return {"unit": unit, "mse": round(held_out, 6), **dict(zip("ABCD", numbers, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--samples", type=int, default=65536, help="samples of an early round")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    found = {str(bits): train(bits, args.seeds, args.rounds, args.samples) for bits in (2, 3, 4)}
    text = json.dumps({"window": WINDOW, "order": "A of bits 0-3, B of 4-5, C of 6-7, D of 8-11", "bits": found})
    for key in ('"2":', '"3":', '"4":'):
        text = text.replace(f"{key} ", f"\n  {key} ")
    args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
