"""Measures what the size of the rotation's blocks changes: the error of a linear's outputs, and a whole model's losses.

Every size rounds the same weights with error feedback by the full model's Hessians, with the same groups of scales, so
that nothing but the block differs; a block that does not divide a linear's inputs is halved until it does. On a large
model some layers are rounded and their outputs' errors reported, on SmolLM2 the whole model is evaluated too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from checkpoints import CALIBRATION
from encode import commit
from quantizers import linears
from references import kept_logits, reference_dir
from saving import save
from transformers.utils import logging

from fewbit.assets import fetch_text
from fewbit.checkpoint.source import open_source
from fewbit.environment import environment
from fewbit.evaluate import evaluate_many
from fewbit.formats import get_format
from fewbit.formats.base import group_format
from fewbit.loading import load_any
from fewbit.math.hadamard import random_signs, rotate_hessian, rotation_block, unrotate
from fewbit.math.rounding import inverse_factor, quantize_matrix
from fewbit.models import get_family
from fewbit.pipeline.texts import CalibrationText, calibration_windows

OUTPUT = Path(__file__).resolve().parent / "results" / "blocks.json"
BLOCKS = (1, 32, 64, 128, 256, 512)
CODES = ("trellis", "ternary")
WINDOW = 512
DAMPING = 0.01
WHOLE = "smollm2-135m"  # what is evaluated, and not only rounded
SOME_LAYERS = {"qwen2.5-coder-1.5b": (0, 13, 27)}


@torch.inference_mode()
def hessians(model: torch.nn.Module, names: list[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean second moments float32 `[K, K]` of linears' inputs; linears that read the same share one tensor."""
    sums: dict[str, torch.Tensor] = {}
    last: dict[str, Any] = {"input": None, "name": ""}
    shared: dict[str, str] = {}

    def hook(name: str) -> Any:
        def add(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if arguments[0] is last["input"]:
                shared[name] = last["name"]
                return
            last.update(input=arguments[0], name=name)
            rows = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            if name not in sums:
                sums[name] = torch.zeros(rows.shape[1], rows.shape[1])
            sums[name].addmm_(rows.T, rows)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for window in windows:
        model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    for total in sums.values():
        total /= windows.numel()
    return {name: sums[shared.get(name, name)] for name in names}


def rounded(weight: torch.Tensor, hessian: torch.Tensor, code: str, block: int, seed: int) -> torch.Tensor:
    """What `weight [N, K]` decodes to on its own axes, float32, with blocks of at most `block` (1: not rotated)."""
    fmt = group_format(code)
    spec = replace(fmt.spec(*weight.shape, 3), block=rotation_block(weight.shape[1], block))
    signs = random_signs(weight.shape[1], seed) if block > 1 else None
    seen = hessian if signs is None else rotate_hessian(hessian, signs, spec.block)
    found = quantize_matrix(fmt, weight, spec, signs, inverse_factor(seen, DAMPING))
    values = get_format(code).dequantize(found.parts, spec)
    return values if signs is None else unrotate(values, signs, spec.block)


def errors(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], seconds: dict[str, torch.Tensor], code: str, block: int
) -> Iterator[float]:
    """The error of each linear's outputs relative to their energy; leaves the rounded weights in `model`."""
    for number, (name, weight) in enumerate(weights.items()):
        values = rounded(weight, seconds[name], code, block, number)
        lost = weight - values
        yield float(((lost @ seconds[name]) * lost).sum() / ((weight @ seconds[name]) * weight).sum())
        model.get_submodule(name).weight.data.copy_(values)


def measure(name: str, seed: int, calib_tokens: int, tokens: int) -> Iterator[dict[str, Any]]:
    """One row per code and block."""
    reference = reference_dir(name, seed)
    source = open_source(reference)
    texts = [CalibrationText(fetch_text(text)) for text in CALIBRATION]
    windows, _ = calibration_windows(source, texts, calib_tokens, WINDOW)
    whole = name == WHOLE
    model, tokenizer = load_any(reference, torch.float32)
    chosen = SOME_LAYERS.get(name, range(source.config.num_hidden_layers))
    family = get_family(source.config.model_type)
    names = [linear for layer, linear in linears(family, source.config.num_hidden_layers) if layer in chosen]
    seconds = hessians(model, names, windows)
    weights = {linear: source.tensor(f"{linear}.weight").float() for linear in names}
    settings = {"window": WINDOW, "tokens": tokens}
    text = fetch_text("wiki.eval").read_text(encoding="utf-8")
    full = kept_logits(reference, text, **settings) if whole else None
    for code in CODES:
        for block in BLOCKS:
            found = list(errors(model, weights, seconds, code, block))
            row = {"model": name, "seed": seed, "code": code, "block": block, "layers": len(chosen)}
            row |= {
                "output_error": mean(found),
                "widest_block": max(rotation_block(w.shape[1], block) for w in weights.values()),
            }
            if full is not None:
                scores = evaluate_many({"row": model, "full": full}, tokenizer, text, full, **settings)
                ratio = scores["row"].perplexity / scores["full"].perplexity
                row |= {"ratio": ratio, **scores["row"].to_json()}
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[WHOLE, *SOME_LAYERS], default=[WHOLE, *SOME_LAYERS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calib-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    # What is published is all of it.
    part = arguments.output.with_suffix(".part.json")
    report: dict[str, Any] = {"benchmark": "blocks", "calib_tokens": arguments.calib_tokens, "rows": []}
    for name in arguments.models:
        for row in measure(name, arguments.seed, arguments.calib_tokens, arguments.tokens):
            report["rows"].append(row)
            report |= {"environment": environment(), "commit": commit()}
            save(part, report)
            losses = f", perplexity x {row['ratio']:.4f}, KL {row['kl_mean']:.4f}" if "ratio" in row else ""
            print(f"{name} {row['code']} blocks of {row['block']}: error {row['output_error']:.5f}{losses}", flush=True)
    os.replace(part, arguments.output)


if __name__ == "__main__":
    main()
