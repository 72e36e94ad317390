"""The tables of quality, for `tables.py`: what the rows of `quality.py` and `twinquant.py` score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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

SHORT = (
    "trellis",
    "trellis, 3.08 bits by sensitivity",
    "trellis 4 bits",
    "llama.cpp IQ3_S + imatrix",
    "llama.cpp Q3_K_M + imatrix",
    "llama.cpp Q4_K_M + imatrix",
)
SHORT_UNTUNED = (*SHORT[:1], "trellis, no tuning", "trellis 4 bits, no tuning", *SHORT[3:])


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


def scores(rows: Rows, parts: dict[str, list[str]], title: str, short: bool = False) -> str:
    """What rows score, mean over the seeds of the reference, by parts of the table; one part needs no head."""
    columns: dict[str, Callable[[Row], float]] = {
        "KL mean": lambda row: row["kl_mean"],
        "KL 99 %": lambda row: row["kl_p99"],
        "top-1": lambda row: 100 * row["top1_agreement"],
        "bits/char": lambda row: row["bits_per_char"],
    }
    form = {"KL mean": "{:.4f}", "KL 99 %": "{:.2f}", "top-1": "{:.1f} %", "bits/char": "{:.3f}"}
    if short:
        columns = {name: columns[name] for name in ("KL mean", "top-1")}
    header = [title, "bits/weight, layers", "MB", "perplexity ratio", *columns, "seeds"]
    weights, lines = weights_of(rows), []
    for head, names in parts.items():
        if len(parts) > 1:
            lines.append([f"**{head}**", *[""] * (len(header) - 1)])
        for name in names:
            found = rows[name]
            bits, plain = body_bits(found), body_bits(found, "body_without_padding")
            told = f"{bits:.3f}" + (f" ({plain:.3f})" if plain < bits else "")
            cells = [form[column].format(mean(map(value, found))) for column, value in columns.items()]
            size = megabytes(found, weights)
            lines.append([name + MARK * former(found), told, size, ratio(found), *cells, str(len(found))])
    return markdown(header, lines)


def conditions(row: Row) -> str:
    return f"{row['tokens']} tokens of held-out Wikipedia text in windows of {row['window']}"


def quality(model: str, title: str, chosen: tuple[str, ...] = ()) -> str:
    """The rows of `quality.py` on one model and TwinQuant's beside them, all in parts or the `chosen` ones."""
    rows = compared(model)
    names = [name for name in ordered(rows) if not chosen or name in chosen]
    shown = [row for name in names for row in rows[name]]
    twins = [row for row in shown if row["options"].get("format") == "twinquant"]
    first = next((row for row in shown if row["options"].get("calib_tokens") and row not in twins), shown[0])
    tokens = {row["options"]["calib_tokens"] for row in twins} - {first["options"]["calib_tokens"]}
    fewer = f", and took {max(tokens)} calibration tokens" if tokens else ""
    padded = any(row["options"].get("pad") for row in shown)
    note = "".join(
        [
            f"\n{conditions(first)}, float32, decoded weights, head and embeddings in 16 bits unless the row says "
            f"otherwise; {first['options']['calib_tokens']} calibration tokens, half web, half Wikipedia, for "
            f"llama.cpp's importance matrix too. MB: all that is stored, embeddings and head apart. ",
            f"TwinQuant's rows are as its kernels compute, inputs quantized too{fewer}. " if twins else "",
            'In brackets: bits without the zeros that "padded" rows store, which fill rows up to llama.cpp\'s blocks. '
            if padded
            else "",
            FORMER_NOTE if former(shown) else "",
            f"The off-grid reference has perplexity {first['reference_perplexity']:.2f}. Made by "
            f"`benchmarks/quality.py`{' and `benchmarks/twinquant.py`' if twins else ''}.\n",
        ]
    )
    parts = {head: [name for name in names if part_of(name, rows) == part] for part, head in enumerate(PARTS)}
    heads = {"": names} if chosen else {head: found for head, found in parts.items() if found}
    return scores(rows, heads, title, bool(chosen)) + note


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
    header = [f"{text}, {what}" for text in texts for what in ("perplexity ratio", "KL")]
    return markdown([title, "bits/weight, layers", *header], lines) + "\nOne seed. Made by `benchmarks/quality.py`.\n"


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

    return scores(rows, {"": sorted(rows, key=place)}, title) + note


TABLES: dict[str, Callable[[], str]] = {
    "quality-smollm2": partial(quality, *SMALL),
    "quality-smollm2-short": partial(quality, *SMALL, SHORT),
    "quality-genres": partial(genres, *SMALL),
    "quality-qwen-short": partial(quality, *LARGE, SHORT_UNTUNED),
    "quality-qwen": partial(quality, *LARGE),
    "twinquant-smollm2": partial(twinquant, *SMALL),
    "twinquant-qwen": partial(twinquant, *LARGE),
}
