"""The tables of speed on CPUs, for `tables.py`: kernels, whole models, and beside whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parent / "results"
SHARES = {  # of the machine's limits, and their columns
    "bandwidth_share": "share of memory bandwidth",
    "arithmetic_share": "prompt's share of arithmetic",
}
# The machine's own speeds: their units, the units' names and decimals.
SPEEDS = {"read_bytes_per_second": (1e9, "GB/s", 1), "operations_per_second": (1e12, "TOP/s", 2)}
PLACES = {"memory": 1, "cache": 1, "many": 2}  # where kernels are compared with peers, and the decimals of speeds there


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


def kernel_speed(row: dict[str, Any]) -> tuple[str, str] | None:
    """A kernel's median and its unit; None for settings that the table leaves out."""
    if "microseconds_per_token" in row:
        return f"{row['microseconds_per_token']:.2f}", "us per token"
    if row["bits"] != 3 or ("few" in row["kernel"] and row["tokens"] != 1):
        return None
    if "few" in row["kernel"]:
        return f"{row['billion_weights_per_second']['median']:.1f}", "G weights/s"
    return f"{row['tera_operations_per_second']['median']:.2f}", "TOP/s"


def kernels() -> str:
    """Kernels of inputs, and products of packed 3-bit weights with one token and with many, by instruction set."""
    report = json.loads((RESULTS / "kernels.json").read_text())
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in report["rows"]:
        speed = kernel_speed(row)
        if speed:
            shape = f"{row['rows']} x {row['cols']}" if "rows" in row else f"{row['cols']}, {row['dtype']}"
            size = f", {row['megabytes']:.0f} MB" if "megabytes" in row else ""
            case = (row["kernel"], shape + size, str(row["tokens"]), str(row["threads"]), speed[1])
            found.setdefault(case, {})[row["isa"]] = speed[0]
    isas = list(dict.fromkeys(row["isa"] for row in report["rows"]))
    lines = [[*case, *(by_isa.get(isa, "") for isa in isas)] for case, by_isa in found.items()]
    header = ["kernel", "weights, or inputs", "tokens", "threads", "unit", *isas]
    reading = ", ".join(
        f"{rate['median']:.1f} GB/s with {threads} thread{'s' if threads != '1' else ''}"
        for threads, rate in report["read_gigabytes_per_second"].items()
    )
    note = (
        f"\nMedians; us per token are less the better, the others more. {report['machine']['cpu']}; the same process "
        f"reads memory at {reading}. Made by `benchmarks/kernels.py`.\n"
    )
    return markdown(header, lines) + note


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
                cells.append(f"{ours[place] / theirs[place]:.2f} x" if place in ours and place in theirs else "")
        lines.append([kind, f"{rows[0]['bits_per_weight']:.2f}", isa, str(threads), *cells])
    header = ["type", "bits/weight", "instruction set", "threads", "1 token, memory", "1 token, cache", "512 tokens"]
    header += [f"fewbit {what}" for what in ("3 bits, memory", "3 bits, cache", "3 bits, 512 tokens")]
    header += [f"fewbit {what}" for what in ("4 bits, memory", "4 bits, cache")]
    return markdown(header, lines) + f"\n{peers_note(report)} Made by `benchmarks/kernels.py --peers`.\n"


def peers_note(report: dict[str, Any]) -> str:
    package, version = next(iter(report["peer_versions"].items()))
    return (
        f"{report['machine']['cpu']}; llama.cpp from {package} {version}, without AMX. The first four columns say "
        f"which kernel of llama.cpp's it is. The next three are its own speeds: billions of weights "
        f"per second with one token, weights out of memory and out of 1 MB that stays in cache, and TOP/s with "
        f"512 tokens; each is the fastest of its ways: row by row, as a graph, and as a graph of interleaved rows. "
        f"The last five, with an x, are how many times as fast fewbit's kernels of 3 and of 4 bits are in the same run "
        f"in the same place; below 1 llama.cpp's is faster. One call of theirs from Python takes "
        f"{report['call_microseconds']:.0f} us, which "
        f"counts in the columns of the cache. One thread's speeds are per second of processor time."
    )


def end_to_end() -> str:
    """Whole models: tokens per second of decoding and of a prompt."""
    report = json.loads((RESULTS / "end_to_end.json").read_text())
    shares = {key: name for key, name in SHARES.items() if any(key in row for row in report["rows"])}
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
                *(f"{100 * row[key]['median']:.0f} %" if key in row else "" for key in shares),
                f"{row['start_seconds']:.1f} s" if memory else "",
                f"{row['peak_memory_bytes'] / 1e6:.0f} / {row['file_bytes'] / 1e6:.0f} MB" if memory else "",
            ]
        )
    header = ["model", "program and type", "threads", "decode", f"prompt of {report['prompt_tokens']}"]
    header += [*shares.values(), "one token, from start", "memory / file"]
    (package, version), machine = next(iter(report["versions"].items())), report["environment"]
    packed = any("int" in row["type"] for row in report["rows"] if row["program"] == "torch")
    own = ", torch's int8 and int4 by its own products of packed weights, the head too" if packed else ""
    note = (
        f"\nTokens per second, medians of {report['rounds']} rounds through all contestants; "
        f"{report['generated_tokens']} tokens decoded; {machine['cpu']}, {machine['isa']}; llama.cpp from {package} "
        f"{version}, without AMX. Weights rounded to nearest, fewbit's head and embeddings in 4 bits{own}. The "
        f"share: bytes of weights that a token reads times tokens per second, beside how fast the same run of `fewbit "
        f"bench` reads memory in huge pages{machine_speed(report['rows'], 'read_bytes_per_second')}. "
        f"{arithmetic_note(report['rows'])}Made by `benchmarks/end_to_end.py`.\n"
    )
    return markdown(header, lines) + note


def arithmetic_note(rows: list[dict[str, Any]]) -> str:
    """For a caption: what the share of arithmetic is; nothing where rows do not hold it."""
    rates = machine_speed(rows, "operations_per_second")
    return rates and (
        f"The share of arithmetic: operations that a prompt's products with packed weights take, two for each weight "
        f"and token, per second, beside how many the same run does on registers with the same instructions{rates}. "
    )


def machine_speed(rows: list[dict[str, Any]], key: str) -> str:
    """For a caption: the machine's speed beside which shares stand, by threads; nothing where rows do not hold it."""
    unit, name, digits = SPEEDS[key]
    found: dict[int, list[float]] = {}
    for row in rows:
        if key in row:
            found.setdefault(row["threads"], []).append(row[key]["median"] / unit)
    told = []
    for threads, rates in found.items():
        least, most = f"{min(rates):.{digits}f}", f"{max(rates):.{digits}f}"
        spread = least if least == most else f"{least}-{most}"
        told.append(f"{spread} {name} with {threads} thread{'s' if threads != 1 else ''}")
    return f" ({', '.join(told)})" if told else ""


def sweep() -> str:
    """Prompts by length and decoding by the number of sequences."""
    made = RESULTS / "sweep.json"
    if not made.exists():
        return "Not measured yet: `benchmarks/sweep.py`.\n"
    report = json.loads(made.read_text())
    first, lines = report["rows"][0], []
    for row in report["rows"]:
        rates = {kind: [f"{cell['median']:.0f}" for cell in row[kind].values()] for kind in ("prefill", "decode")}
        by_arithmetic = row["operations_per_second"] / row["operations_per_token"]
        by_memory = row["read_bytes_per_second"] / row["weight_bytes_per_token"]
        limited = [*rates["prefill"], f"{by_arithmetic:.0f}", *rates["decode"], f"{by_memory:.0f}"]
        lines.append([row["model"], str(row["threads"]), *limited])
    header = ["model", "threads", *(f"prompt {length}" for length in first["prefill"])]
    header += ["arithmetic's limit for prompts", *(f"decode, {batch}" for batch in first["decode"])]
    header += ["memory's limit for 1"]
    machine = report["environment"]
    return markdown(header, lines) + (
        f"\nTokens per second, {first['type']}, of all sequences together, medians of {report['rounds']} rounds; "
        f"{report['generated_tokens']} tokens decoded; {machine['cpu']}, {machine['isa']}. Limits: the operations that "
        f"the same threads do on registers, over two for each packed weight of the layers; the bytes that they read "
        f"from memory, over those of the weights. Made by `benchmarks/sweep.py`.\n"
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


TABLES: dict[str, Callable[[], str]] = {
    "end-to-end": end_to_end,
    "sweep": sweep,
    "twin-operator": twin_operator,
    "encoding": encoding,
    "kernels": kernels,
    "peers": peers,
}
