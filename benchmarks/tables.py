"""Writes the tables of the documentation from the JSON files in `results/`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing in between is written by hand, and
a test fails where a page and the results disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import reliability_tables
from markdown_table import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACES = {"memory": 1, "cache": 1, "many": 2}  # where kernels are compared with peers, and the decimals of speeds there
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
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
        f"\n3 bits, {report['calib_tokens']} calibration tokens where it calibrates; "
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


def encoding() -> str:
    """Weights per second of the native encoder and decoder, one thread."""
    report = json.loads((RESULTS / "encode.json").read_text())
    rows = []
    for row in report["rows"]:
        if row["threads"] == 1:
            speeds = row["million_weights_per_second"]
            kinds = ("encode", "encode_with_feedback", "dequantize")
            cells = [f"{speeds[kind]['median']:.2f}" if kind in speeds else "" for kind in kinds]
            rows.append([row["isa"], str(row["bits"]), *cells])
    header = ["instruction set", "bits", "encode", "encode with feedback", "decode"]
    return markdown(header, rows) + f"\nMillions of weights per second, one thread, {report['machine']['cpu']}.\n"


def kernels() -> str:
    """Products of packed 3-bit weights with one token and with many, by instruction set and threads."""
    report = json.loads((RESULTS / "kernels.json").read_text())
    rows = []
    for row in report["rows"]:
        if "microseconds_per_token" in row:
            speed = f"{row['microseconds_per_token']:.2f} us per token of {row['cols']}"
        elif row["bits"] != 3 or ("few" in row["kernel"] and row["tokens"] != 1):
            continue
        elif "few" in row["kernel"]:
            speed = f"{row['billion_weights_per_second']['median']:.1f} G weights/s"
        else:
            speed = f"{row['tera_operations_per_second']['median']:.2f} TOP/s"
        size = f"{row['megabytes']:.0f} MB" if "megabytes" in row else row.get("dtype", "")
        rows.append([row["kernel"], size, str(row["tokens"]), row["isa"], str(row["threads"]), speed])
    header = ["kernel", "weights or input", "tokens", "instruction set", "threads", "median"]
    reading = ", ".join(
        f"{rate['median']:.1f} GB/s with {threads} thread{'s' if threads != '1' else ''}"
        for threads, rate in report["read_gigabytes_per_second"].items()
    )
    note = (
        f"\n{report['machine']['cpu']}; the same process reads memory at {reading}. Made by `benchmarks/kernels.py`.\n"
    )
    return markdown(header, rows) + note


def speeds(rows: list[dict[str, Any]], largest: int) -> dict[str, float]:
    """Best medians: of one token with `largest` weights (memory) and with some 1 MB (cache), and of many tokens.

    One thread's are taken per second of processor time, which other work on the machine disturbs least. With more
    threads, 1 MB measures how fast they meet and not how fast they multiply, and is left out.
    """
    found: dict[str, list[float]] = {place: [] for place in PLACES}
    for row in rows:
        median = "median_per_cpu_second" if row["threads"] == 1 else "median"
        if "tera_operations_per_second" in row:
            found["many"].append(row["tera_operations_per_second"][median])
        elif "billion_weights_per_second" in row and row["tokens"] == 1:
            if row["rows"] * row["cols"] == largest:
                found["memory"].append(row["billion_weights_per_second"][median])
            elif row["megabytes"] < 2 and row["threads"] == 1:
                found["cache"].append(row["billion_weights_per_second"][median])
    return {place: max(medians) for place, medians in found.items() if medians}


def peers() -> str:
    """llama.cpp's kernels, the fastest for each of its types, and how many times as fast fewbit's are."""
    report = json.loads((RESULTS / "kernels.json").read_text())
    if not report.get("peers"):
        return "The results in this tree do not hold a measurement of these; `make bench-peers` takes one.\n"
    rows_of: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in report["peers"]:
        rows_of.setdefault((row["isa"], row["threads"], row["type"]), []).append(row)
    largest = max(row["rows"] * row["cols"] for row in report["peers"])
    lines = []
    for (isa, threads, kind), rows in rows_of.items():
        theirs = speeds(rows, largest)
        cells = [f"{theirs[place]:.{digits}f}" if place in theirs else "" for place, digits in PLACES.items()]
        for bits in (3, 4):
            mine = [
                row for row in report["rows"] if (row["isa"], row["threads"], row.get("bits")) == (isa, threads, bits)
            ]
            ours = speeds(mine, largest)
            for place in PLACES if bits == 3 else ("memory", "cache"):
                cells.append(f"{ours[place] / theirs[place]:.2f}" if place in ours and place in theirs else "")
        lines.append([kind, f"{rows[0]['bits_per_weight']:.2f}", isa, str(threads), *cells])
    header = ["type", "bits/weight", "instruction set", "threads", "memory", "cache", "512 tokens"]
    header += ["3 bits, memory", "3 bits, cache", "3 bits, 512 tokens", "4 bits, memory", "4 bits, cache"]
    return markdown(header, lines) + f"\n{peers_note(report)} Made by `benchmarks/kernels.py --peers`.\n"


def peers_note(report: dict[str, Any]) -> str:
    package, version = next(iter(report["peer_versions"].items()))
    return (
        f"{report['machine']['cpu']}; llama.cpp from {package} {version}, without AMX. Its speeds are billions of "
        f"weights per second with one token, out of memory and out of 1 MB, and TOP/s with 512 tokens, each the "
        f"fastest of its ways: row by row, as a graph, and as a graph of interleaved rows. Then how many times as fast "
        f"fewbit's kernels are in the same run; one call of theirs from Python takes "
        f"{report['call_microseconds']:.0f} us, which counts in the columns of the cache. One thread's speeds are per "
        f"second of processor time."
    )


def end_to_end() -> str:
    """Whole models: tokens per second of decoding and of a prompt."""
    report = json.loads((RESULTS / "end_to_end.json").read_text())
    lines = []
    for row in report["rows"]:
        memory = "start_seconds" in row
        lines.append(
            [
                row["model"],
                f"{row['program']} {row['type']}",
                str(row["threads"]),
                f"{row['decode']['median']:.1f}",
                f"{row['prefill']['median']:.0f}",
                f"{100 * row['bandwidth_share']['median']:.0f} %" if "bandwidth_share" in row else "",
                f"{row['start_seconds']:.1f} s" if memory else "",
                f"{row['peak_memory_bytes'] / 1e6:.0f} / {row['file_bytes'] / 1e6:.0f} MB" if memory else "",
            ]
        )
    header = ["model", "program and type", "threads", "decode", f"prompt of {report['prompt_tokens']}"]
    header += ["share of memory bandwidth", "one token, from start", "memory / file"]
    reading = ", ".join(
        f"{rate / 1e9:.1f} GB/s with {threads} thread{'s' if threads != '1' else ''}"
        for threads, rate in report["read_bytes_per_second"].items()
    )
    (package, version), machine = next(iter(report["versions"].items())), report["environment"]
    note = (
        f"\nTokens per second, medians of {report['rounds']} rounds through all contestants; "
        f"{report['generated_tokens']} tokens decoded; {machine['cpu']}, {machine['isa']}, memory read at {reading}; "
        f"llama.cpp from {package} {version}, without AMX. Weights rounded to nearest, fewbit's head and embeddings in "
        f"4 bits. Made by `benchmarks/end_to_end.py`.\n"
    )
    return markdown(header, lines) + note


def sweep() -> str:
    """Prompts by length and decoding by the number of sequences."""
    made = RESULTS / "sweep.json"
    if not made.exists():
        return "Not measured yet: `benchmarks/sweep.py`.\n"
    report = json.loads(made.read_text())
    first, lines = report["rows"][0], []
    for row in report["rows"]:
        most = row["read_bytes_per_second"] / row["weight_bytes_per_token"]
        rates = [f"{cell['median']:.0f}" for kind in ("prefill", "decode") for cell in row[kind].values()]
        lines.append([row["model"], str(row["threads"]), *rates, f"{most:.0f}"])
    header = ["model", "threads", *(f"prompt {length}" for length in first["prefill"])]
    header += [*(f"decode, {batch}" for batch in first["decode"]), "memory's limit for 1"]
    machine = report["environment"]
    return markdown(header, lines) + (
        f"\nTokens per second, {first['type']}, of all sequences together, medians of {report['rounds']} rounds; "
        f"{report['generated_tokens']} tokens decoded; {machine['cpu']}, {machine['isa']}. Made by "
        f"`benchmarks/sweep.py`.\n"
    )


def twin_operator() -> str:
    """The fused operator of TwinQuant beside its products run apart."""
    report = json.loads((RESULTS / "twin_operator.json").read_text())
    lines = []
    for row in report["rows"]:
        fused, apart = row["fused_microseconds"], row["apart_microseconds"]
        shape = f"{row['rows']} x {row['cols']}"
        numbers = [
            str(row["tokens"]),
            str(row["threads"]),
            f"{fused:.0f} us",
            f"{apart:.0f} us",
            f"{apart / fused:.2f}",
        ]
        lines.append([shape, *numbers])
    machine = report["environment"]
    note = (
        f"\nRank {report['rank']}, inputs of 8 bits, {machine['cpu']}, {machine['isa']}; medians. "
        f"Made by `benchmarks/twin_operator.py`.\n"
    )
    return markdown(["weights", "tokens", "threads", "fused", "three products", "ratio"], lines) + note


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
    "quality-smollm2": partial(quality, "smollm2-135m", "SmolLM2-135M"),
    "quality-smollm2-short": partial(quality, "smollm2-135m", "SmolLM2-135M", SHORT),
    "quality-genres": partial(genres, "smollm2-135m", "SmolLM2-135M"),
    "quality-qwen-short": partial(quality, "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B", SHORT_UNTUNED),
    "quality-qwen": partial(quality, "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B"),
    "twinquant-smollm2": partial(twinquant, "smollm2-135m", "SmolLM2-135M"),
    "twinquant-qwen": partial(twinquant, "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B"),
    "twinquant-ranks": partial(ranks, "smollm2-135m", "SmolLM2-135M"),
    "blocks": blocks,
    "context": context,
    "cost": cost,
    "end-to-end": end_to_end,
    "sweep": sweep,
    "twin-operator": twin_operator,
    "encoding": encoding,
    "kernels": kernels,
    "peers": peers,
    "gpu-static": gpu_static,
    "gpu-model": gpu_model,
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
