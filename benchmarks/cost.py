"""What compressing costs: time and peak memory by model size.

Real models run through `fewbit quantize` in processes of their own, and `--dry-run` predicts the same; shapes that are
too large for that here are predicted alone, from files that hold headers and nothing else. What was measured is kept in
the result file, so that a run that was cut off continues; predictions are made anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from big import SHAPE, fewbit, shapes
from encode import commit
from references import reference_dir
from saving import save
from transformers import LlamaConfig

from fewbit.checkpoint.source import open_source
from fewbit.environment import environment
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.predict import predict

OUTPUT = Path(__file__).resolve().parent / "results" / "cost.json"
MODELS = ("smollm2-135m", "qwen2.5-coder-1.5b")
TWIN = ("--format", "twinquant")
SETTINGS = {
    "nearest": ("--rounding", "nearest"),
    "calibrated": ("--no-tune",),
    "calibrated and tuned": (),
    "twinquant, calibrated": (*TWIN, "--no-learn", "--no-tune"),
    "twinquant, learned": (*TWIN, "--no-tune"),
    "twinquant, learned and tuned": TWIN,
}
LARGER = {
    "8B shape": LlamaConfig(**SHAPE, num_hidden_layers=32, tie_word_embeddings=False),
    "70B shape": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        num_hidden_layers=80,
        tie_word_embeddings=False,
    ),
}
CALIB_TOKENS, WINDOW = 65536, 512


def write_hollow(directory: Path, config: LlamaConfig) -> None:
    """A model in bfloat16 whose files have headers and holes: their full length, and hardly a byte on the disk."""
    config.save_pretrained(directory)
    table = (config.vocab_size, config.hidden_size)
    parts = {"tables": {"model.embed_tokens.weight": table, "lm_head.weight": table}}
    parts["tables"]["model.norm.weight"] = (config.hidden_size,)
    for layer in range(config.num_hidden_layers):
        parts[f"{layer:03d}"] = {f"model.layers.{layer}.{name}": shape for name, shape in shapes(config).items()}
    index = {}
    for part, tensors in parts.items():
        header, end = {}, 0
        for name, shape in tensors.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            index[name] = f"{part}.safetensors"
        text = json.dumps(header).encode()
        path = directory / f"{part}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def predicted(config: LlamaConfig, rounding: str) -> dict[str, Any]:
    """What the plan of a shape says: weights, time and memory."""
    with tempfile.TemporaryDirectory(prefix="fewbit-cost-") as directory:
        write_hollow(Path(directory), config)
        source = open_source(directory)
        options = QuantizeOptions(rounding=rounding, calib_tokens=CALIB_TOKENS).resolved(source.weights())
        windows = torch.zeros(CALIB_TOKENS // WINDOW, WINDOW, dtype=torch.int64) if rounding == "ldlq" else None
        return {"weights": source.weights(), "predicted": predict(make_plan(source, options, ""), windows)}


def command(model: str, settings: tuple[str, ...]) -> list[str]:
    """What compresses a real model off the grid, but for the directory that the result goes to."""
    tokens = ("--calib-tokens", str(CALIB_TOKENS), "--calib-window", str(WINDOW))
    return ["quantize", str(reference_dir(model, seed=0)), *tokens, *settings]


def foreseen(model: str, settings: tuple[str, ...]) -> dict[str, float]:
    """What the plan says beforehand: time and memory."""
    with tempfile.TemporaryDirectory(prefix="fewbit-cost-") as directory:
        plan = fewbit(*command(model, settings), str(Path(directory) / "out"), "--dry-run")
    prediction: dict[str, float] = plan["prediction"]
    return prediction


def measured(model: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """One run on a real model."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fewbit-cost-") as directory:
        started = time.monotonic()
        found = fewbit(*command(model, settings), str(Path(directory) / "out"))
        seconds = time.monotonic() - started
    return {
        "weights": open_source(reference_dir(model, seed=0)).weights(),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": found["peak_memory_bytes"],
        "bits_per_weight": found["bits_per_weight"],
        "load_average_before": round(load, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": {}}
    report |= {"benchmark": "cost", "calib_tokens": CALIB_TOKENS}

    def keep(key: str, row: dict[str, Any]) -> None:
        report["rows"][key] = {**row, "commit": commit(), "environment": environment()}
        save(arguments.output, report)
        print(key, json.dumps(row), flush=True)

    for name, config in LARGER.items():
        for settings, rounding in (("nearest", "nearest"), ("calibrated", "ldlq")):
            keep(f"{name} | {settings}", predicted(config, rounding))
    for settings in arguments.settings:
        for model in arguments.models:
            key = f"{model} | {settings}"
            # A prediction takes seconds and is made anew; a row that was measured is kept.
            prediction = foreseen(model, SETTINGS[settings])
            if key in report["rows"]:
                report["rows"][key]["predicted"] = prediction
                save(arguments.output, report)
            else:
                keep(key, {"predicted": prediction, **measured(model, SETTINGS[settings])})


if __name__ == "__main__":
    main()
