"""Draws the demo's page: one HTML file with figures as inline SVG, for light and dark screens and for phones.

Takes the demo's report (plain data) and returns text.
"""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from fewbit.drawing import Axis, Plot, errors_svg, histogram_svg, render


def trade_svg(rows: list[dict[str, Any]]) -> Markup:
    """Size against perplexity: a labelled point per model, labels moved apart where they would touch."""
    sizes = [row["bytes"] / 1e6 for row in rows]
    scores = [row["perplexity"] for row in rows]
    lowest, highest = min(scores), max(scores)
    log = highest > 3 * lowest
    low, high = (lowest * 0.8, highest * 1.3) if log else (lowest - 0.15 * lowest, highest + 0.15 * lowest)
    plot = Plot(
        Axis("file size, MB", 0.0, max(sizes) * 1.12),
        Axis("perplexity" + (", logarithmic" if log else ""), low, high, log=log),
        "File size against perplexity",
    )
    places = [plot.at(size, score) for size, score in zip(sizes, scores, strict=True)]
    middle = (plot.frame.left + plot.frame.right) / 2
    # Labels of the small models start behind the last of their points, so that none covers a point.
    start = max((x for x, _ in places if x < middle), default=0.0) + 12
    above = math.inf
    for row, size, (x, y) in sorted(zip(rows, sizes, places, strict=True), key=lambda entry: -entry[2][1]):
        plot.dot(size, row["perplexity"], row["style"], row["perplexity_stderr"])
        words = f"{row['name']}: {size:.1f} MB, {row['perplexity']:.1f}"
        if x < middle:
            above = min(y, above - 17)
            plot.text(round(start, 1), round(above + 4, 1), words, "start", row["style"])
        else:
            plot.text(x - 11, round(y + 4, 1), words, "end", row["style"])
    return plot.svg()


def render_page(report: dict[str, Any]) -> str:
    """The page for a report of `fewbit.demo.run_demo`."""
    figures = {
        "histogram_figure": histogram_svg(report["histogram"]),
        "errors_figure": errors_svg(report["errors"]),
        "trade_figure": trade_svg(report["rows"]),
    }
    return render("demo.html", {**report, **figures})
