"""What each code costs in quality on a real model: perplexity, divergence and agreement on held-out text.

References are off the quantization grid (see fewbit.evaluate.offgrid) and every row is relative to its own
reference. Finished rows are kept in the result file, so that a run that was cut off continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import python_peers
import torch
from checkpoints import CALIBRATION, forget, made, unlike, work_dir
from encode import commit
from peers import PACKAGE, VERSION
from python_peers import PYTHON_PEERS, PythonRecipe
from quantizers import MIXES, Recipe, fitting, kept_importance_matrix, requantize
from references import kept_logits, reference_dir
from saving import save
from transformers.utils import logging

from fewbit.assets import fetch_text
from fewbit.checkpoint.source import open_source
from fewbit.environment import environment
from fewbit.evaluate import evaluate_many
from fewbit.loading import load, load_any
from fewbit.modules import FewbitLinear
from fewbit.pipeline.options import QuantizeOptions

RESULTS = Path(__file__).parent / "results"
TEXTS = ("wiki.eval", "austen.persuasion")

# Head and embeddings keep 16 bits in every row but one, so that rows differ in the decoder layers alone.
ROWS = {
    "trellis": QuantizeOptions(head="bf16"),
    "trellis, no tuning": QuantizeOptions(head="bf16", tune=False),
    "trellis, no tuning, full model's Hessians": QuantizeOptions(head="bf16", tune=False, sequential=False),
    "trellis, no tuning, not rotated": QuantizeOptions(head="bf16", tune=False, rotate=False),
    "trellis, nearest": QuantizeOptions(head="bf16", rounding="nearest"),
    "trellis, nearest, not rotated": QuantizeOptions(head="bf16", rounding="nearest", rotate=False),
    "trellis, 3.08 bits by sensitivity": QuantizeOptions(head="bf16", bits=3.08),
    "trellis, head itq4": QuantizeOptions(head="itq4"),
    "8 levels": QuantizeOptions(code="lloyd8", head="bf16"),
    "8 levels, no tuning": QuantizeOptions(code="lloyd8", head="bf16", tune=False),
    "ternary": QuantizeOptions(code="ternary", head="bf16"),
    "ternary, no tuning": QuantizeOptions(code="ternary", head="bf16", tune=False),
    "iq3_s code": QuantizeOptions(code="iq3_s", head="bf16"),
    "iq3_s code, no tuning": QuantizeOptions(code="iq3_s", head="bf16", tune=False),
    "trellis 2 bits": QuantizeOptions(bits=2, head="bf16"),
    "trellis, 3.25 bits by sensitivity": QuantizeOptions(head="bf16", bits=3.25),
    "trellis 4 bits": QuantizeOptions(bits=4, head="bf16"),
    "trellis 4 bits, no tuning": QuantizeOptions(bits=4, head="bf16", tune=False),
}

PEERS = {
    f"llama.cpp {mix} + imatrix{', padded' * pad}": Recipe(mix, pad)
    for pad in (False, True)
    for mix in (*MIXES, "pure IQ3_XXS", "pure Q4_K")
}
"""llama.cpp's quantizer on the layers; head and embeddings keep full precision."""


def decoded(model: Any) -> Any:
    """A packed model with plain linears in the place of its packed ones, in place: what peers are compared with."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FewbitLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(module.plain_weight(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def scores(
    reference: Path, models: dict[str, Any], tokenizer: Any, texts: Sequence[str], settings: dict[str, int]
) -> dict[str, Any]:
    """What models["row"] scores on the first text and, by name, on the others; models["kernels"] on the first alone."""
    found: dict[str, dict[str, Any]] = {}
    for name in texts:
        text = fetch_text(name).read_text(encoding="utf-8")
        full = kept_logits(reference, text, **settings)
        chosen = {key: model for key, model in models.items() if key == "row" or not found}
        results = evaluate_many({"full": full, **chosen}, tokenizer, text, full, **settings)
        row, base = results["row"], results["full"].perplexity
        found[name] = {"reference_perplexity": base, "ratio": row.perplexity / base, **row.to_json()}
        if "kernels" in results:
            kernels = results["kernels"]
            found[name]["kernels"] = {"ratio": kernels.perplexity / base, "kl_mean": kernels.kl_mean}
    return {**found.pop(texts[0]), "texts": found}


def measure(
    reference: Path, options: QuantizeOptions, texts: Sequence[str], settings: dict[str, int], work: Path
) -> dict[str, Any]:
    """Quantize and evaluate one row in float32: decoded, as the peers are, and as kernels run it, if any do."""
    output = work / "checkpoint"
    result = made(reference, options, output)
    started = time.monotonic()
    row_model, tokenizer = load(output, torch.float32)
    models = {"row": decoded(row_model)}
    packed, _ = load(output, torch.float32)
    # Codes without kernels are decoded for every window, which takes long and gives what the row has.
    if any(module.has_kernel() for module in packed.modules() if isinstance(module, FewbitLinear)):
        models["kernels"] = packed
    found = scores(reference, models, tokenizer, texts, settings)
    tuning = json.loads((output / "fewbit.json").read_text()).get("tuning")
    forget(work)
    return {
        "options": asdict(options),
        **{key: result[key] for key in ("bits_per_weight", "bytes", "peak_memory_bytes", "mean_relative_error")},
        "quantize_seconds": result["seconds"],
        "resumed": result["resumed"],
        "tuning": tuning,
        "evaluate_seconds": round(time.monotonic() - started, 1),
        **found,
    }


def llama_cpp(reference: Path, recipe: Recipe, calib_tokens: int) -> Callable[[Any], dict[str, Any]]:
    """What rounds a model in place with llama.cpp and says how; its importance matrix is taken beforehand."""
    importance = kept_importance_matrix(reference, [fetch_text(name) for name in CALIBRATION], calib_tokens)

    def apply(model: Any) -> dict[str, Any]:
        started = time.monotonic()
        facts = requantize(model, open_source(reference), recipe, importance)
        seconds = round(time.monotonic() - started, 1)
        return {
            "options": {**asdict(recipe), "calib_tokens": calib_tokens, "dtype": "float32"},
            "peer": f"{PACKAGE} {VERSION}",
            **facts,
            "quantize_seconds": seconds,
        }

    return apply


def python_package(reference: Path, recipe: PythonRecipe, calib_tokens: int) -> Callable[[Any], dict[str, Any]]:
    """The same with a Python package, which has done its work before this returns."""
    files = [fetch_text(name) for name in CALIBRATION]
    weights, facts = python_peers.peer_weights(reference, recipe, files, calib_tokens)

    def apply(model: Any) -> dict[str, Any]:
        row = python_peers.replace(model, open_source(reference), weights, facts)
        return {"options": recipe.options(calib_tokens), **row}

    return apply


def measure_peer(
    reference: Path, name: str, texts: Sequence[str], settings: dict[str, int], calib_tokens: int
) -> dict[str, Any]:
    """Quantize with a peer and evaluate one row, in float32."""
    # Before the other model is there: two of them may not fit into memory.
    if name in PYTHON_PEERS:
        apply = python_package(reference, PYTHON_PEERS[name], calib_tokens)
    else:
        apply = llama_cpp(reference, PEERS[name], calib_tokens)
    model, tokenizer = load_any(reference, torch.float32)
    facts = apply(model)
    started = time.monotonic()
    found = scores(reference, {"row": model}, tokenizer, texts, settings)
    return {**facts, "evaluate_seconds": round(time.monotonic() - started, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or qwen2.5-coder-1.5b")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="the first one is the one that tables show")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *PEERS, *PYTHON_PEERS], default=list(ROWS), metavar="ROW")
    parser.add_argument("--peers", action="store_true", help="the rows of peers, too: all that fit the model")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / f"quality-{arguments.model}.json"
    report = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    first, *others = arguments.texts
    if report.get("text", first) != first:
        parser.error(f"{output} has rows whose first text is {report['text']}; give another --output for {first}")
    report |= {"benchmark": "quality", "model": arguments.model, "text": first, "calibration": CALIBRATION}
    # Loading a model is not what this program reports on.
    logging.disable_progress_bar()
    settings = {"window": arguments.window, "tokens": arguments.tokens}
    if other := unlike(report, {**settings, "calib_tokens": arguments.calib_tokens}):
        parser.error(f"{output} has rows of {other}; give another --output")
    for seed in arguments.seeds:
        reference = reference_dir(arguments.model, seed)
        source = open_source(reference)
        peers = [*fitting(PEERS, source), *python_peers.fitting(source)] if arguments.peers else []
        for text in arguments.texts:
            # Before other models are there.
            kept_logits(reference, fetch_text(text).read_text(encoding="utf-8"), **settings)
        for name in dict.fromkeys([*arguments.rows, *peers]):
            key = f"{name} | seed {seed}"
            if key in report["rows"] and set(others) <= report["rows"][key].get("texts", {}).keys():
                continue
            if name not in ROWS:
                row = measure_peer(reference, name, arguments.texts, settings, arguments.calib_tokens)
            else:
                options = replace(ROWS[name], calib_tokens=arguments.calib_tokens)
                row = measure(reference, options, arguments.texts, settings, work_dir(key, output))
            report["rows"][key] = {**row, "commit": commit(), "environment": environment()}
            save(output, report)
            print(f"{key}: perplexity x {row['ratio']:.4f}, KL {row['kl_mean']:.4f}", flush=True)


if __name__ == "__main__":
    main()
