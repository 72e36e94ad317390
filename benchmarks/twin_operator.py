"""The fused operator of TwinQuant beside its products run apart: residual, low-rank part and second factor as three
linears whose results are added. Shapes are those of a 1.5B model; codes are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from encode import commit

import fewbit.ops.cpu  # noqa: F401
from fewbit.environment import environment
from fewbit.ops.extension import load_native

OUTPUT = Path(__file__).resolve().parent / "results" / "twin_operator.json"
SHAPES = ((1536, 1536), (8960, 1536), (1536, 8960))
RANK, GROUP = 128, 128


def packed(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and tensor scale of a random int4 matrix."""
    codes = torch.randint(0, 256, (-(-rows // 16), 8 * cols), dtype=torch.uint8)
    return codes, torch.rand(rows, cols // GROUP).half(), torch.tensor([0.01])


def microseconds(work: Callable[[], object], repeats: int, least: float = 0.05) -> tuple[float, float]:
    """Median and standard deviation over `repeats` of the mean microseconds of a call."""
    work()
    found = []
    for _ in range(repeats):
        calls, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < least:
            work()
            calls += 1
        found.append(1e6 * spent / calls)
    return round(statistics.median(found), 1), round(statistics.stdev(found), 1)


def measure(rows: int, cols: int, tokens: int, act_bits: int, repeats: int) -> dict[str, float]:
    """Microseconds of a call, fused and apart."""
    x = torch.randn(tokens, cols)
    signs = torch.randint(0, 256, (cols // 8,), dtype=torch.uint8)
    block = min(256, cols & -cols)
    shift = torch.zeros(cols).half()
    down, both = packed(RANK, cols), packed(rows, cols + RANK)
    residual, up = packed(rows, cols), packed(rows, RANK)

    def linear(inputs: torch.Tensor, parts: tuple[torch.Tensor, ...], rotated: bool) -> torch.Tensor:
        rotation = (signs, None, 4, block) if rotated else (None, None, 4, 1)
        return torch.ops.fewbit.linear(inputs, *parts, None, *rotation, "nibbles", act_bits, shift if rotated else None)

    def fused() -> torch.Tensor:
        return torch.ops.fewbit.twin_linear(x, *down, *both, signs, None, block, act_bits, shift)

    def apart() -> torch.Tensor:
        return linear(x, residual, True) + linear(linear(x, down, True), up, False)

    (together, deviation), (separate, separate_deviation) = microseconds(fused, repeats), microseconds(apart, repeats)
    return {
        "rows": rows,
        "cols": cols,
        "tokens": tokens,
        "act_bits": act_bits,
        "fused_microseconds": together,
        "fused_deviation": deviation,
        "apart_microseconds": separate,
        "apart_deviation": separate_deviation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    native = load_native()
    if native is None:
        raise SystemExit("twin_operator: the native extension is not built")
    found = []
    for threads in arguments.threads:
        native.set_num_threads(threads)
        torch.set_num_threads(threads)
        for rows, cols in SHAPES:
            for tokens in arguments.tokens:
                row = {"threads": threads, **measure(rows, cols, tokens, 8, arguments.repeats)}
                found.append(row)
                print(row, flush=True)
    report = {"benchmark": "twin_operator", "rank": RANK, "rows": found, "environment": environment()}
    arguments.output.write_text(json.dumps({**report, "commit": commit()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
