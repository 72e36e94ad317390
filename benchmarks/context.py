"""Measures long contexts: perplexity by the position in the window, and the speed of decoding behind so many tokens.

One novel, so that what is far back still matters; the full model in bfloat16 and its 3-bit form, each with every kind
of cache, in fewbit's own decoder. Speeds go through the caches in turn, so that what disturbs the machine disturbs all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import made, work_dir
from encode import commit
from references import reference_dir
from saving import save

from fewbit.assets import fetch_text
from fewbit.checkpoint.source import open_source
from fewbit.environment import environment
from fewbit.evaluate import windows
from fewbit.pipeline.options import QuantizeOptions
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import KV_TYPES, open_decoder

OUTPUT = Path(__file__).resolve().parent / "results" / "context.json"
TEXT = "austen.persuasion"
OPTIONS = QuantizeOptions(tune=False)
FIRST = 512  # positions of the first stretch; each further one is as long as all before it
BLOCK = 256
STEPS = 32


def checkpoint(model: str, output: Path) -> Path:
    """The 3-bit form of the model, calibrated, made once for a commit."""
    directory = work_dir(model, output) / "checkpoint"
    made(reference_dir(model, 0), OPTIONS, directory)
    return directory


def losses(decoder: Any, window: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood in nats, float64 `[tokens - 1]`, of every token but the first."""
    found = []
    places = np.arange(window.numel(), dtype=np.int32)
    for start in range(0, window.numel(), BLOCK):
        here = places[start : start + BLOCK]
        wanted = here[: window.numel() - 1 - start] - start
        batch = Batch(window[start : start + BLOCK].int().numpy(), here, np.zeros_like(here), wanted)
        chances = torch.from_numpy(decoder.forward(batch)).log_softmax(1)
        nexts = window[start + 1 : start + 1 + wanted.size]
        found.append(-chances.gather(1, nexts[:, None])[:, 0].double())
    return torch.cat(found)


def stretches(context: int) -> list[tuple[int, int]]:
    """Ranges of positions: the first `FIRST`, then as many again, twice as many, and so on."""
    ends = [FIRST]
    while ends[-1] < context:
        ends.append(min(2 * ends[-1], context))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def perplexities(path: Path, kv: str, cuts: torch.Tensor, threads: int) -> dict[str, float]:
    """Perplexity of each stretch of positions, over all windows, and over everything."""
    context = cuts.shape[1]
    decoder, _ = open_decoder(path, kv=kv, block=BLOCK, context=context, threads=threads, fallback=False)
    nats = torch.stack([losses(decoder, window) for window in cuts])
    decoder.close()
    found = {f"{low}-{high}": math.exp(nats[:, low : high - 1].mean()) for low, high in stretches(context)}
    return {**found, "all": math.exp(nats.mean())}


def speeds(path: Path, kinds: list[str], window: torch.Tensor, depths: list[int], threads: int, rounds: int) -> Any:
    """Median tokens per second behind each depth, by kind of cache, over rounds through all of them."""
    context = max(depths) + STEPS
    decoders = {
        kv: open_decoder(path, kv=kv, block=BLOCK, context=context, threads=threads, fallback=False)[0] for kv in kinds
    }
    for decoder in decoders.values():
        losses(decoder, window[: max(depths)])
    slot = np.zeros(1, np.int32)
    rates: dict[str, dict[int, list[float]]] = {kv: {depth: [] for depth in depths} for kv in kinds}
    for _ in range(rounds):
        for depth in depths:
            for kv, decoder in decoders.items():
                started = time.perf_counter()
                for step in range(STEPS):
                    # What stands behind `depth` is written anew: a deeper measurement starts with the text again.
                    token = window[depth + step : depth + step + 1].int().numpy()
                    decoder.forward(Batch(token, np.array([depth + step], np.int32), slot, slot))
                rates[kv][depth].append(STEPS / (time.perf_counter() - started))
    return {
        kv: {
            str(depth): {"median": statistics.median(values), "stdev": statistics.pstdev(values)}
            for depth, values in found.items()
        }
        for kv, found in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or qwen2.5-coder-1.5b")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["perplexity", "speed"], help="measure this alone; what else is there stays")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    packed = checkpoint(arguments.model, arguments.output)
    paths = {"bfloat16": reference_dir(arguments.model, 0), "itq3_s 3 bits": packed}
    tokenizer = open_source(paths["bfloat16"]).tokenizer()
    text = fetch_text(TEXT).read_text(encoding="utf-8")
    cuts = windows(tokenizer, text, arguments.context, arguments.context * arguments.windows)
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report |= {"benchmark": "context", "model": arguments.model, "text": TEXT, "windows": len(cuts)}
    depths = [0, *(low for low, _ in stretches(arguments.context)[1:]), arguments.context - STEPS]
    for name, path in paths.items():
        row = report.setdefault("rows", {}).setdefault(name, {})
        if arguments.only != "speed":
            row["perplexity"] = {kv: perplexities(path, kv, cuts, arguments.threads) for kv in KV_TYPES}
        if arguments.only != "perplexity":
            row["decode"] = speeds(path, list(KV_TYPES), cuts[0], depths, arguments.threads, arguments.rounds)
            report |= {"threads": arguments.threads, "rounds": arguments.rounds, "speed_environment": environment()}
        report |= {"commit": commit(), "environment": environment()}
        save(arguments.output, report)
        print(f"{name}: {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
