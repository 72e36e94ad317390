"""Reads a finished checkpoint's record: errors, bits and tuning, by layer and by kind of linear."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

LayerValues = dict[str, list[tuple[int, float]]]
"""For every kind of linear its (layer, value), in the order of the layers."""


def by_kind(tensors: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> LayerValues:
    """A value of every linear of the decoder layers; the experts of one layer and kind become their mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for entry in tensors:
        match = re.search(r"\.(\d+)\.(?:.*\.)?(\w+)\.weight$", entry["name"])
        if entry["kind"] == "body" and match:
            layers = found.setdefault(match[2].removesuffix("_proj"), {})
            layers.setdefault(int(match[1]), []).append(value(entry))
    return {
        kind: [(layer, sum(values) / len(values)) for layer, values in sorted(layers.items())]
        for kind, layers in found.items()
    }


def errors_by_kind(tensors: list[dict[str, Any]]) -> LayerValues:
    """Relative squared errors of the quantized linears."""
    return by_kind([entry for entry in tensors if entry["format"]], lambda entry: entry["relative_error"])


def bits_by_kind(tensors: list[dict[str, Any]]) -> LayerValues:
    """The bits chosen for every linear, those of plain storage where it was left alone."""
    return by_kind(tensors, lambda entry: entry["bits"] or 8 * entry["bytes"] / entry["weights"])


def tables(tensors: list[dict[str, Any]]) -> dict[str, float]:
    """Bits of the embeddings and of the output head."""
    return {
        entry["kind"]: entry["bits"] or 8 * entry["bytes"] / entry["weights"]
        for entry in tensors
        if entry["kind"] in ("embed", "head")
    }


def ranges(series: list[tuple[int, float]]) -> list[tuple[float, list[tuple[int, int]]]]:
    """Which layers have which value: for every value, ascending, the runs (first layer, last layer)."""
    runs: dict[float, list[tuple[int, int]]] = {}
    before: tuple[int, float] | None = None
    for layer, value in series:
        if before == (layer - 1, value):
            runs[value][-1] = (runs[value][-1][0], layer)
        else:
            runs.setdefault(value, []).append((layer, layer))
        before = (layer, value)
    return sorted(runs.items())


def tuning_gain(record: Mapping[str, Any]) -> dict[str, float] | None:
    """The divergence on held-out calibration windows before and after tuning, in nats; None where nothing was tuned."""
    report = record.get("tuning")
    if not report:
        return None
    return {
        "before": report["rounded"],
        "after": min(look["held"] for look in report["history"]),
        "steps": report["steps"],
    }


def method(record: Mapping[str, Any]) -> str:
    """How a checkpoint was made, in words, from its record: what was done, not what was asked for."""
    options = record["options"]
    if options.get("format") == "twinquant":
        words = [f"{options.get('code')}, rank {options.get('rank')}, inputs in {options.get('act_bits')} bits"]
    else:
        words = [str(options.get("code"))]
    if options.get("target_bytes"):
        words.append(f"bits chosen for {options['target_bytes'] / 1e6:.0f} MB")
    elif options.get("bits"):
        words.append(f"{options['bits']:g} bits")
    if options.get("rounding") == "ldlq":
        tokens = max((int(tensor.get("tokens", 0)) for tensor in record["tensors"]), default=0)
        words.append(f"error feedback from {tokens} tokens in windows of {options.get('calib_window')}")
    else:
        words.append("rounded to nearest")
    words.append("tuned" if record.get("tuning") else "not tuned")
    if record.get("learning"):
        words.append("axes learned")
    return ", ".join(words)
