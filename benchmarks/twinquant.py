"""What TwinQuant costs in quality, step by step: perplexity, divergence and agreement on held-out text.

Each row is a run of the pipeline on an off-grid reference, evaluated as the kernels compute it, in float32, relative
to its own reference. Finished rows are kept in the result file, so that a run that was cut off continues.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import CALIBRATION, forget, made, unlike, work_dir
from encode import commit
from quality import RESULTS
from references import kept_logits, reference_dir
from saving import save
from transformers.utils import logging

from fewbit.assets import fetch_text
from fewbit.environment import environment
from fewbit.evaluate import evaluate_many
from fewbit.loading import load
from fewbit.pipeline.options import ABLATIONS, QuantizeOptions, ablated

BASE = QuantizeOptions(format="twinquant", head="bf16")
RANKS = {"smollm2-135m": (64,), "qwen2.5-coder-1.5b": (256,)}
"""Ranks beside the usual 128 that a model's linears can have: whole groups of 64 or 128, a quarter of the narrower side
at most."""
SVD_RANK = 34  # in 16 bits, which take the bytes of four times the rank in four
STEPS = {
    **{step: ablated(BASE, step) for step in ABLATIONS},
    "full, not tuned": replace(BASE, tune=False),
    "full, not learned, not tuned": replace(BASE, learn=False, tune=False),
    **{
        f"full, rank {rank}, not learned, not tuned": replace(BASE, rank=rank, learn=False, tune=False)
        for rank in sorted({rank for ranks in RANKS.values() for rank in ranks})
    },
    "full, whitened, not learned, not tuned": replace(BASE, init="whitened", learn=False, tune=False),
    "full, no branch": replace(BASE, rank=0),
    "full, no branch, not learned, not tuned": replace(BASE, rank=0, learn=False, tune=False),
    "Hadamard + GPTQ": replace(BASE, rank=0, smooth=False, center=False, learn=False, tune=False),
    "SVDQuant": replace(BASE, code="svdquant", rank=SVD_RANK, smooth=False, center=False),
}
ROWS = {f"W4A{bits} {name}": replace(options, act_bits=bits) for bits in (4, 8, 16) for name, options in STEPS.items()}


def rows_of(model: str) -> list[str]:
    """The names of rows that say something of their own about a model."""
    return [name for name, options in ROWS.items() if options.rank in (0, BASE.rank, SVD_RANK, *RANKS.get(model, ()))]


def measure(
    reference: Path, options: QuantizeOptions, text: str, settings: dict[str, int], work: Path
) -> dict[str, Any]:
    """Quantize and evaluate one row."""
    output = work / "checkpoint"
    result = made(reference, options, output)
    started = time.monotonic()
    full = kept_logits(reference, text, **settings)
    model, tokenizer = load(output, torch.float32)
    scores = evaluate_many({"full": full, "row": model}, tokenizer, text, full, **settings)
    record = json.loads((output / "fewbit.json").read_text())
    forget(work)
    row, base = scores["row"], scores["full"]
    return {
        "options": asdict(options),
        **{
            key: result[key]
            for key in ("bits_per_weight", "bytes", "mean_relative_error", "stage_seconds", "resumed", "executor")
        },
        "quantize_seconds": result["seconds"],
        "learning": record.get("learning"),
        "tuning": record.get("tuning"),
        "evaluate_seconds": round(time.monotonic() - started, 1),
        "reference_perplexity": base.perplexity,
        "ratio": row.perplexity / base.perplexity,
        **row.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or qwen2.5-coder-1.5b")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--text", default="wiki.eval", help="wiki.valid to choose by, wiki.eval to report on")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / f"twinquant-{arguments.model}.json"
    report = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    if report.get("text", arguments.text) != arguments.text:
        parser.error(f"{output} has rows on {report['text']}; give another --output for {arguments.text}")
    report |= {"benchmark": "twinquant", "model": arguments.model, "text": arguments.text, "calibration": CALIBRATION}
    logging.disable_progress_bar()
    text = fetch_text(arguments.text).read_text(encoding="utf-8")
    settings = {"window": arguments.window, "tokens": arguments.tokens}
    if other := unlike(report, {**settings, "calib_tokens": arguments.calib_tokens}):
        parser.error(f"{output} has rows of {other}; give another --output")
    for seed in arguments.seeds:
        for name in arguments.rows or rows_of(arguments.model):
            key = f"{name} | seed {seed}"
            if key in report["rows"]:
                continue
            reference = reference_dir(arguments.model, seed)
            options = replace(ROWS[name], calib_tokens=arguments.calib_tokens)
            row = measure(reference, options, text, settings, work_dir(key, output))
            report["rows"][key] = {**row, "commit": commit(), "environment": environment()}
            save(output, report)
            print(f"{key}: perplexity x {row['ratio']:.4f}, KL {row['kl_mean']:.4f}", flush=True)


if __name__ == "__main__":
    main()
