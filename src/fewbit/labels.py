"""Puts words beside the points of a plot so that no two labels, and no label and a point, cover each other.

Widths are estimated, generously, since the page's reader has the font and this program does not.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

FONT = 13.0
HEIGHT, ABOVE = 17.0, 12.5
"""Height of a label, and how far its top lies above its baseline."""
REACH = 7.0
"""Half the side of the square that a point takes."""
STEP = 6.0
LIMITS = (26, 20, 15, 11, 8, 5)
"""Characters of a label at most; the next lower number is tried where labels do not fit."""


@dataclass(frozen=True)
class Box:
    """A rectangle in picture coordinates, y growing downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box nearest to another."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


def thin_box(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """The box of a line across or down, from one end to the other."""
    (x, y), (u, v) = one, other
    return Box(min(x, u) - 1, min(y, v) - 1, max(x, u) + 1, max(y, v) + 1)


@dataclass(frozen=True)
class Label:
    """Words and the box they take."""

    words: str
    box: Box

    @property
    def baseline(self) -> float:
        return round(self.box.top + ABOVE, 1)


def width(words: str) -> float:
    """The most that words take in any usual sans-serif font, in units of the picture."""
    return sum(_share(char) for char in words) * FONT


def _share(char: str) -> float:
    if unicodedata.east_asian_width(char) in "WF" or char in "WMm@%…":
        return 1.05
    if char in "iljtfrI.,:;'|!()[] -/":
        return 0.45
    return 0.8 if char.isupper() else 0.66


def shorten(words: str, limit: int) -> str:
    """At most `limit` characters, without those in the middle: names differ at their ends more than there."""
    if len(words) <= limit:
        return words
    tail = (limit - 1) * 3 // 5
    return f"{words[: limit - 1 - tail]}…{words[len(words) - tail :]}"


def shorten_all(names: Sequence[str], limit: int) -> list[str]:
    """Names of at most `limit` characters; where one is longer, all lose what they begin and end with alike."""
    if max(map(len, names)) <= limit:
        return list(names)
    head = _shared(names)
    tail = _shared([name[head:][::-1] for name in names])
    cut = [f"{'…' * bool(head)}{name[head : len(name) - tail]}{'…' * bool(tail)}" for name in names]
    return [shorten(words, limit) for words in cut]


def _shared(names: Sequence[str]) -> int:
    """How many characters all of several names begin with; none where an ellipsis in their place is no shorter."""
    if len(set(names)) < 2:
        return 0
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    count = sum(1 for _ in columns)
    return count if count > 1 else 0


@dataclass(frozen=True)
class Surroundings:
    """Where labels go: inside `frame`, off the `obstacles`, and rather not across the `lines`, given as thin boxes."""

    frame: Box
    obstacles: tuple[Box, ...] = ()
    lines: tuple[Box, ...] = ()

    def cost(self, box: Box) -> float:
        """Infinite where a label must not be; otherwise what it spoils."""
        frame = self.frame
        if box.left < frame.left or box.right > frame.right or box.top < frame.top or box.bottom > frame.bottom:
            return math.inf
        if any(box.overlaps(obstacle) for obstacle in self.obstacles):
            return math.inf
        return 25.0 * sum(box.overlaps(line) for line in self.lines)


def place(points: Sequence[tuple[float, float]], names: Sequence[str], around: Surroundings) -> list[Label | None]:
    """A label for every point, near it; None for points in a crowd that leaves no room at all."""
    labels: list[Label | None] = []
    if not points:
        return labels
    for limit in LIMITS:
        labels = _place(points, shorten_all(names, limit), around)
        if all(labels):
            break
    return labels


def _place(points: Sequence[tuple[float, float]], words: Sequence[str], around: Surroundings) -> list[Label | None]:
    dots = [Box(x - REACH, y - REACH, x + REACH, y + REACH) for x, y in points]
    placed: list[Label | None] = [None] * len(points)
    around = replace(around, obstacles=(*around.obstacles, *dots))
    # Those with most neighbours choose first.
    crowd = [sum(math.dist(point, other) < 60 for other in points) for point in points]
    for index in sorted(range(len(points)), key=lambda index: (-crowd[index], points[index][1])):
        box = _best(points[index], width(words[index]), around)
        if box is not None:
            placed[index] = Label(words[index], box)
            around = replace(around, obstacles=(*around.obstacles, box))
    return placed


def _best(point: tuple[float, float], wide: float, around: Surroundings) -> Box | None:
    """The best free box near a point, its sides preferred to its top and bottom."""
    x, y = point
    frame = around.frame
    beside = [(x + 10, y - HEIGHT / 2), (x - 10 - wide, y - HEIGHT / 2)]
    over = [(x - wide / 2, y - 10 - HEIGHT), (x - wide / 2, y + 10)]
    columns = int(max(0.0, frame.right - frame.left - wide) // STEP) + 1
    rows = int(max(0.0, frame.bottom - frame.top - HEIGHT) // STEP) + 1
    anywhere = [(frame.left + STEP * i, frame.top + STEP * j) for i in range(columns) for j in range(rows)]
    best, least = None, math.inf
    for extra, places in ((0.0, beside), (2.0, over), (10.0, anywhere)):
        for left, top in places:
            box = Box(left, top, left + wide, top + HEIGHT)
            cost = math.dist(point, box.nearest(x, y)) + extra
            if cost < least:
                cost += around.cost(box)
            if cost < least:
                best, least = box, cost
    return best
