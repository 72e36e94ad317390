"""The tables of docs/reliability.md, for `tables.py`: fault, tried, survived, lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from markdown_table import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEADER = ["fault", "tried", "survived", "lost"]
# Kinds of clients in `storm.py`, what is asked of the server in words, and the answers that survive it.
PROPER = ("whole", "stream", "slow reader")
REFUSED = {
    "half a head": ("half a head, then silence", "cut off"),
    "half a body": ("half a body, then silence", "408"),
    "huge prompt": ("a prompt of 1.9 MB", "400"),
    "10 MB of JSON": ("10 MB of JSON", "413"),
    "invalid UTF-8": ("invalid UTF-8", "400"),
    "nested JSON": ("JSON nested 50 000 deep", "400"),
    "wrong key": ("a wrong key", "401"),
    "not HTTP": ("bytes that are not HTTP", "400"),
}


def robustness_interrupted() -> str:
    """Kills at random moments, and other faults that runs met."""
    made = RESULTS / "robustness-interrupted.json"
    if not made.exists():
        return "Not measured yet: `benchmarks/robustness_interrupted.py`.\n"
    report = json.loads(made.read_text())
    lines: list[list[str]] = []
    moments: Counter[str] = Counter()
    for kind, found in report["kills"].items():
        lost = found["different"] + found["failed"]
        lines.append([f"SIGKILL, {kind}", str(found["killed"]), str(found["killed"] - lost), str(lost)])
        moments.update(found["killed_while"])
    for fault, found in report["faults"].items():
        lines.append([fault, str(found["tried"]), str(found["tried"] - found["lost"]), str(found["lost"])])
    told = ", ".join(f"{count} while {stage}" for stage, count in moments.most_common())
    note = (
        f"\nKills: {told}; at most two in one run. {report['environment']['cpu']}. Made by "
        f"`benchmarks/robustness_interrupted.py`.\n"
    )
    return markdown(HEADER, lines) + note


def storm_rows(report: dict[str, Any]) -> list[list[str]]:
    """Fault, tried, survived and lost of one storm."""
    sent, answers = report["sent"], report["answers"]
    asked = sum(sent.get(kind, 0) for kind in PROPER)
    turned = sum(count for answer, count in answers.items() if answer.endswith(" 429"))
    lines = [
        ["answers equal to a single client's", asked, report["compared_equal"], report["lost"] + report["mixed"]],
        ["of these streams read slowly", sent.get("slow reader", 0), answers.get("slow reader 200", 0), ""],
        ["a full queue: 429 and Retry-After", turned, turned, ""],
    ]
    for kind in ("gone in mid-stream", "gone at once"):
        left = int(report["left"]["running"] + report["left"]["waiting"])
        lines.append([f"clients {kind}", sent.get(kind, 0), sent.get(kind, 0) - left, left])
    for kind, (words, status) in REFUSED.items():
        tried = sent.get(kind, 0)
        wanted = "None" if status == "cut off" else status
        met = answers.get(f"{kind} {wanted}", 0) + answers.get(f"{kind} 429", 0)
        lines.append([f"{words}: {status}", tried, met, tried - met])
    end = report["shutdown"]
    running, lost = end["unfinished_at_the_signal"], end["open"] - end["complete"]
    lines.append(["answers running at SIGTERM", running, running - lost, lost])
    return [[str(cell) for cell in line] for line in lines]


def storm_note(name: str, report: dict[str, Any]) -> str:
    memory = report["memory"]
    megabytes = {key: f"{memory[f'{key}_bytes'] / 1e6:.0f}" for key in ("start", "after_warm_up", "end", "most")}
    return (
        f"\n{name}: {report['clients']} clients, a burst every {report['every']:g} s for {report['seconds']:.0f} s, "
        f"{report['slots']} slots and a queue of {report['queue']}. Answers with a status of 500 or more: "
        f"{report['server_errors']}; mixed up: {report['mixed']}. Resident memory {megabytes['start']} MB at the "
        f"start, {megabytes['after_warm_up']} after the warm-up, {megabytes['end']} at the end "
        f"({100 * memory['drift']:+.1f} %), {megabytes['most']} at most. It ended {report['shutdown']['seconds']:g} s "
        f"after the signal with exit code {report['shutdown']['exit_code']}. Made by "
        f"`benchmarks/robustness_server.py`.\n"
    )


def robustness_server(name: str, title: str) -> str:
    """One storm of `robustness_server.py`: fault, tried, survived, lost."""
    made = RESULTS / "robustness-server.json"
    found = json.loads(made.read_text()) if made.exists() else {}
    if name not in found:
        return "The results in this tree do not hold this storm; `make test-storm` takes it.\n"
    return markdown(HEADER, storm_rows(found[name])) + storm_note(title, found[name])


def robustness_supply() -> str:
    """What the locks hold, and what the last `make wheel` found."""
    lines = []
    for name in ("requirements.lock", "requirements-cuda.lock"):
        blocks = re.split(r"\n(?=[a-z])", (ROOT / name).read_text(encoding="utf-8"))[1:]
        hashed = sum("--hash=sha256:" in block for block in blocks)
        lines.append([f"a locked package without hashes, `{name}`", len(blocks), hashed, len(blocks) - hashed])
    made = RESULTS / "robustness-supply.json"
    if made.exists():
        report = json.loads(made.read_text())
        same = report["first_sha256"] == report["second_sha256"]
        lines.append(["the same tree built in another directory", 2, 2 if same else 1, 0 if same else 1])
        lines.append(["the wheel in an empty environment: commands", *report["smoke_commands"]])
        note = (
            f"\nThe locked packages carry {report['hashes']} hashes of files for all platforms. Both wheels are "
            f"{report['wheel_bytes']} bytes, their list of parts (CycloneDX {report['sbom_version']}) has "
            f"{report['sbom_components']} entries. Made by `scripts/build_wheel.sh`.\n"
        )
    else:
        note = "\nThe results in this tree do not hold a built wheel; `make wheel` makes one, twice.\n"
    table = [[str(cell) for cell in line] for line in lines]
    return markdown(HEADER, table) + note


def robustness(part: str) -> str:
    """What was tried in a part of `robustness.py`, and what survived."""
    path = RESULTS / f"robustness-{part}.json"
    if not path.exists():
        return f"Not measured yet: `benchmarks/robustness.py {part}`.\n"
    report = json.loads(path.read_text())
    rows = [[row["fault"], *(str(row[key]) for key in ("tried", "survived", "lost"))] for row in report["rows"]]
    note = f"\n{report['environment']['cpu']}. Made by `benchmarks/robustness.py {part}`.\n"
    if "cpu_minutes" in report:
        errors = ", ".join(f"{count} {name}" for name, count in sorted(report["errors"].items()))
        worst, honest = (report[f"{kind}worst_memory_bytes"] / 2**20 for kind in ("", "honest_"))
        note = (
            f"\n{report['cpu_minutes']} minutes of processor time. {report['results'].get('ok', 0)} cases gave an "
            f"answer, the others {errors}. The slowest took {report['worst_cpu_seconds']:.1f} s of processor time. The "
            f"process grew by {worst:.0f} MiB at most, and by {honest:.0f} MiB at most with the honest files." + note
        )
    return markdown(HEADER, rows) + note


TABLES: dict[str, Callable[[], str]] = {
    "robustness-files": partial(robustness, "files"),
    "robustness-coverage": partial(robustness, "coverage"),
    "robustness-schema": partial(robustness, "schema"),
    "robustness-numerics": partial(robustness, "numerics"),
    "robustness-threads": partial(robustness, "threads"),
    "robustness-interrupted": robustness_interrupted,
    "robustness-supply": robustness_supply,
    "robustness-server": partial(robustness_server, "toy", "A toy model"),
    "robustness-server-smollm2": partial(robustness_server, "smollm2", "SmolLM2-135M in 3 bits"),
}
