"""The tables of quality, for `tables.py`: what the rows of `quality.py` and `twinquant.py` score."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parent / "results"
SHORT = (
    "trellis",
    "trellis, 3.08 bits by sensitivity",
    "trellis 4 bits",
    "llama.cpp IQ3_S + imatrix",
    "llama.cpp Q3_K_M + imatrix",
    "llama.cpp Q4_K_M + imatrix",
)
SHORT_UNTUNED = (*SHORT[:1], "trellis, no tuning", "trellis 4 bits, no tuning", *SHORT[3:])
TWIN_STEPS = (
    *("naive", "low-rank", "hadamard", "full, not learned, not tuned", "full, not tuned", "full"),
    *("Hadamard + GPTQ", "SVDQuant"),
)
"""The order of TwinQuant's rows with inputs of one width; others follow."""


def scores(measured: dict[str, Any], title: str, chosen: tuple[str, ...] = ()) -> str:
    """What rows (all, or the `chosen` ones with fewer columns) score, mean over the seeds of the reference."""
    columns = {"KL mean": lambda row: row["kl_mean"], "KL 99 %": lambda row: row["kl_p99"]}
    columns |= {"top-1": lambda row: 100 * row["top1_agreement"], "bits/char": lambda row: row["bits_per_char"]}
    if chosen:
        columns = {title: columns[title] for title in ("KL mean", "top-1")}
    form = {"KL mean": "{:.4f}", "KL 99 %": "{:.2f}", "top-1": "{:.1f} %", "bits/char": "{:.3f}"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, row in measured.items():
        groups.setdefault(key.partition(" | ")[0], []).append(row)
    lines = []
    for name in chosen or groups:
        found = groups.get(name, [])
        if found:
            ratios = [row["ratio"] for row in found]
            range_of = f" ({min(ratios):.3f}-{max(ratios):.3f})" if len(found) > 1 else ""
            bits = mean(row["bits_per_weight"]["body"] for row in found)
            cells = [form[column].format(mean(map(value, found))) for column, value in columns.items()]
            lines.append([name, f"{bits:.3f}", f"{mean(ratios):.3f}{range_of}", *cells, str(len(found))])
    return markdown([title, "bits/weight, layers", "perplexity ratio", *columns, "seeds"], lines)


def quality(model: str, title: str, chosen: tuple[str, ...] = ()) -> str:
    """The rows of `quality.py` on one model."""
    measured = json.loads((RESULTS / f"quality-{model}.json").read_text())["rows"]
    first = next(iter(measured.values()))
    note = (
        f"\n{first['tokens']} tokens of held-out Wikipedia text in windows of {first['window']}, float32, decoded "
        f"weights, head and embeddings in 16 bits unless the row says otherwise; {first['options']['calib_tokens']} "
        f"calibration tokens, half web, half Wikipedia, for llama.cpp's importance matrix too; the off-grid reference "
        f"has perplexity {first['reference_perplexity']:.2f}. Made by `benchmarks/quality.py`.\n"
    )
    return scores(measured, title, chosen) + note


def genres(model: str, title: str) -> str:
    """The rows of `quality.py` that have a second text, beside what they score on the first."""
    report = json.loads((RESULTS / f"quality-{model}.json").read_text())
    rows = {key: row for key, row in report["rows"].items() if row.get("texts") and key.endswith("| seed 0")}
    if not rows:
        return "Not measured yet: `benchmarks/quality.py`.\n"
    names = [report["text"], *next(iter(rows.values()))["texts"]]
    lines = []
    for key, row in rows.items():
        both = [row, *row["texts"].values()]
        cells = [f"{found[what]:{form}}" for found in both for what, form in (("ratio", ".3f"), ("kl_mean", ".4f"))]
        lines.append([key.partition(" | ")[0], f"{row['bits_per_weight']['body']:.3f}", *cells])
    header = [
        title,
        "bits/weight, layers",
        *(f"{name}, {what}" for name in names for what in ("perplexity ratio", "KL")),
    ]
    return markdown(header, lines) + "\nOne seed. Made by `benchmarks/quality.py`.\n"


def ranks(model: str, title: str) -> str:
    """The rows of `twinquant.py` that differ in the branch's rank alone."""
    rows = json.loads((RESULTS / f"twinquant-{model}.json").read_text())["rows"]
    lines = []
    for bits in (4, 8, 16):
        for rank in (0, 32, 64, 128, 256):
            part = {0: "no branch, ", 128: ""}.get(rank, f"rank {rank}, ")
            row = rows.get(f"W4A{bits} full, {part}not learned, not tuned | seed 0")
            if row:
                body = f"{row['bits_per_weight']['body']:.3f}"
                lines.append([f"W4A{bits}", str(rank), body, f"{row['ratio']:.3f}", f"{row['kl_mean']:.4f}"])
    if len({rank for _, rank, *_ in lines}) < 2:
        return "Not measured yet: `benchmarks/twinquant.py`.\n"
    header = [title, "rank", "bits/weight, layers", "perplexity ratio", "KL mean"]
    return markdown(header, lines) + "\nOne seed, neither learned nor tuned. Made by `benchmarks/twinquant.py`.\n"


def twinquant(model: str, title: str) -> str:
    """The rows of `twinquant.py` on one model."""
    measured = json.loads((RESULTS / f"twinquant-{model}.json").read_text())["rows"]
    first = next(iter(measured.values()))
    note = (
        f"\n{first['tokens']} tokens of held-out Wikipedia text in windows of {first['window']}, as the kernels "
        f"compute, float32 between them, head and embeddings in 16 bits; {first['options']['calib_tokens']} "
        f"calibration tokens, half web, half Wikipedia; the off-grid reference has perplexity "
        f"{first['reference_perplexity']:.2f}. Made by `benchmarks/twinquant.py`.\n"
    )

    def place(key: str) -> tuple[int, int]:
        width, _, step = key.partition(" | ")[0].partition(" ")
        return int(width.removeprefix("W4A")), TWIN_STEPS.index(step) if step in TWIN_STEPS else len(TWIN_STEPS)

    return scores({key: measured[key] for key in sorted(measured, key=place)}, title) + note


def blocks() -> str:
    """What rotating larger blocks changes, by code."""
    made = RESULTS / "blocks.json"
    if not made.exists():
        return "Not measured yet: `benchmarks/blocks.py`.\n"
    report, lines = json.loads(made.read_text()), []
    for row in report["rows"]:
        whole = [f"{row['ratio']:.3f}", f"{row['kl_mean']:.4f}"] if "ratio" in row else ["", ""]
        block = str(row["block"]) if row["block"] > 1 else "not rotated"
        lines.append([row["model"], row["code"], block, f"{100 * row['output_error']:.3f} %", *whole])
    note = (
        f"\n3 bits, error feedback by the full model's Hessians ({report['calib_tokens']} tokens), not tuned; "
        f"a block that does not divide a linear's inputs is halved until it does. Error: of the linears' outputs, mean "
        f"over them. Made by `benchmarks/blocks.py`.\n"
    )
    return markdown(["model", "code", "block", "error", "perplexity ratio", "KL mean"], lines) + note


TABLES: dict[str, Callable[[], str]] = {
    "quality-smollm2": partial(quality, "smollm2-135m", "SmolLM2-135M"),
    "quality-smollm2-short": partial(quality, "smollm2-135m", "SmolLM2-135M", SHORT),
    "quality-genres": partial(genres, "smollm2-135m", "SmolLM2-135M"),
    "quality-qwen-short": partial(quality, "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B", SHORT_UNTUNED),
    "quality-qwen": partial(quality, "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B"),
    "twinquant-smollm2": partial(twinquant, "smollm2-135m", "SmolLM2-135M"),
    "twinquant-qwen": partial(twinquant, "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B"),
    "twinquant-ranks": partial(ranks, "smollm2-135m", "SmolLM2-135M"),
    "blocks": blocks,
}
