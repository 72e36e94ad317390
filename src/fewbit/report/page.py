"""Lays a report out as one HTML file: figures, tables, and sentences that say the same in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from fewbit.drawing import Frame, error_axis, errors_svg, histogram_svg, printable, render
from fewbit.report import figures
from fewbit.report.record import LayerValues, ranges

SCORES = {"kl_mean": ("KL divergence", "mean KL, nats"), "perplexity": ("perplexity", "perplexity")}
"""What the figures of size against quality show: a heading, and the axis's title."""


def render_report(report: Mapping[str, Any]) -> str:
    """The page for a report of `fewbit.report.collect.collect`."""
    rows = report["models"]
    checkpoints = [row for row in rows if row["checkpoint"]]
    shown = {
        "title": _title(rows),
        "rows": rows,
        "checkpoints": checkpoints,
        "trades": _trades(report),
        "errors": _errors(checkpoints),
        "kinds": list(dict.fromkeys(kind for row in checkpoints for kind in row["checkpoint"]["errors"])),
        "mixed": [_strip(row) for row in checkpoints if _is_mixed(row)],
        "uniform": [(row["name"], _uniform(row)) for row in checkpoints if not _is_mixed(row)],
        "rotation": _rotation(report["tails"]),
        "speed": _speed(rows),
        "levels": figures.levels(),
    }
    return render("report.html", {**report, **shown})


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [printable(row["name"]) for row in rows]
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} more models"


def _trades(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of size against a score, with the front in words; none for a score that no model has."""
    found = []
    for score, (heading, title) in SCORES.items():
        measured = [
            row for row in report["models"] if row[score] is not None and not (row["reference"] and score == "kl_mean")
        ]
        if measured:
            draw = partial(figures.trade_svg, report["models"], report["fronts"][score], score, title)
            found.append({"title": heading, "figure": figures.both(draw), "front": report["fronts"][score]})
    return found


def _errors(checkpoints: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A figure and a table for every checkpoint, all figures on one axis."""
    axis = error_axis([row["checkpoint"]["errors"] for row in checkpoints])
    found = []
    for row in checkpoints:
        errors = row["checkpoint"]["errors"]
        table = []
        for kind, series in errors.items():
            layer, most = max(series, key=lambda entry: entry[1])
            table.append({"kind": kind, "mean": sum(e for _, e in series) / len(series), "most": most, "layer": layer})
        figure = figures.both(partial(_errors_figure, errors, axis, row["name"])) if errors else Markup("")
        found.append({"row": row, "figure": figure, "table": table})
    return found


def _errors_figure(errors: LayerValues, axis: Any, name: str, frame: Frame) -> Markup:
    return errors_svg(errors, axis, frame, name)


def _is_mixed(row: Mapping[str, Any]) -> bool:
    return len({bits for series in row["checkpoint"]["bits"].values() for _, bits in series}) > 1


def _strip(row: Mapping[str, Any]) -> dict[str, Any]:
    """A heat strip, the same in words, and the legend of the bits that occur."""
    bits = row["checkpoint"]["bits"]
    values = sorted({value for series in bits.values() for _, value in series})
    kinds: dict[str, list[str]] = {}
    for kind, series in bits.items():
        kinds.setdefault("; ".join(_run_words(value, runs) for value, runs in ranges(series)), []).append(kind)
    return {
        "row": row,
        "figure": figures.both(partial(figures.bits_svg, bits, row["name"])),
        "words": {", ".join(alike): words for words, alike in kinds.items()},
        "legend": {figures.bits_class(value): _bits(value) for value in values},
        "tables": _tables(row),
    }


def _run_words(value: float, runs: Sequence[tuple[int, int]]) -> str:
    spans = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in runs)
    one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{_bits(value)} in layer{'' if one else 's'} {spans}"


def _bits(value: float) -> str:
    return f"{round(value, 2):g} bits"


def _uniform(row: Mapping[str, Any]) -> str:
    values = {value for series in row["checkpoint"]["bits"].values() for _, value in series}
    layers = f"{_bits(values.pop())} in every linear of every layer" if values else "no linear is quantized"
    return "; ".join([layers, *_tables(row)])


def _tables(row: Mapping[str, Any]) -> list[str]:
    names = {"embed": "embeddings", "head": "output head"}
    return [f"{names[kind]} in {_bits(bits)}" for kind, bits in row["checkpoint"]["tables"].items()]


def _rotation(tails: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if tails is None:
        return None
    maps = {}
    for name in ("before", "after"):
        words = f"Largest weights of {tails['tensor']} {name} the rotation, cell by cell"
        maps[name] = figures.outliers_svg(tails[f"outliers_{name}"], words)
    return {"histogram": figures.both(partial(_histogram, tails)), "maps": maps}


def _histogram(tails: Mapping[str, Any], frame: Frame) -> Markup:
    return histogram_svg(tails, frame)


def _speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    timed = [row for row in rows if row["speed"] and "decode" in row["speed"]]
    if not timed:
        return None
    return {
        "figure": figures.both(partial(figures.speed_svg, rows)),
        "rows": timed,
        "first": timed[0]["speed"],
    }
