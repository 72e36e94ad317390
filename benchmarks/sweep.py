"""Measures fewbit's decoder by prompt length, by sequences that decode together, and by threads, beside what the
machine's memory allows (one reading of the weights per step) and its arithmetic (one product with each per token).

Rounds go through all settings in turn, so that what disturbs the machine disturbs all alike, and medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from encode import commit
from end_to_end import checkpoint, fewbit

from fewbit.environment import environment

OUTPUT = Path(__file__).resolve().parent / "results" / "sweep.json"
TYPE = "itq3_s 3 bits"
PROMPTS = (32, 128, 512, 2048)
BATCHES = (1, 2, 4, 8, 16, 32)
GENERATED = 32
SPEEDS = ("read_bytes_per_second", "operations_per_second")  # the machine's own


def measured(path: Path, threads: int) -> dict[str, Any]:
    """What `fewbit bench` says of one round."""
    numbers = [
        *("--prompt-tokens", ",".join(map(str, PROMPTS)), "--batch", ",".join(map(str, BATCHES))),
        *("--gen-tokens", str(GENERATED), "--repeats", "1", "--threads", str(threads)),
    ]
    return json.loads(fewbit("bench", str(path), *numbers, "--json")[0])


def medians(rounds: list[dict[str, Any]], kind: str, key: str) -> dict[str, dict[str, float]]:
    """Tokens per second by `key` over the rounds."""
    found: dict[str, list[float]] = {}
    for one in rounds:
        for entry in one[kind]:
            found.setdefault(str(entry[key]), []).append(entry["tokens_per_second"])
    return {
        setting: {"median": statistics.median(rates), "stdev": statistics.pstdev(rates)}
        for setting, rates in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "qwen2.5-coder-1.5b"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    settings = [(model, threads) for model in arguments.models for threads in arguments.threads]
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {setting: [] for setting in settings}
    for number in range(arguments.rounds):
        for model, threads in settings:
            rounds[model, threads].append(measured(checkpoint(model, TYPE), threads))
            print(f"round {number + 1}: {model}, {threads} threads", file=sys.stderr, flush=True)
    rows = [
        {
            "model": model,
            "threads": threads,
            "type": TYPE,
            "prefill": medians(found, "prefill", "prompt_tokens"),
            "decode": medians(found, "decode", "batch"),
            **{key: found[0][key] for key in ("weight_bytes_per_token", "operations_per_token")},
            **{key: statistics.median(one[key] for one in found) for key in SPEEDS},
        }
        for (model, threads), found in rounds.items()
    ]
    facts = {"benchmark": "sweep", "rounds": arguments.rounds, "generated_tokens": GENERATED, "rows": rows}
    report = {**facts, "environment": environment(), "commit": commit()}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
