"""The figures of a report as inline SVG, each for wide screens and for phones.

Colours are classes of the page's style sheet. Whatever a figure shows is in the page's text and tables, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from fewbit.drawing import NARROW, WIDE, Axis, Frame, Plot, Series, label_points, picture, printable
from fewbit.labels import FONT, HEIGHT, Box, Label, shorten, thin_box, width

Place = tuple[float, float]
TINY = 1e-6
"""A divergence of zero has no place on a logarithmic axis."""
LEVELS = (3.0, 4.0, 5.0, 7.0, 10.0, 14.0, 20.0)
"""Where the colours of an outlier map change, in root mean squares."""


def both(draw: Callable[[Frame], Markup]) -> Markup:
    """A figure drawn for wide screens and for phones, one of which the style sheet shows."""
    return Markup(f'<div class="on-wide">{draw(WIDE)}</div><div class="on-narrow">{draw(NARROW)}</div>')


def style_of(row: Mapping[str, Any]) -> str:
    """The colour of a model: full ones, trellis codes, two components, and controls."""
    if row["checkpoint"] is None:
        return "c8"
    formats = row["checkpoint"]["formats"]
    return {"trellis": "c2", "twinquant": "c4"}.get(formats[0] if formats else "", "c3")


def _unit(sizes: Sequence[float]) -> tuple[float, str]:
    return (1e9, "GB") if max(sizes) >= 5e9 else (1e6, "MB")


def _size_axis(sizes: Sequence[float], unit: str) -> Axis:
    low, high = min(sizes), max(sizes)
    margin = 0.15 * (high - low) if high > 1.05 * low else 0.2 * high
    return Axis(f"size, {unit}", max(0.0, low - margin), high + margin)


def _score_axis(scores: Sequence[tuple[float, float]], title: str) -> Axis:
    """An axis with room for every value and its spread up and down; a logarithmic one for a tenth of the value."""
    values = [value for value, _ in scores]
    high = max(value + spread for value, spread in scores)
    if max(values) > 3 * min(values):
        low = min(max(value - spread, value / 10) for value, spread in scores)
        return Axis(f"{title}, log scale", low * 0.75, high * 1.35, log=True)
    low = max(0.0, min(value - spread for value, spread in scores))
    margin = 0.18 * (high - low) if high > 1.02 * low else 0.1 * high
    return Axis(title, max(0.0, low - margin), high + margin)


def trade_svg(
    rows: Sequence[Mapping[str, Any]], front: Sequence[str], score: str, title: str, frame: Frame = WIDE
) -> Markup:
    """Size against a score: a labelled point per model, and the front of those that no other beats in both.

    The reference is a line across rather than a point, as it is several times as large as the others.
    """
    points = [row for row in rows if not row["reference"] and row[score] is not None]
    reference = next((row for row in rows if row["reference"] and score != "kl_mean"), None)
    if not points and reference is not None:
        points, reference = [reference], None
    unit, name = _unit([row["bytes"] for row in points])
    sizes = [row["bytes"] / unit for row in points]
    values = [max(TINY, row[score]) for row in points]
    spreads = [(score == "perplexity" and row["perplexity_stderr"]) or 0.0 for row in points]
    level = [(reference[score], 0.0)] if reference is not None else []
    axis = _score_axis([*zip(values, spreads, strict=True), *level], title)
    words = f"Size against {title}, one point per model; the table below has the figures"
    plot = Plot(_size_axis(sizes, name), axis, words, frame)
    places = [plot.at(size, value) for size, value in zip(sizes, values, strict=True)]
    steps = _stairs([place for place, row in zip(places, points, strict=True) if row["name"] in front], frame)
    plot.path(steps, "front")
    bars = []
    for row, size, value, spread in zip(points, sizes, values, spreads, strict=True):
        plot.dot(size, value, style_of(row), spread)
        bars.append((plot.at(size, value + spread), plot.at(size, value - spread)))
    obstacles = []
    if reference is not None:
        obstacles.append(_level(plot, reference[score], f"reference: {reference[score]:.4g}", bars))
        bars.append((plot.at(plot.x.low, reference[score]), plot.at(plot.x.high, reference[score])))
    label_points(plot, places, [row["name"] for row in points], obstacles, [*pairwise(steps), *bars])
    return plot.svg()


def _level(plot: Plot, value: float, words: str, bars: Sequence[tuple[Place, Place]]) -> Box:
    """A line across at one value with words below or above one of its ends, off `bars` if possible; the words' box."""
    plot.line([(plot.x.low, value), (plot.x.high, value)], "normal")
    frame = plot.frame
    taken = [thin_box(*bar) for bar in bars]
    _, y = plot.at(plot.x.high, value)
    boxes = [
        Box(left, top, left + width(words), top + HEIGHT)
        for top in (y + 2, y - HEIGHT - 1)
        for left in (frame.right - width(words), frame.left + 3)
        if frame.top <= top and top + HEIGHT <= frame.bottom
    ]
    best = min(boxes, key=lambda box: sum(box.overlaps(bar) for bar in taken))
    plot.text(round(best.left, 1), Label(words, best).baseline, words, "start", "soft")
    return best


def _stairs(corners: Sequence[tuple[float, float]], frame: Frame) -> list[tuple[float, float]]:
    """What can be had: from the top down to the smallest model, then by steps to every larger and better one."""
    if not corners:
        return []
    ordered = sorted(corners)
    steps = [(ordered[0][0], float(frame.top))]
    for x, y in ordered:
        steps += [(x, steps[-1][1]), (x, y)]
    return [*steps, (float(frame.right), ordered[-1][1])]


@dataclass(frozen=True)
class _Strip:
    """Where the cells of a heat strip lie: layers across and kinds down, or upright, the other way round."""

    layers: list[int]
    kinds: list[str]
    upright: bool

    @property
    def wide(self) -> int:
        return 320 if self.upright else 640

    @property
    def step(self) -> tuple[float, float]:
        """Width and height of a cell."""
        across = len(self.kinds if self.upright else self.layers)
        high = 22.0 if not self.upright else 15.0 if len(self.layers) <= 48 else 7.0
        return (self.wide - 56) / max(1, across), high

    @property
    def fits(self) -> bool:
        """Whether a cell has room for a number."""
        return self.step[0] >= 17 and self.step[1] >= 14

    def corner(self, layer: int, kind: int) -> tuple[float, float]:
        """The upper left corner of a cell, by its indices."""
        column, row = (kind, layer) if self.upright else (layer, kind)
        return round(52 + column * self.step[0], 1), round(24 + row * self.step[1], 1)


def bits_svg(bits: Series, of: str, frame: Frame = WIDE) -> Markup:
    """A heat strip of the bits of every linear: layers across and kinds down, or the other way on phones."""
    layers = sorted({layer for series in bits.values() for layer, _ in series})
    strip = _Strip(layers, list(bits), frame is NARROW)
    wide, high = (round(size, 1) for size in strip.step)
    marks = []
    for kind, series in enumerate(bits.values()):
        for layer, value in series:
            x, y = strip.corner(layers.index(layer), kind)
            marks.append(f'<rect class="cell {bits_class(value)}" x="{x}" y="{y}" width="{wide}" height="{high}"/>')
            if strip.fits:
                marks.append(_small(x + wide / 2, y + high / 2 + 4, "middle", f"{round(value, 1):g}", "on-bits"))
    below = 24 + strip.step[1] * len(layers if strip.upright else bits) + 4
    words = f"Bits of every linear of {of}, by layer and kind; the text below lists them"
    return picture(strip.wide, below, words, [*marks, *_strip_axes(strip)])


def _strip_axes(strip: _Strip) -> list[str]:
    """Kinds and some of the layers, beside the cells and above them, and a word in the corner that says what counts."""
    across, down = strip.step[0] / 2, strip.step[1] / 2 + 4
    every = max(1, -(-len(strip.layers) // (16 if strip.upright else 20)))
    marks = [_small(46, 16, "end", "layer")]
    for index, words in [
        *((index, str(layer)) for index, layer in enumerate(strip.layers) if index % every == 0),
        *((~index, shorten(kind, 5)) for index, kind in enumerate(strip.kinds)),
    ]:
        is_kind = index < 0
        x, y = strip.corner(0, ~index) if is_kind else strip.corner(index, 0)
        if is_kind == strip.upright:
            marks.append(_small(x + across, 16, "middle", words))
        else:
            marks.append(_small(46, y + down, "end", words))
    return marks


def _small(x: float, y: float, anchor: str, words: str, style: str = "title") -> str:
    shown = escape(printable(words))
    return f'<text class="small {style}" x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}">{shown}</text>'


def bits_class(bits: float) -> str:
    """The colour of so many bits."""
    return next(name for most, name in ((2.5, "b2"), (3.5, "b3"), (5, "b4"), (9, "b8"), (99, "b16")) if bits <= most)


def outliers_svg(cells: Sequence[Sequence[float]], words: str) -> Markup:
    """A map of the largest |w| of every cell over the matrix's root mean square, in eight colours."""
    wide, high = len(cells[0]), len(cells)
    paths = [""] * (len(LEVELS) + 1)
    for y, row in enumerate(cells):
        start = 0
        for x in range(1, wide + 1):
            level = _level_of(row[start])
            if x == wide or _level_of(row[x]) != level:
                paths[level] += f"M{start} {y}h{x - start}v1h{start - x}z"
                start = x
    # Every matrix becomes a square: its cells are equal parts of its sides.
    side = 240
    marks = [
        f'<path class="l{level}" transform="scale({side / wide:g} {side / high:g})" d="{path}"/>'
        for level, path in enumerate(paths)
        if path
    ]
    return picture(side, side, words, marks)


def _level_of(value: float) -> int:
    return sum(value >= edge for edge in LEVELS)


def levels() -> list[tuple[str, str]]:
    """The legend of an outlier map: (class, words)."""
    edges = [f"{edge:g}" for edge in LEVELS]
    words = [f"under {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges)),
             f"{edges[-1]} or more"]  # fmt: skip
    return [(f"l{index}", text) for index, text in enumerate(words)]


def speed_svg(rows: Sequence[Mapping[str, Any]], frame: Frame = WIDE) -> Markup:
    """Decoding of every model as a bar, filled as far as it comes in the outline of what memory allows."""
    timed = [row for row in rows if row["speed"] and "decode" in row["speed"]]
    most = max(max(row["speed"]["limit"] or 0.0, rate(row)) for row in timed)
    wide, step = (320 if frame is NARROW else 640), 44
    scale = (wide - 4) / most
    marks = []
    for number, row in enumerate(timed):
        top, limit = number * step, row["speed"]["limit"]
        value = f"{rate(row):.1f} tokens/s" + (f" of {limit:.0f}" if limit else "")
        room = int((wide - width(value) - 16) / (0.72 * FONT))
        name = escape(printable(shorten(row["name"], room)))
        marks.append(f'<text class="of-ink" x="2" y="{top + 14}">{name}</text>')
        marks.append(f'<text class="of-ink" x="{wide - 2}" y="{top + 14}" text-anchor="end">{value}</text>')
        if limit:
            marks.append(f'<rect class="limit" x="2" y="{top + 21}" width="{round(limit * scale, 1)}" height="14"/>')
        reached = round(rate(row) * scale, 1)
        marks.append(f'<rect class="bar {style_of(row)}" x="2" y="{top + 21}" width="{reached}" height="14"/>')
    words = "Decoding speed of every model beside what the memory's speed allows; the table below has the figures"
    return picture(wide, max(1, len(timed)) * step, words, marks)


def rate(row: Mapping[str, Any]) -> float:
    """Tokens per second of decoding one sequence."""
    return float(row["speed"]["decode"][0]["tokens_per_second"])
