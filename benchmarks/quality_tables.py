"""The tables of quality, for `tables.py`: what the rows of `quality.py` and `twinquant.py` score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]
Rows = dict[str, list[Row]]
"""What each row scores on every seed of the reference, by the row's name."""
SMALL, LARGE = ("smollm2-135m", "SmolLM2-135M"), ("qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B")

READY, PACKAGES, CONTROLS = range(3)
PARTS = ("fewbit and llama.cpp", "other Python packages", "steps taken away, and other controls")
UNTUNED = ", no tuning"
TWIN_FURTHEST = ("full", "full, not tuned", "full, not learned, not tuned")
TWIN_STEPS = (
    *("naive", "low-rank", "hadamard", "full, not learned, not tuned", "full, not tuned", "full"),
    *("Hadamard + GPTQ", "SVDQuant"),
)
"""The order of TwinQuant's rows with inputs of one width; others follow."""
FORMER = ("8648029a", "9c2d8f75", "9329336f")
"""Commits that rounded branches in the former way (V with error feedback of its own) and have made rows that stand."""
MARK = " †"
FORMER_NOTE = f"{MARK.strip()}: branches rounded in a former way, not measured anew. "

SHORT = {
    "trellis": "fewbit itq3_s 3 bits",
    "trellis 4 bits": "fewbit itq3_s 4 bits",
    "TwinQuant W4A8": "fewbit twinquant W4A8",
    "TwinQuant W4A4": "fewbit twinquant W4A4",
    **{f"llama.cpp {kind} + imatrix": f"llama.cpp {kind}" for kind in ("IQ3_S", "Q3_K_M", "Q4_K_M")},
}
"""The rows of the README's table, and what they are called there."""
SCORES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "KL mean": ("{:.4f}", lambda row: row["kl_mean"]),
    "KL 99 %": ("{:.2f}", lambda row: row["kl_p99"]),
    "top-1": ("{:.1f} %", lambda row: 100 * row["top1_agreement"]),
    "bits/char": ("{:.3f}", lambda row: row["bits_per_char"]),
}
BRIEF = ("KL mean", "top-1")


def measured(benchmark: str, model: str, seed: int | None = None) -> Rows:
    """The rows of a result file on all seeds or on one; none without the file."""
    path = RESULTS / f"{benchmark}-{model}.json"
    found: Rows = {}
    for key, row in (json.loads(path.read_text())["rows"] if path.exists() else {}).items():
        name, _, told = key.partition(" | ")
        if seed is None or told == f"seed {seed}":
            found.setdefault(name, []).append(row)
    return found


def compared(model: str) -> Rows:
    """The rows of `quality.py` and, for inputs of 8 and of 4 bits, TwinQuant's row that has come furthest."""
    found, twins = measured("quality", model), measured("twinquant", model)
    for width in ("W4A8", "W4A4"):
        step = next((step for step in TWIN_FURTHEST if f"{width} {step}" in twins), None)
        if step is not None:
            found[f"TwinQuant {width}{step.removeprefix('full')}"] = twins[f"{width} {step}"]
    return found


def part_of(name: str, rows: Rows) -> int:
    """Which part of a table the row `name` of `rows` stands in, told by its options.

    A row that leaves out a step of fewbit's stands for the whole of them until that is measured. What is not known
    counts as a control.
    """
    options = rows[name][0]["options"]
    if "method" in options:
        return PACKAGES
    if "mix" in options:
        return CONTROLS if options.get("pad") else READY
    if options.get("format") == "twinquant":
        return READY  # of these `compared` takes the furthest alone
    steps = options.get("rotate", True) and options.get("rounding") == "ldlq" and options.get("sequential", True)
    whole = options.get("tune") is not False or name.removesuffix(UNTUNED) not in rows
    return READY if options.get("code") == "trellis" and steps and whole else CONTROLS


def body_bits(rows: list[Row], kind: str = "body") -> float:
    """Bits per weight of the decoder layers' linears, mean over seeds."""
    return mean(row["bits_per_weight"].get(kind, row["bits_per_weight"]["body"]) for row in rows)


def ratio(rows: list[Row]) -> str:
    """The perplexity relative to the reference's, mean over seeds, with the least and the most of several."""
    found = [row["ratio"] for row in rows]
    return f"{mean(found):.3f}" + (f" ({min(found):.3f}-{max(found):.3f})" if len(found) > 1 else "")


def ordered(rows: Rows) -> list[str]:
    """Names of rows, part by part and then by bits."""
    return sorted(rows, key=lambda name: (part_of(name, rows), body_bits(rows[name]), name))


def megabytes(rows: list[Row], weights: float) -> str:
    """What is stored; of peers, which write no file here, their bits times the number of weights."""
    sizes = [row["bytes"] if "bytes" in row else row["bits_per_weight"]["total"] * weights / 8 for row in rows]
    return f"{mean(sizes) / 1e6:.0f}" if all(sizes) else ""


def weights_of(rows: Rows) -> float:
    """The number of a model's weights, as its rows with a size have it; 0 without any."""
    sized = (row for same in rows.values() for row in same if "bytes" in row)
    return next((8 * row["bytes"] / row["bits_per_weight"]["total"] for row in sized), 0.0)


def former(rows: Iterable[Row]) -> bool:
    """Whether some of these are TwinQuant's with a branch that was rounded in the former way."""
    return any(
        row["options"].get("code") == "twin"
        and row["options"].get("rank")
        and str(row.get("commit")).startswith(FORMER)
        for row in rows
    )


def header(title: str, columns: Iterable[str] = SCORES) -> list[str]:
    return [title, "bits/weight, layers", "MB", "perplexity ratio", *columns, "seeds"]


def head(title: str, columns: Iterable[str] = SCORES) -> list[str]:
    """The line over a part of a table."""
    return [f"**{title}**", *[""] * (len(header("", columns)) - 1)]


def lines_of(rows: Rows, shown: Mapping[str, str], columns: Iterable[str] = SCORES) -> list[list[str]]:
    """What rows score, mean over the seeds of the reference; `shown` says which and what they are called."""
    weights, lines = weights_of(rows), []
    for name, label in shown.items():
        found = rows[name]
        bits, plain = body_bits(found), body_bits(found, "body_without_padding")
        told = f"{bits:.3f}" + (f" ({plain:.3f})" if plain < bits else "")
        cells = [SCORES[column][0].format(mean(map(SCORES[column][1], found))) for column in columns]
        label += MARK * former(found)
        lines.append([label, told, megabytes(found, weights), ratio(found), *cells, str(len(found))])
    return lines


def conditions(row: Row) -> str:
    return f"{row['tokens']} tokens of held-out Wikipedia text in windows of {row['window']}"


def quality_note(shown: dict[str, list[Row]]) -> str:
    """What the rows of a table of quality were measured on, by model, and what its signs mean."""
    rows = [row for same in shown.values() for row in same]
    twins = [row for row in rows if row["options"].get("format") == "twinquant"]
    first = next((row for row in rows if row["options"].get("calib_tokens") and row not in twins), rows[0])
    usual = first["options"].get("calib_tokens")
    notes = [
        f"{conditions(first)}, float32, decoded weights, head and embeddings in 16 bits unless the row says otherwise; "
        f"{usual} calibration tokens, half web, half Wikipedia, for llama.cpp's importance matrix too.",
        "MB: all that is stored, embeddings and head apart.",
    ]
    if twins:
        notes.append("TwinQuant's rows are as its kernels compute, inputs quantized too.")
    for title, same in shown.items():
        fewer = {row["options"]["calib_tokens"] for row in same if row in twins} - {usual}
        if fewer:
            notes.append(f"On {title} they took {max(fewer)} calibration tokens.")
    if any(row["options"].get("pad") for row in rows):
        notes.append(
            'In brackets: bits without the zeros that "padded" rows store, which fill rows up to llama.cpp\'s blocks.'
        )
    if former(rows):
        notes.append(FORMER_NOTE.strip())
    full = " and ".join(f"{same[0]['reference_perplexity']:.2f} ({title})" for title, same in shown.items() if same)
    by = "`benchmarks/quality.py` and `benchmarks/twinquant.py`"
    return " ".join([*notes, f"Off-grid references have a perplexity of {full}. Made by {by}."])


def quality(model: str, title: str) -> str:
    """The rows of `quality.py` on one model and TwinQuant's beside them, in parts."""
    rows = compared(model)
    parts: dict[int, dict[str, str]] = {}
    for name in ordered(rows):
        parts.setdefault(part_of(name, rows), {})[name] = name
    lines = [line for part, shown in parts.items() for line in (head(PARTS[part]), *lines_of(rows, shown))]
    note = quality_note({title: [row for name in rows for row in rows[name]]})
    return f"{markdown(header(title), lines)}\n{note}\n"


def brief() -> str:
    """The README's table: what there is to choose from, on both models, without what is there to compare."""
    lines: list[list[str]] = []
    every: dict[str, list[Row]] = {}
    for model, title in (SMALL, LARGE):
        rows, shown = compared(model), {}
        for name in ordered(rows):
            plain, apart, rest = name.partition(", no")
            if plain in SHORT and part_of(name, rows) == READY:
                shown[name] = (SHORT[plain] + apart + rest).replace(UNTUNED, ", not tuned")
        lines += [head(title, BRIEF), *lines_of(rows, shown, BRIEF)]
        every[title] = [row for name in shown for row in rows[name]]
    return f"{markdown(header('', BRIEF), lines)}\n{quality_note(every)}\n"


def genres(model: str, title: str) -> str:
    """The rows of `quality.py` that have a second text, beside what they score on the first."""
    report = json.loads((RESULTS / f"quality-{model}.json").read_text())
    rows = {
        key.partition(" | ")[0]: [row]
        for key, row in report["rows"].items()
        if row.get("texts") and key.endswith("| seed 0")
    }
    if not rows:
        return "Not measured yet: `benchmarks/quality.py`.\n"
    texts = [report["text"], *next(iter(rows.values()))[0]["texts"]]
    lines = []
    for name in ordered(rows):
        (row,) = rows[name]
        both = [row, *row["texts"].values()]
        cells = [f"{found[what]:{form}}" for found in both for what, form in (("ratio", ".3f"), ("kl_mean", ".4f"))]
        lines.append([name, f"{body_bits([row]):.3f}", *cells])
    columns = [f"{text}, {what}" for text in texts for what in ("perplexity ratio", "KL")]
    return markdown([title, "bits/weight, layers", *columns], lines) + "\nOne seed. Made by `benchmarks/quality.py`.\n"


def twinquant(model: str, title: str) -> str:
    """The rows of `twinquant.py` on one model."""
    rows = measured("twinquant", model)
    shown = [row for same in rows.values() for row in same]
    first = shown[0]
    note = (
        f"\n{conditions(first)}, as the kernels compute, float32 between them, head and embeddings in 16 bits; "
        f"{first['options']['calib_tokens']} calibration tokens, half web, half Wikipedia. "
        f"{FORMER_NOTE if former(shown) else ''}The off-grid reference has perplexity "
        f"{first['reference_perplexity']:.2f}. Made by `benchmarks/twinquant.py`.\n"
    )

    def place(name: str) -> tuple[int, int]:
        width, _, step = name.partition(" ")
        return int(width.removeprefix("W4A")), TWIN_STEPS.index(step) if step in TWIN_STEPS else len(TWIN_STEPS)

    lines = lines_of(rows, {name: name for name in sorted(rows, key=place)})
    return markdown(header(title), lines) + note


TABLES: dict[str, Callable[[], str]] = {
    "quality-smollm2": partial(quality, *SMALL),
    "quality-brief": brief,
    "quality-genres": partial(genres, *SMALL),
    "quality-qwen": partial(quality, *LARGE),
    "twinquant-smollm2": partial(twinquant, *SMALL),
    "twinquant-qwen": partial(twinquant, *LARGE),
}
