"""What every page that fewbit writes shares: plots as inline SVG, the templates, and text made safe to show.

Colours and strokes come from the style sheet in `templates/base.html`; whatever comes from a model is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fewbit.console import human_bytes, human_seconds
from fewbit.labels import Box, Surroundings, place, thin_box

Points = Sequence[tuple[float, float]]
Series = Mapping[str, Sequence[tuple[int, float]]]
"""A value of every layer for every kind of linear: (layer, value) in order."""


@dataclass(frozen=True)
class Frame:
    """A picture's size and the rectangle that its data lies in, in units of the picture (y grows downwards)."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


WIDE = Frame(480, 300, 74, 466, 14, 252)
NARROW = Frame(320, 280, 74, 310, 14, 232)
"""For phones, where a wide picture would be shrunk until its text is too small."""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot: its range, its title and whether it is logarithmic (then `low` > 0)."""

    title: str
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end. A logarithmic axis has all values below its low
        end there: no place on it is zero's."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
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

    def __init__(self, x: Axis, y: Axis, label: str, frame: Frame = WIDE) -> None:
        self.x, self.y = x, y
        self.frame = frame
        self._label = label
        self._marks: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to picture coordinates, clipped to the frame."""
        across = min(1.0, max(0.0, self.x.share(x)))
        up = min(1.0, max(0.0, self.y.share(y)))
        left, bottom = self.frame.left, self.frame.bottom
        return round(left + across * (self.frame.right - left), 1), round(bottom - up * (bottom - self.frame.top), 1)

    def line(self, points: Points, style: str) -> None:
        if not points:
            return
        path = " ".join(f"{x},{y}" for x, y in (self.at(*point) for point in points))
        self._marks.append(f'<polyline class="line {style}" points="{path}"/>')

    def path(self, points: Points, style: str) -> None:
        """A line through places in picture coordinates."""
        if points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
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
        frame = self.frame
        middle = (frame.top + frame.bottom) / 2
        titles = [
            f'<text class="title" x="{(frame.left + frame.right) / 2}" y="{frame.height - 8}" text-anchor="middle">'
            f"{escape(self.x.title)}</text>",
            f'<text class="title" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.title)}</text>",
        ]
        return picture(frame.width, frame.height, self._label, [*self._grid(), *self._marks, *titles])

    def _grid(self) -> list[str]:
        frame = self.frame
        parts = []
        for value in self.y.ticks():
            _, y = self.at(self.x.low, value)
            parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{frame.left - 6}" y="{y + 4}" text-anchor="end">{_tick(value)}</text>')
        for value in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{frame.bottom}"/>')
            parts.append(f'<text x="{x}" y="{frame.bottom + 19}" text-anchor="middle">{_tick(value)}</text>')
        return parts


def label_points(
    plot: Plot,
    places: Points,
    names: Sequence[str],
    obstacles: Sequence[Box] = (),
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> None:
    """Put a name beside every point, off `obstacles` and rather not across `lines`, with a line to it where it had to
    move away; everything in picture coordinates."""
    frame = plot.frame
    inner = Box(frame.left + 2, frame.top, frame.right, frame.bottom - 2)
    around = Surroundings(inner, tuple(obstacles), tuple(thin_box(*ends) for ends in lines))
    for (x, y), label in zip(places, place(places, names, around), strict=True):
        if label is None:
            continue
        near = label.box.nearest(x, y)
        if abs(near[0] - x) + abs(near[1] - y) > 16:
            plot.path([(x, y), near], "leader")
        plot.text(round(label.box.left, 1), label.baseline, label.words, "start", "ink")


def picture(width: float, height: float, label: str, marks: Sequence[str]) -> Markup:
    """An SVG element that is one image to those who cannot see it, described by `label`."""
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(printable(label))}">{"".join(marks)}</svg>'
    )


def _tick(value: float) -> str:
    """A tick's number: plain from 0.0001 on, as a power of ten below."""
    if value and abs(value) < 1e-4:
        return f"1e{round(math.log10(abs(value)))}"
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def histogram_svg(histogram: Mapping[str, Any], frame: Frame = WIDE) -> Markup:
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
        frame,
    )
    normal = [(x / 20, math.exp(-((x / 20) ** 2) / 2) / math.sqrt(2 * math.pi)) for x in range(-100, 101)]
    plot.line([(x, y) for x, y in normal if y >= floor and abs(x) <= edge], "normal")
    for name, style in (("before", "c1"), ("after", "c2")):
        plot.line([(x, y) for x, y in zip(centers, histogram[name], strict=True) if y >= floor], style)
    return plot.svg()


def errors_svg(errors: Series, y: Axis | None = None, frame: Frame = WIDE, of: str = "") -> Markup:
    """Relative squared error over the layers, a line for every kind of linear (eight styles in turn).

    `y` is an axis that several pictures share (None: one of this picture's own), `of` whose errors these are.
    """
    layers = [layer for series in errors.values() for layer, _ in series]
    first = min(layers, default=0)
    plot = Plot(
        Axis("decoder layer", first, max(max(layers, default=0), first + 1)),
        y or error_axis([errors]),
        "Relative error of every linear over the layers" + (f": {of}" if of else ""),
        frame,
    )
    for index, series in enumerate(errors.values()):
        plot.line(series, f"k{index % 8}")
    return plot.svg()


def error_axis(several: Sequence[Series]) -> Axis:
    """One axis for the errors of several models; logarithmic where they lie far apart."""
    found = [error for errors in several for series in errors.values() for _, error in series if error > 0] or [1.0]
    least, most = min(found), max(found)
    if most > 4 * least:
        return Axis("relative squared error", 0.8 * least, 1.25 * most, log=True)
    # The lines lie close together, so the axis does not start at zero.
    low, high = 0.9 * least, 1.05 * most
    return Axis("relative squared error", low, high)


def printable(text: str) -> str:
    """Model output without control characters, which neither a terminal nor a page should interpret."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page out of `templates/`; what it prints is escaped unless it is `Markup`."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("fewbit", "templates"),
    )
    environment.filters.update(size=human_bytes, duration=human_seconds, printable=printable)
    return environment.get_template(template).render(values)
