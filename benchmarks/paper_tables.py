"""The tables of docs/papers.md, for `tables.py`: what two papers report, and the same steps measured here.

Figures of the papers are constants below, quoted from summaries of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from markdown_table import markdown
from quality_tables import (
    FORMER_NOTE,
    LARGE,
    MARK,
    SMALL,
    TWIN_FURTHEST,
    UNTUNED,
    Rows,
    body_bits,
    former,
    measured,
    ratio,
)

RESULTS = Path(__file__).resolve().parent / "results"
CODES = {"ternary": "ternary", "8 levels": "8 levels", "iq3_s code": "IQ3_S's", "trellis": "trellis"}
STEPS = ("naive", "low-rank", "hadamard", *reversed(TWIN_FURTHEST))
RIVALS = ("Hadamard + GPTQ", "full, no branch, not learned, not tuned", "full, no branch", "SVDQuant")
RANKS = (0, 32, 64, 128, 256)
WIDTHS = ("W4A4", "W4A8", "W4A16")

# Perplexity of LLaMA-3-8B on WikiText-2, in full and compressed.
ITQ3_S = {"": 6.14, "IQ3_S": 7.03, "ITQ3_S": 6.52, "Q4_K_M": 6.35}
TWINQUANT = {"": 8.6, "naive": 91.6, "low-rank": 19.6, "hadamard": 12.4, "full": 9.4}


def perplexity(rows: Rows, name: str) -> str:
    """A row's perplexity ratio with the mark of the former rounding; nothing where it is not measured."""
    return f"{ratio(rows[name])}{MARK * former(rows[name])}" if name in rows else ""


def noted(table: str, note: str) -> str:
    """A table and its caption, which says what the mark is where there is one."""
    return f"{table}\n{note}{FORMER_NOTE if MARK in table else ''}Made by `benchmarks/twinquant.py`.\n"


def divergence(rows: Rows, name: str) -> str:
    return f"{mean(row['kl_mean'] for row in rows[name]):.4f}" if name in rows else ""


def codes(model: str, title: str) -> str:
    """The codes in each other's place, everything else the same, before tuning and after it."""
    rows = measured("quality", model, seed=0)
    lines = []
    for name, code in CODES.items():
        kinds = [kind for kind in (f"{name}{UNTUNED}", name) if kind in rows]
        if kinds:
            cells = [cell(rows, kind) for kind in (f"{name}{UNTUNED}", name) for cell in (perplexity, divergence)]
            lines.append([code, f"{body_bits(rows[kinds[0]]):.3f}", *cells])
    header = [f"{title}, code", "bits/weight, layers", "perplexity ratio, not tuned", "KL mean, not tuned"]
    note = "\nRotated and with error feedback, one seed. Made by `benchmarks/quality.py`.\n"
    return markdown([*header, "perplexity ratio, tuned", "KL mean, tuned"], lines) + note


def rotation(model: str, title: str) -> str:
    """The trellis with and without its rotation, with and without error feedback."""
    rows = measured("quality", model, seed=0)
    lines = []
    for kind, name in (("error feedback", f"trellis{UNTUNED}"), ("rounded to nearest", "trellis, nearest")):
        both = (name, f"{name}, not rotated")
        lines.append([kind, *(cell(rows, row) for row in both for cell in (perplexity, divergence))])
    header = [f"perplexity ratio, {title}", "rotated", "KL mean", "not rotated", "KL mean"]
    return markdown(header, lines) + "\nThe trellis at 3 bits, not tuned, one seed. Made by `benchmarks/quality.py`.\n"


def between() -> str:
    """3 bits in a rotated domain between llama.cpp's IQ3_S and Q4_K_M, in the paper and here."""
    kinds = [name for name in ITQ3_S if name]
    quoted = [f"{ITQ3_S[kind] / ITQ3_S['']:.3f}" for kind in kinds]
    lines = [["LLaMA-3-8B, as the paper has it", *quoted]]
    for model, title in (SMALL, LARGE):
        rows = measured("quality", model)
        ours = {kind: "trellis" if kind == "ITQ3_S" else f"llama.cpp {kind} + imatrix" for kind in kinds}
        bits = [f", {body_bits(rows[name]):.2f} bits" if name in rows else "" for name in ours.values()]
        cells = [f"{perplexity(rows, name)}{told}" for name, told in zip(ours.values(), bits, strict=True)]
        lines.append([title, *cells])
    header = ["perplexity ratio", *("ITQ3_S, here the trellis" if kind == "ITQ3_S" else kind for kind in kinds)]
    return markdown(header, lines) + (
        "\nBits per weight of the layers. Ranges over two seeds of the reference. Made by `benchmarks/quality.py`.\n"
    )


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


def steps() -> str:
    """TwinQuant's steps, each on the one before, in the paper and here."""
    ours = {title: measured("twinquant", model) for model, title in (SMALL, LARGE)}
    columns = [
        (title, width)
        for title, rows in ours.items()
        for width in WIDTHS
        if any(f"{width} {step}" in rows for step in STEPS)
    ]
    lines = []
    for step in STEPS:
        quoted = f"{TWINQUANT[step] / TWINQUANT['']:.3f}" if step in TWINQUANT else ""
        lines.append([step, quoted, *(perplexity(ours[title], f"{width} {step}") for title, width in columns)])
    header = ["perplexity ratio", "LLaMA-3-8B, W4A4, as the paper has it", *map(", ".join, columns)]
    return noted(markdown(header, lines), "One seed, or mean and range over two. ")


def rivals(model: str, title: str) -> str:
    """TwinQuant beside rotation with GPTQ and beside a branch of 16 bits."""
    rows, lines = measured("twinquant", model), []
    for name in (*RIVALS, *reversed(TWIN_FURTHEST)):
        found = [f"{width} {name}" for width in WIDTHS if f"{width} {name}" in rows]
        if found:
            cells = [cell(rows, f"{width} {name}") for width in WIDTHS for cell in (perplexity, divergence)]
            lines.append([name, f"{body_bits(rows[found[0]]):.3f}", *cells])
    header = [title, "bits/weight, layers", *(f"{width}, {what}" for width in WIDTHS for what in ("ratio", "KL"))]
    return noted(markdown(header, lines), "Perplexity ratio and mean divergence, one seed or mean and range over two. ")


def ranks(model: str, title: str) -> str:
    """The rows of `twinquant.py` that differ in the branch's rank alone."""
    rows, lines = measured("twinquant", model), []
    for width in WIDTHS:
        for rank in RANKS:
            part = {0: "no branch, ", 128: ""}.get(rank, f"rank {rank}, ")
            name = f"{width} full, {part}not learned, not tuned"
            if name in rows:
                body = f"{body_bits(rows[name]):.3f}"
                lines.append([width, str(rank), body, perplexity(rows, name), divergence(rows, name)])
    if len({rank for _, rank, *_ in lines}) < 2:
        return "Not measured yet: `benchmarks/twinquant.py`.\n"
    header = [title, "--rank", "bits/weight, layers", "perplexity ratio", "KL mean"]
    return noted(markdown(header, lines), "One seed, or mean and range over two; neither learned nor tuned. ")


LEARNING = ("running the full model", "finding the branches", "learning the axes")
"""What a run does because it learns."""


def learning() -> str:
    """How long learning takes, in rows that noted it."""
    lines, machines = [], []
    for model, title in (SMALL, LARGE):
        for name, rows in measured("twinquant", model).items():
            for row in rows:
                stages = row.get("stage_seconds") or {}
                # Older rows call it resumed_tensors.
                resumed = row.get("resumed") or row.get("resumed_tensors")
                if LEARNING[-1] in stages and not resumed:
                    took = [sum(stages[stage] for stage in LEARNING if stage in stages), row["quantize_seconds"]]
                    minutes = [f"{seconds / 60:.1f} min" for seconds in took]
                    # Noted by whoever ran a row on a machine that did more than that.
                    beside = " (beside other work)" if row.get("other_work") else ""
                    lines.append([f"{title}, {name}{beside}", str(row["learning"]["steps"]), *minutes])
                    machine = row["environment"]
                    machines.append(f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores")
    if not lines:
        return "Not measured yet: `benchmarks/twinquant.py`.\n"
    note = (
        f"Learning counts the full model's pass and the start of the branches. {'; '.join(dict.fromkeys(machines))}. "
    )
    return noted(markdown(["model and row", "steps", "learning", "the whole run"], lines), note)


TABLES: dict[str, Callable[[], str]] = {
    "papers-codes": partial(codes, *SMALL),
    "papers-rotation": partial(rotation, *SMALL),
    "papers-between": between,
    "blocks": blocks,
    "papers-steps": steps,
    "papers-rivals": partial(rivals, *SMALL),
    "twinquant-ranks": partial(ranks, *SMALL),
    "papers-learning": learning,
}
