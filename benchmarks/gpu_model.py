"""What the kernels could reach on five cards, by bytes, products and instructions alone: `results/gpu-model.json`.

A roofline, not a measurement: the time is the largest of three limits, each taken at the maker's figure, and nothing
overlaps badly, waits or starts slowly in it. Instructions per weight are those of the compiled loops
(`results/gpu-static.json`), so run `gpu_static.py` first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 8, 32, 128, 512)
MOST = max(TOKENS)
RANK = 128
# The linears of LLaMA-3-8B: outputs, inputs, how many in the model.
SHAPES = ((6144, 4096, 32), (4096, 4096, 32), (28672, 4096, 32), (4096, 14336, 32))


@dataclass(frozen=True)
class Card:
    """A card by its maker's data sheet: bytes and dense products (1 multiply-add is 2) per second, boost clock in Hz.

    A multiprocessor issues one instruction to each of 4 x 32 threads per cycle.
    """

    arch: int
    bandwidth: float
    processors: int
    clock: float
    fp16: float
    int8: float

    @property
    def issue(self) -> float:
        return self.processors * self.clock * 128


CARDS = {
    "A100 SXM 80 GB": Card(80, 2039e9, 108, 1.41e9, 312e12, 624e12),
    "H100 SXM": Card(90, 3350e9, 132, 1.83e9, 989e12, 1979e12),
    "RTX 4090": Card(89, 1008e9, 128, 2.52e9, 165e12, 661e12),
    "RTX 5090": Card(120, 1792e9, 170, 2.41e9, 210e12, 838e12),
    "L20": Card(89, 864e9, 92, 2.52e9, 119.5e12, 239e12),
}


@dataclass(frozen=True)
class Method:
    """Bytes per weight, the products' width, and the compiled loops (none: decoding is free): up to how many tokens
    each is used, tokens of its tile, its name."""

    bytes_per_weight: float
    int8: bool
    loops: tuple[tuple[int, int, str], ...] = ()
    rank: int = 0


def methods(static: dict[str, Any]) -> dict[str, Method]:
    def size(name: str) -> float:
        return static[name]["80"]["bytes_per_weight"]

    def loops(name: str) -> tuple[tuple[int, int, str], ...]:
        few, many = (16, 16, f"gemv, {name}"), (64, f"gemm, {name}")
        prompt = f"prompt, {name}"
        return (few, (128, *many), (MOST, 256, prompt)) if prompt in static else (few, (MOST, *many))

    return {
        "fp16": Method(2.0, False),
        "4 bits, weights only, decoding free": Method(4.125 / 8, False),
        "itq3_s, trellis 3 bits": Method(size("gemm, trellis, 3 bits"), True, loops("trellis, 3 bits")),
        "itq3_s, the paper's placement": Method(
            size("gemm, inverse, trellis, 3 bits"), False, loops("inverse, trellis, 3 bits")
        ),
        "twinquant W4A8, h folded": Method(size("gemm, int4"), True, loops("int4"), RANK),
    }


def predict(card: Card, method: Method, tokens: int, static: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of all linears for one step of `tokens` tokens, and the limit that binds."""
    weights = moved = 0.0
    for rows, cols, count in SHAPES:
        weights += count * (rows * cols + method.rank * (rows + cols))
        moved += count * tokens * (3 * cols + 2 * rows)
    limits = {
        "memory": (weights * method.bytes_per_weight + moved) / card.bandwidth,
        "products": 2 * weights * tokens / (card.int8 if method.int8 else card.fp16),
    }
    if method.loops:
        tile, name = next(rest for limit, *rest in method.loops if tokens <= limit)
        each = static[name][str(card.arch)]["loop_instructions_per_weight"]
        limits["instructions"] = weights * each * -(-tokens // tile) / card.issue
    binding = max(limits, key=lambda limit: limits[limit])
    return {"milliseconds": round(1e3 * limits[binding], 3), "limit": binding}


def main() -> None:
    static = json.loads((RESULTS / "gpu-static.json").read_text())["kernels"]
    report = {
        "tokens": TOKENS,
        "rows": [
            {"card": name, "method": title, "predicted": [predict(card, method, t, static) for t in TOKENS]}
            for name, card in CARDS.items()
            for title, method in methods(static).items()
        ],
    }
    (RESULTS / "gpu-model.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
