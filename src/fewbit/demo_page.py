"""Draws the demo's page: one HTML file with figures as inline SVG, for light and dark screens and for phones.

Takes the demo's report (plain data) and returns text.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from fewbit.drawing import Axis, Plot, errors_svg, histogram_svg, label_points, render


def trade_svg(rows: list[dict[str, Any]]) -> Markup:
    """Size against perplexity: a labelled point per model."""
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
    bars = []
    for row, size in zip(rows, sizes, strict=True):
        score, spread = row["perplexity"], row["perplexity_stderr"] or 0.0
        plot.dot(size, score, row["style"], row["perplexity_stderr"])
        bars.append((plot.at(size, score + spread), plot.at(size, max(low, score - spread))))
    words = [f"{row['name']}: {size:.1f} MB, {row['perplexity']:.1f}" for row, size in zip(rows, sizes, strict=True)]
    label_points(plot, places, words, lines=bars)
    return plot.svg()


def render_page(report: dict[str, Any]) -> str:
    """The page for a report of `fewbit.demo.run_demo`."""
    figures = {
        "histogram_figure": histogram_svg(report["histogram"]),
        "errors_figure": errors_svg(report["errors"]),
        "trade_figure": trade_svg(report["rows"]),
    }
    return render("demo.html", {**report, **figures})
