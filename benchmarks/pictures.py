"""Draws the README's picture from the JSON files in `results/`: bits per weight against divergence.

The points are written into the picture too, as its description, and a test fails where they and the results disagree.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import matplotlib
from quality_tables import CONTROLS, LARGE, SMALL, body_bits, compared, part_of

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "quality.svg"
MODELS = dict((SMALL, LARGE))
# Told apart by whoever sees few colours, and by their marks.
SERIES = {"fewbit itq3_s": ("o-", "#1f8fd6"), "fewbit twinquant": ("^", "#009e73"), "others": ("s", "#d55e00")}
TICKS = [digit * scale for scale in (0.001, 0.01, 0.1, 1, 10) for digit in (1, 2, 5)]
NEAR_BITS, NEAR_RATIO = 0.5, 1.3  # of points whose names would lie on each other
TWO_BITS, MOST_OF_TWO = ("IQ2_M", "Q2_K"), 3.5
GREY = "#808080"  # to be read on light and on dark pages
Point = tuple[str, float, float]


def shown(row: str) -> tuple[str, str]:
    """The series of a row and its name there; empty for rows that would only crowd the picture."""
    if row.startswith("llama.cpp"):
        kind = row.removeprefix("llama.cpp ").removesuffix(" + imatrix")
        return ("", "") if kind.startswith("pure") else ("others", kind)
    if row.startswith(("HQQ", "GPTQModel", "AutoRound", "torchao int4 g")):
        return "others", row
    series, _, rest = row.partition(" ")
    if series == "TwinQuant":
        return "fewbit twinquant", rest.partition(",")[0]
    plain = row.removesuffix(", no tuning")
    return ("fewbit itq3_s" if plain in ("trellis", "trellis 2 bits", "trellis 4 bits") else ""), ""


def points() -> dict[str, dict[str, list[Point]]]:
    """For each model and series: name, bits per weight of the layers and mean divergence, over the measured seeds."""
    found: dict[str, dict[str, list[Point]]] = {}
    for model in MODELS:
        found[model] = {series: [] for series in SERIES}
        rows = compared(model)
        for row, same in rows.items():
            series, name = shown(row)
            bits = round(body_bits(same), 3)
            # Where blocks do not fit the rows, a mix of two bits is one of four by its bytes.
            misnamed = name in TWO_BITS and bits > MOST_OF_TWO
            if series and part_of(row, rows) != CONTROLS and not misnamed:
                found[model][series].append((name, bits, mean(one["kl_mean"] for one in same)))
    return found


def draw(found: dict[str, dict[str, list[Point]]], target: Path) -> None:
    plt.rcParams |= {"svg.hashsalt": "fewbit", "svg.fonttype": "none", "font.size": 9, "text.color": GREY}
    plt.rcParams |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    figure, panels = plt.subplots(1, len(MODELS), figsize=(8.4, 3.5), layout="constrained")
    for panel, (model, title) in zip(panels, MODELS.items(), strict=True):
        named = [point for series in found[model].values() for point in series if point[0]]
        for series, (style, color) in SERIES.items():
            mine = sorted(found[model][series], key=lambda point: point[1])
            panel.plot([bits for _, bits, _ in mine], [nats for *_, nats in mine], style, color=color, label=series)
            for name, bits, nats in mine:
                # Of two that are next to each other the lower one has its name below, on the other side.
                above = all(abs(bits - b) > NEAR_BITS or not 1 < n / nats < NEAR_RATIO for _, b, n in named)
                place, side = ((4, 4), "left") if above else ((-4, -9), "right")
                panel.annotate(name, (bits, nats), place, textcoords="offset points", color=color, fontsize=7, ha=side)
        panel.set(title=title, xlabel="bits per weight, layers", ylabel="divergence, nats", yscale="log")
        panel.margins(x=0.22, y=0.15)
        panel.grid(color=GREY, alpha=0.25)
        low, high = panel.get_ylim()
        panel.set_yticks([tick for tick in TICKS if low <= tick <= high], minor=False)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    # Beside the panels: inside, it would lie on points of one of them.
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(SERIES))
    metadata = {"Date": None, "Title": "Bits against divergence", "Description": json.dumps(found)}
    figure.savefig(target, format="svg", transparent=True, metadata=metadata)
    # The library ends lines with blanks.
    target.write_text("".join(f"{line.rstrip()}\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    draw(points(), PICTURE)
