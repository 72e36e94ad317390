"""Counts what damaged files, odd requests, extreme numbers and many threads do to fewbit, one JSON file per part.

    python benchmarks/robustness.py files --minutes 10
    python benchmarks/robustness.py coverage --minutes 10
    python benchmarks/robustness.py schema
    python benchmarks/robustness.py numerics
    python benchmarks/robustness.py threads

The cases are those of `tests/robustness`, which runs some of them with every `make test`; those of `coverage` are
found by atheris and those of `schema` by schemathesis, each in an environment of its own. Ends with 1 where something
is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from encode import commit

from fewbit.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
CASES = ROOT / "tests" / "robustness"
sys.path[:0] = [str(CASES), str(CASES.parent)]
SAVED_EVERY = 250  # cases, so that a run that is ended early leaves its figures


def cpu_minutes() -> float:
    """What this process and its children that ended have computed."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime) / 60


def row(fault: str, tried: int, survived: int) -> dict[str, Any]:
    return {"fault": fault, "tried": tried, "survived": survived, "lost": tried - survived}


def files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Damaged files of every kind through every way in, until so many minutes of processor time are spent on them."""
    from hostile_sandbox import ADDRESS_BYTES, CONSTANT_BYTES, CPU_SECONDS, WALL_SECONDS, Sandbox

    outcomes: list[Any] = []
    spent = 0.0
    with tempfile.TemporaryDirectory(prefix="fewbit-files-") as directory:
        sandbox = Sandbox(Path(directory))
        assert all(outcome.result == "ok" for outcome in sandbox.honest), sandbox.honest
        number = arguments.first
        while spent < 60 * arguments.minutes:
            random = Random(number)
            kind = random.choice(sorted(sandbox.targets))
            outcome = sandbox.run(kind, random.choice(sandbox.targets[kind]), number)
            outcomes.append(outcome)
            spent += outcome.seconds
            if not outcome.fine:
                print(outcome, flush=True)
            number += 1
            if len(outcomes) % SAVED_EVERY == 0:
                save("files", _counted(outcomes, sandbox.honest, spent))
        sandbox.close()
    found = _counted(outcomes, sandbox.honest, spent)
    return found | {
        "limits": {
            "cpu_seconds": CPU_SECONDS,
            "wall_seconds": WALL_SECONDS,
            "memory_bytes": f"2 x files + {CONSTANT_BYTES}",
            "address_bytes": ADDRESS_BYTES,
        }
    }


def _counted(outcomes: list[Any], honest: list[Any], spent: float) -> dict[str, Any]:
    """The figures of the cases so far; `spent` seconds of processor time went into them."""
    names = {
        "plain": "a model in one file of safetensors",
        "sharded": "a model in several files and an index",
        "trellis": "a checkpoint",
        "twinquant": "a checkpoint in twinquant",
        "gguf": "a GGUF file",
        "tokenizer": "a tokenizer",
        "plan": "an unfinished run: its plan, shards and source",
    }
    rows = []
    for kind, name in names.items():
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        rows.append(row(f"damaged: {name}", len(own), sum(outcome.fine for outcome in own)))
    return {
        "rows": rows,
        "cases": len(outcomes),
        "first": outcomes[0].number,
        "results": dict(Counter(outcome.result for outcome in outcomes)),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.result == "typed")),
        "ways_in": dict(Counter(outcome.target for outcome in outcomes)),
        "cpu_minutes": round(spent / 60, 2),
        "worst_cpu_seconds": max(outcome.seconds for outcome in outcomes),
        "worst_memory_bytes": max(outcome.memory for outcome in outcomes),
        "honest_worst_cpu_seconds": max(outcome.seconds for outcome in honest),
        "honest_worst_memory_bytes": max(outcome.memory for outcome in honest),
    }


def numerics(arguments: argparse.Namespace) -> dict[str, Any]:
    """Extreme numbers through every kernel, every instruction set beside the portable one."""
    from hostile_numbers import differing
    from hostile_seeds import make_seeds

    from fewbit import _native

    rows = []
    with tempfile.TemporaryDirectory(prefix="fewbit-numbers-") as directory:
        checkpoint = make_seeds(Path(directory))["trellis"]
        found = {}
        for isa in (*_native.available_isas(), *_native.emulated_isas()):
            result = subprocess.run(
                [sys.executable, str(CASES / "hostile_numbers.py"), str(checkpoint)],
                env={**os.environ, "FEWBIT_ISA": isa, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
                capture_output=True,
                text=True,
                check=True,
            )
            found[isa] = json.loads(result.stdout)
    for isa in list(found)[1:]:
        for kind, what in (("exact", "operators, bit for bit"), ("bounded", "whole models, within rounding")):
            different = differing(found["portable"], found[isa], kind)
            tried = len(found[isa][kind])
            rows.append(row(f"extreme numbers, {what}: {isa} beside portable", tried, tried - len(different)))
    return {"rows": rows}


def threads(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine asked by many threads, a fork while it works, and the pool under ThreadSanitizer."""
    from hostile_threads import asked_by_many, forked, sanitized

    tried, right = asked_by_many(arguments.threads, arguments.requests)
    rows = [row(f"answers of one engine to {arguments.threads} threads at once", tried, right)]
    rows.append(row("a fork while an engine answers: a typed error in the child, an answer in the parent", *forked(20)))
    rows.append(row("the pool of threads under ThreadSanitizer, runs", *sanitized(10)))
    return {"rows": rows}


def words_of(script: str, *arguments: str) -> tuple[int, str]:
    """The exit code of a script and all that it said, which the terminal shows meanwhile."""
    command = ["sh", f"scripts/{script}", *arguments]
    words = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            words.append(line)
    return process.returncode, "".join(words)


def coverage(arguments: argparse.Namespace) -> dict[str, Any]:
    """Inputs of the readers that atheris finds by what the interpreter covers; a finding ends the run."""
    code, words = words_of("fuzz.sh", str(round(60 * arguments.minutes)))
    runs = [int(number) for number in re.findall(r"^(?:#|stat::number_of_executed_units: |Done )(\d+)", words, re.M)]
    if not runs:
        raise SystemExit(f"the fuzzer did not run: {words[-1000:]}")
    what = "headers, indices, records and plans, found by coverage"
    return {"rows": [row(what, max(runs), max(runs) - (code != 0))], "seconds": round(60 * arguments.minutes)}


def schema(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the OpenAPI schema allows and forbids, sent to a server: answers of 500 and above are lost."""
    _, words = words_of("test_schema.sh")
    found = re.search(r"(\d+) generated,(?:.*, |\s)(\d+) passed", words)
    version = re.search(r"Schemathesis v(\S+)", words)
    if not found or not version:
        raise SystemExit(f"schemathesis did not run: {words[-1000:]}")
    what = f"requests made from the OpenAPI schema by schemathesis {version[1]}"
    return {"rows": [row(what, int(found[1]), int(found[2]))]}


PARTS = {"files": files, "coverage": coverage, "schema": schema, "numerics": numerics, "threads": threads}


def save(part: str, found: dict[str, Any]) -> None:
    output = RESULTS / f"robustness-{part}.json"
    report = {**found, "commit": commit(), "environment": environment()}
    output.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=10.0, help="for files, of processor time, and for coverage")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--requests", type=int, default=25, help="per thread")
    arguments = parser.parse_args()
    started = time.monotonic()
    found = PARTS[arguments.part](arguments)
    save(arguments.part, found)
    print(json.dumps(found["rows"], indent=1), f"{time.monotonic() - started:.0f} s", f"{cpu_minutes():.1f} CPU-min")
    return int(any(one["lost"] for one in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
