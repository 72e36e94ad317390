"""How fast whole models decode and read prompts, beside llama.cpp and PyTorch, in one run on one machine.

Rounds go through all contestants in turn, so that what disturbs the machine disturbs all alike, and medians over the
rounds count. Weights are rounded to nearest: speed does not depend on how well they are rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama
import torch
from encode import commit
from peers import PACKAGE, VERSION
from references import reference_dir
from saving import save
from torch_linears import packed
from transformers.utils import logging

from fewbit.assets import default_cache_dir, fetch_model
from fewbit.environment import environment
from fewbit.loading import load_any
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from fewbit.resident import peak_resident_bytes

OUTPUT = Path(__file__).resolve().parent / "results"
CHECKPOINTS = {
    "itq3_s 3 bits": QuantizeOptions(rounding="nearest", head="itq4"),
    "itq3_s 4 bits": QuantizeOptions(rounding="nearest", head="itq4", bits=4),
    "twinquant W4A8": QuantizeOptions(format="twinquant", rounding="nearest", head="itq4", act_bits=8),
    "twinquant W4A4": QuantizeOptions(format="twinquant", rounding="nearest", head="itq4", act_bits=4),
}
TYPES = ("Q4_K_M", "Q4_0", "IQ3_S")
TORCH = {"bfloat16": 16, "int8": 8, "int4": 4}  # bits of the weights
PROMPT, GENERATED = 512, 64
LIMITS = ("bandwidth_share", "read_bytes_per_second", "arithmetic_share", "operations_per_second")
PIECE = "The history of the town begins "


def checkpoint(model: str, name: str) -> Path:
    """A checkpoint of the model, made once."""
    directory = default_cache_dir() / "end-to-end" / model / name.replace(" ", "-")
    if not (directory / "fewbit.json").exists():
        quantize(reference_dir(model, 0), directory, CHECKPOINTS[name], [])
    return directory


def contestants(model: str, chosen: list[str]) -> Iterator[tuple[str, str, Path]]:
    """Who takes part: program, name and file."""
    for name in CHECKPOINTS:
        if f"fewbit {name}" in chosen:
            yield "fewbit", name, checkpoint(model, name)
    for kind in TYPES:
        if f"llama.cpp {kind}" in chosen:
            source = next(fetch_model(model).glob("*.gguf"))
            yield "llama.cpp", kind, llama.made_file(source, kind, default_cache_dir() / "gguf" / model)
    for name in TORCH:
        if f"torch {name}" in chosen:
            yield "torch", name, reference_dir(model, 0)


def fewbit(*arguments: str) -> tuple[str, float, int]:
    """A run of the command line: its output, its seconds and the most memory it took, in bytes."""
    command = [str(Path(sys.executable).with_name("fewbit")), *arguments]
    started = time.perf_counter()
    most = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as words:
        with subprocess.Popen(command, stdout=output, stderr=words, text=True) as process:
            while process.poll() is None:
                most = max(most, peak_resident_bytes(process.pid))
                time.sleep(0.01)
        seconds = time.perf_counter() - started
        for file in (output, words):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{words.read()}")
        return output.read(), seconds, most


def fewbit_speeds(path: Path, threads: int) -> dict[str, float]:
    numbers = ["--prompt-tokens", str(PROMPT), "--gen-tokens", str(GENERATED), "--threads", str(threads)]
    numbers += ["--repeats", "1"]
    report = json.loads(fewbit("bench", str(path), *numbers, "--json")[0])
    return {
        "prefill": report["prefill"][0]["tokens_per_second"],
        "decode": report["decode"][0]["tokens_per_second"],
        **{key: report[key] for key in LIMITS},
    }


def llama_speeds(path: Path, threads: int) -> dict[str, float]:
    prompt, generated = llama.speeds(path, PROMPT, GENERATED, threads, 1)
    return {"prefill": prompt["avg_ts"], "decode": generated["avg_ts"]}


@torch.inference_mode()
def torch_speeds(path: Path, name: str, threads: int) -> dict[str, float]:
    """transformers' model in bfloat16 with its own cache, its linears in the bits that the name says."""
    torch.set_num_threads(threads)
    model, _ = load_any(path, torch.bfloat16)
    if TORCH[name] < 16:
        model = packed(model, TORCH[name])
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    # As the others: warm, and with the logits of the last position alone.
    model(ids[:, :8], use_cache=True)
    started = time.perf_counter()
    state = model(ids, use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    cache, token = model(ids[:, :1], use_cache=True).past_key_values, state.logits[:, -1:].argmax(-1)
    begun = time.perf_counter()
    for _ in range(GENERATED):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return {
        "prefill": PROMPT / (prefilled - started),
        "decode": GENERATED / (time.perf_counter() - begun),
    }


def first_token(path: Path) -> dict[str, float]:
    """Seconds from the start of the program to its end after one token, and the most memory of a longer answer."""
    seconds = [fewbit("generate", str(path), "-p", PIECE, "--max-tokens", "1")[1] for _ in range(3)]
    memory = fewbit("generate", str(path), "-p", PIECE, "--max-tokens", "64")[2]
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"start_seconds": statistics.median(seconds), "peak_memory_bytes": memory, "file_bytes": size}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and deviations over the rounds."""
    found: dict[str, Any] = {}
    for key in rounds[0]:
        values = [one[key] for one in rounds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[key] = {"median": round(statistics.median(values), 4), "stdev": round(spread, 4)}
    return found


def measure(model: str, threads: int, rounds: int, chosen: list[str]) -> list[dict[str, Any]]:
    """One row per contestant."""
    parts = list(contestants(model, chosen))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for program, name, path in parts:
            if program == "torch":
                speeds = torch_speeds(path, name, threads)
            else:
                speeds = (fewbit_speeds if program == "fewbit" else llama_speeds)(path, threads)
            found.setdefault((program, name), []).append(speeds)
            print(f"{model} {threads}t {program} {name}: {speeds}", file=sys.stderr, flush=True)
    rows = []
    for (program, name), speeds in found.items():
        row = {"model": model, "threads": threads, "program": program, "type": name, **summary(speeds)}
        if program == "fewbit":
            row |= first_token(next(path for one, kind, path in parts if (one, kind) == (program, name)))
        rows.append(row)
    return rows


def main() -> None:
    programs = {"fewbit": CHECKPOINTS, "llama.cpp": TYPES, "torch": TORCH}
    everyone = [f"{program} {name}" for program, names in programs.items() for name in names]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "qwen2.5-coder-1.5b"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=everyone, default=everyone, metavar="CONTESTANT")
    parser.add_argument("--output", type=Path, default=OUTPUT / "end_to_end.json")
    arguments = parser.parse_args()
    whole = arguments.output == parser.get_default("output")
    if whole and any(getattr(arguments, name) != parser.get_default(name) for name in ("models", "threads", "only")):
        parser.error("the published table is of all contestants; give another --output for some of them")
    logging.disable_progress_bar()
    # What is published is all of it.
    part = arguments.output.with_suffix(".part.json")
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        for threads in arguments.threads:
            rows += measure(model, threads, arguments.rounds, arguments.only)
            report = {
                "benchmark": "end_to_end",
                "prompt_tokens": PROMPT,
                "generated_tokens": GENERATED,
                "rounds": arguments.rounds,
                "versions": {PACKAGE: VERSION},
                "rows": rows,
                "environment": environment(),
                "commit": commit(),
            }
            save(part, report)
    os.replace(part, arguments.output)


if __name__ == "__main__":
    main()
