"""Draws the README's picture from the JSON files in `results/`: bits per weight against divergence.

The points are written into the picture too, as its description, and a test fails where they and the results disagree.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "quality.svg"
MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B"}
OURS, PEERS = "#1f8fd6", "#d55e00"  # told apart by whoever sees few colours, and by their marks
TICKS = [digit * scale for scale in (0.001, 0.01, 0.1, 1, 10) for digit in (1, 2, 5)]
NEAR_BITS, NEAR_RATIO = 0.5, 1.3  # of points whose names would lie on each other
GREY = "#808080"  # to be read on light and on dark pages


def shown(row: str) -> str:
    """A row's name in the picture; empty for rows that are not in it (controls, unfinished and padded ones)."""
    if row.startswith("llama.cpp") and "pure" not in row and "padded" not in row:
        return row.removeprefix("llama.cpp ").removesuffix(" + imatrix")
    if row.startswith(("HQQ", "GPTQModel", "AutoRound", "torchao int4 g")):
        return row
    return {"trellis": "fewbit", "trellis 2 bits": "fewbit", "trellis 4 bits": "fewbit"}.get(row, "")


def points() -> dict[str, list[tuple[str, float, float]]]:
    """For each model: name, bits per weight of the layers and mean divergence, over the seeds that were measured."""
    found = {}
    for model in MODELS:
        rows: dict[str, list[dict[str, Any]]] = {}
        for key, row in json.loads((RESULTS / f"quality-{model}.json").read_text())["rows"].items():
            rows.setdefault(key.partition(" | ")[0], []).append(row)
        if "trellis 4 bits" not in rows and "trellis 4 bits, no tuning" in rows:
            rows["trellis 4 bits"] = rows["trellis 4 bits, no tuning"]
        found[model] = [
            (shown(name), round(mean(r["bits_per_weight"]["body"] for r in same), 3), mean(r["kl_mean"] for r in same))
            for name, same in rows.items()
            if shown(name)
        ]
    return found


def draw(found: dict[str, list[tuple[str, float, float]]], target: Path) -> None:
    plt.rcParams |= {"svg.hashsalt": "fewbit", "svg.fonttype": "none", "font.size": 9, "text.color": GREY}
    plt.rcParams |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    figure, panels = plt.subplots(1, len(MODELS), figsize=(8.4, 3.2), layout="constrained")
    for panel, (model, title) in zip(panels, MODELS.items(), strict=True):
        own = sorted((bits, nats) for name, bits, nats in found[model] if name == "fewbit")
        panel.plot(*zip(*own, strict=True), "o-", color=OURS, label="fewbit")
        others = [(name, bits, nats) for name, bits, nats in found[model] if name != "fewbit"]
        panel.plot([bits for _, bits, _ in others], [nats for *_, nats in others], "s", color=PEERS, label="others")
        for name, bits, nats in others:
            # Of two that are next to each other the lower one has its name below.
            above = all(abs(bits - b) > NEAR_BITS or not 1 < n / nats < NEAR_RATIO for _, b, n in others)
            place = (4, 4) if above else (4, -11)
            panel.annotate(name, (bits, nats), place, textcoords="offset points", color=PEERS, fontsize=8)
        panel.set(title=title, xlabel="bits per weight, layers", ylabel="divergence, nats", yscale="log")
        panel.margins(x=0.2, y=0.15)
        panel.grid(color=GREY, alpha=0.25)
        low, high = panel.get_ylim()
        panel.set_yticks([tick for tick in TICKS if low <= tick <= high], minor=False)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.legend(frameon=False, loc="upper right")
    metadata = {"Date": None, "Title": "Bits against divergence", "Description": json.dumps(found)}
    figure.savefig(target, format="svg", transparent=True, metadata=metadata)
    # The library ends lines with blanks.
    target.write_text("".join(f"{line.rstrip()}\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    draw(points(), PICTURE)
