"""Draws the demo's page: one HTML file with figures as inline SVG, for light and dark screens and for phones.

Takes the demo's report (plain data) and returns text; whatever comes from a model is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fewbit.console import human_bytes, human_seconds

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 466, 14, 252


@dataclass(frozen=True)
class Axis:
    """One axis of a plot: its range, its title and whether it is logarithmic (then `low` > 0)."""

    title: str
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values inside the range: 1, 2, 5 times powers of ten; about six of them."""
        if not self.log:
            return _linear_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if math.log10(self.high / self.low) < 2.5 else (1,)
        return [step * 10.0**decade for decade in decades for step in steps if self._holds(step * 10.0**decade)]

    def _holds(self, value: float) -> bool:
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


class Plot:
    """Collects marks over two axes and gives them back as one SVG element."""

    def __init__(self, x: Axis, y: Axis, label: str) -> None:
        self.x, self.y = x, y
        self._label = label
        self._marks: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to picture coordinates, clipped to the frame."""
        across = min(1.0, max(0.0, self.x.share(x)))
        up = min(1.0, max(0.0, self.y.share(y)))
        return round(_LEFT + across * (_RIGHT - _LEFT), 1), round(_BOTTOM - up * (_BOTTOM - _TOP), 1)

    def line(self, points: Points, style: str) -> None:
        if not points:
            return
        path = " ".join(f"{x},{y}" for x, y in (self.at(*point) for point in points))
        self._marks.append(f'<polyline class="line {style}" points="{path}"/>')

    def dot(self, x: float, y: float, style: str, spread: float | None = None) -> None:
        """A point, with a bar of `spread` up and down."""
        across, up = self.at(x, y)
        if spread:
            low, high = self.at(x, max(y - spread, self.y.low))[1], self.at(x, y + spread)[1]
            self._marks.append(f'<line class="line {style}" x1="{across}" x2="{across}" y1="{low}" y2="{high}"/>')
        self._marks.append(f'<circle class="dot {style}" cx="{across}" cy="{up}" r="5"/>')

    def text(self, x: float, y: float, words: str, anchor: str, style: str) -> None:
        """Words at a place in picture coordinates, in the colour of a style."""
        self._marks.append(
            f'<text class="of-{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(printable(words))}</text>'
        )

    def svg(self) -> Markup:
        """The picture; colours and strokes come from the page's style sheet."""
        middle = (_TOP + _BOTTOM) / 2
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(self._label)}">',
            *self._grid(),
            *self._marks,
            f'<text class="title" x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
            f"{escape(self.x.title)}</text>",
            f'<text class="title" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.title)}</text>",
            "</svg>",
        ]
        return Markup("".join(parts))

    def _grid(self) -> list[str]:
        parts = []
        for value in self.y.ticks():
            _, y = self.at(self.x.low, value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{_tick(value)}</text>')
        for value in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}"/>')
            parts.append(f'<text x="{x}" y="{_BOTTOM + 17}" text-anchor="middle">{_tick(value)}</text>')
        return parts


def _tick(value: float) -> str:
    """A tick's number: plain from 0.0001 on, as a power of ten below."""
    if value and abs(value) < 1e-4:
        return f"1e{round(math.log10(abs(value)))}"
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def histogram_svg(histogram: dict[str, Any]) -> Markup:
    """Densities before and after the rotation and the normal density, over a logarithmic scale.

    `histogram` has `centers`, `before` and `after`, lists of one length; empty bins leave gaps at the ends.
    """
    centers = histogram["centers"]
    edge = max(abs(center) for center in centers)
    floor = 1e-5
    plot = Plot(
        Axis("weight / root mean square of its group", -edge, edge),
        Axis("density", floor, 1.0, log=True),
        "Distribution of the weights of one layer before and after rotation, with the normal density",
    )
    normal = [(x / 20, math.exp(-((x / 20) ** 2) / 2) / math.sqrt(2 * math.pi)) for x in range(-100, 101)]
    plot.line([(x, y) for x, y in normal if y >= floor and abs(x) <= edge], "normal")
    for name, style in (("before", "c1"), ("after", "c2")):
        plot.line([(x, y) for x, y in zip(centers, histogram[name], strict=True) if y >= floor], style)
    return plot.svg()


def errors_svg(errors: dict[str, list[tuple[int, float]]]) -> Markup:
    """Relative squared error over the layers, a line for every kind of linear (at most eight styles)."""
    layers = [layer for series in errors.values() for layer, _ in series]
    found = [error for series in errors.values() for _, error in series] or [1.0]
    # The lines lie close together, so the axis does not start at zero.
    low, high = 0.9 * min(found), 1.05 * max(found)
    plot = Plot(
        Axis("decoder layer", min(layers, default=0), max(max(layers, default=0), min(layers, default=0) + 1)),
        Axis("relative squared error", low, high if high > low else low + 1.0),
        "Relative error of every linear over the layers",
    )
    for index, series in enumerate(errors.values()):
        plot.line(series, f"k{index % 8}")
    return plot.svg()


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
    middle = (_LEFT + _RIGHT) / 2
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


def printable(text: str) -> str:
    """Model output without control characters, which neither a terminal nor a page should interpret."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def render_page(report: dict[str, Any]) -> str:
    """The page for a report of `fewbit.demo.run_demo`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=human_bytes, duration=human_seconds, printable=printable)
    template = resources.files("fewbit").joinpath("templates/demo.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        **report,
        histogram_figure=histogram_svg(report["histogram"]),
        errors_figure=errors_svg(report["errors"]),
        trade_figure=trade_svg(report["rows"]),
    )
