"""Writes the tables of the documentation from the JSON files in `results/`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing in between is written by hand, and
a test fails where a page and the results disagree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paper_tables
import quality_tables
import reliability_tables
import speed_tables
from markdown_table import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NO_MACHINE = ("gpu-model", "gpu-static", "robustness-supply")  # results that no processor's speed or sums are in
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machines_of(report: dict[str, Any]) -> Iterator[str]:
    """The machine of a result, or of each of its rows where they have their own."""
    found = report.get("environment") or report.get("machine") or report
    if "cpu" in found:
        facts = (found["cpu"], found.get("isa"), f"{found['cores']} cores" if "cores" in found else None)
        yield ", ".join(fact for fact in facts if fact)
    else:
        rows = report.get("rows")
        for row in rows.values() if isinstance(rows, dict) else []:
            yield from machines_of(row)


def machines() -> str:
    """Which machine made what."""
    made: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        counts = Counter(machines_of(json.loads(path.read_text())))
        if not counts:
            counts["none: computed or compiled" if path.stem in NO_MACHINE else "not recorded"] = 1
        for machine, rows in counts.items():
            part = f" ({rows} of {counts.total()} rows)" if len(counts) > 1 else ""
            made.setdefault(machine, []).append(f"`{path.stem}`{part}")
    return markdown(["machine", "results"], [[name, ", ".join(made[name])] for name in sorted(made)], 2)


def cost() -> str:
    """Time and memory of compressing by model size, measured and predicted."""
    made = RESULTS / "cost.json"
    if not made.exists():
        return "Not measured yet: `benchmarks/cost.py`.\n"
    report, lines, machines = json.loads(made.read_text()), [], []
    shape, big = report["rows"]["8B shape | nearest"], RESULTS / "big.json"
    whole = json.loads(big.read_text()) if big.exists() else {}
    if whole.get("weights") == shape["weights"] and whole["options"] == ["--rounding", "nearest"]:
        shape |= {key: whole[key] for key in ("seconds", "peak_memory_bytes", "environment")}
    for key, row in sorted(report["rows"].items(), key=lambda item: (item[0].partition(" | ")[2], item[1]["weights"])):
        model, _, settings = key.partition(" | ")
        foreseen = row["predicted"]
        both = [duration(foreseen["seconds"]), f"{foreseen['peak_memory_bytes'] / 1e9:.1f} GB"]
        took = ["", ""]
        if "seconds" in row:
            took = [duration(row["seconds"]), f"{row['peak_memory_bytes'] / 1e9:.1f} GB"]
        lines.append([settings, model, f"{row['weights'] / 1e9:.2f}", *took, *both])
        machine = row["environment"]
        machines.append(f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores")
    header = ["settings", "model", "billion weights", "time", "peak memory", "predicted time", "predicted memory"]
    note = (
        f"\n3 bits (twinquant 4), {report['calib_tokens']} calibration tokens where it calibrates; "
        f"{'; '.join(dict.fromkeys(machines))}. Made by `benchmarks/cost.py`, the 8B shape's measured figures by "
        f"`benchmarks/big.py` with random weights.\n"
    )
    return markdown(header, lines) + note


def duration(seconds: float) -> str:
    """For tables: seconds, minutes or hours with two or three digits."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def context() -> str:
    """Perplexity by position in a long window and speed behind it, by kind of cache."""
    report = json.loads((RESULTS / "context.json").read_text())
    lines = []
    header = ["weights", "cache", *next(iter(report["rows"].values()))["perplexity"]["bf16"]]
    for weights, row in report["rows"].items():
        for kv, found in row["perplexity"].items():
            lines.append([weights, kv, *(f"{value:.2f}" for value in found.values())])
    size = header[-2].partition("-")[2]
    note = (
        f"\n{report['model']}, {report['windows']} windows of {size} tokens of {report['text']}, by position in the "
        f"window. Made by `benchmarks/context.py`.\n"
    )
    table = markdown(header, lines) + note
    if all("decode" in row for row in report["rows"].values()):
        depths = list(next(iter(next(iter(report["rows"].values()))["decode"].values())))
        rates = [
            [weights, kv, *(f"{cell['median']:.1f}" for cell in found.values())]
            for weights, row in report["rows"].items()
            for kv, found in row["decode"].items()
        ]
        machine = report["speed_environment"]
        table += "\n" + markdown(["weights", "cache", *(f"behind {depth}" for depth in depths)], rates)
        table += (
            f"\nTokens per second, medians of {report['rounds']} rounds through all caches, {report['threads']} "
            f"threads, {machine['cpu']}, {machine['isa']}.\n"
        )
    return table


def gpu_static() -> str:
    """The compiled GPU kernels: the most of the architectures, as they differ little, and the products of each."""
    report = json.loads((RESULTS / "gpu-static.json").read_text())
    lines = []
    for name, found in sorted(report["kernels"].items()):
        rows = list(found.values())
        loops = [row["loop_instructions_per_weight"] for row in rows if "loop_instructions_per_weight" in row]
        kinds = sorted({operation.split(".")[0] for row in rows for operation in row["tensor_core"]})
        lines.append(
            [
                name,
                spread([row["registers"] for row in rows]),
                str(max(row["spill_instructions"] for row in rows)),
                spread([round(row["shared_bytes"] / 1024, 1) for row in rows]),
                spread(loops) if loops else "",
                f"{rows[0]['bytes_per_weight']:.3f}" if "bytes_per_weight" in rows[0] else "",
                ", ".join(kinds),
            ]
        )
    header = ["kernel", "registers", "spills", "shared KiB", "instructions/weight", "bytes/weight", "tensor cores"]
    names = ", ".join(f"sm_{arch}" for arch in sorted(next(iter(report["kernels"].values())), key=int))
    shape = report["shape"]
    return markdown(header, lines) + (
        f"\nLeast and most over {names}; {shape['rows']} outputs, {shape['cols']} inputs, rank {shape['rank']}, gemv "
        f"one token, gemm 128, prompt 512; thread instructions of the innermost loop per decoded weight; bytes: codes, "
        f"scales. Triton {report['triton']}. Made by `benchmarks/gpu_static.py`; each architecture's own figures are "
        f"in `benchmarks/results/gpu-static.json`.\n"
    )


def spread(values: list[float]) -> str:
    return f"{min(values):g}" if min(values) == max(values) else f"{min(values):g}-{max(values):g}"


def gpu_model() -> str:
    """The roofline of `gpu_model.py`."""
    report = json.loads((RESULTS / "gpu-model.json").read_text())
    lines = [
        [row["card"], row["method"], *(f"{cell['milliseconds']:.2f} {cell['limit'][0]}" for cell in row["predicted"])]
        for row in report["rows"]
    ]
    return markdown(["card", "weights", *map(str, report["tokens"])], lines) + (
        "\nPredicted, not measured: milliseconds for all linears of LLaMA-3-8B, one step of so many tokens, and what "
        "binds: m memory, p products, i instructions. Made by `benchmarks/gpu_model.py`.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "machines": machines,
    "context": context,
    "cost": cost,
    "gpu-static": gpu_static,
    "gpu-model": gpu_model,
    **quality_tables.TABLES,
    **paper_tables.TABLES,
    **speed_tables.TABLES,
    **reliability_tables.TABLES,
}


def filled(text: str) -> str:
    """The page with every marked table written anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
