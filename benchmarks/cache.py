"""Measures what keeping keys and values in fewer bits costs: perplexity, and divergence from a float32 cache.

Weights stay in bfloat16, so that nothing but the cache differs. Every window starts anew and its second half is scored.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import commit

from fewbit.assets import fetch_model, fetch_text
from fewbit.environment import environment
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import KV_TYPES, open_decoder

OUTPUT = Path(__file__).resolve().parent / "results" / "cache-smollm2-135m.json"
REFERENCE = "float32"


def predictions(decoder: Any, window: torch.Tensor) -> torch.Tensor:
    """Log probabilities float32 `[window / 2, vocabulary]` of a window's second half."""
    size = window.numel()
    places = np.arange(size, dtype=np.int32)
    batch = Batch(window.int().numpy(), places, np.zeros_like(places), places[size // 2 - 1 : -1])
    return torch.from_numpy(decoder.forward(batch)).log_softmax(1)


def measure(path: Path, windows: torch.Tensor, kv: str) -> tuple[float, list[float]]:
    """Perplexity of a kind of cache, and its divergence from the reference in nats, one mean per window."""
    size = windows.shape[1]
    own, _ = open_decoder(path, kv=kv, block=size, context=size, fallback=False)
    exact, _ = open_decoder(path, kv=REFERENCE, block=size, context=size, fallback=False)
    losses, lost = [], []
    for window in windows:
        found, reference = predictions(own, window), predictions(exact, window)
        losses.append(-found.gather(1, window[size // 2 :, None]).double().mean())
        lost.append((reference.exp() * (reference - found)).sum(1).double().mean())
    return math.exp(torch.stack(losses).mean()), torch.stack(lost).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    path = fetch_model("smollm2-135m")
    _, tokenizer = open_decoder(path, fallback=False)
    text = fetch_text("wiki.eval").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text[: 16 * arguments.window * arguments.windows])["input_ids"])
    windows = ids[: arguments.window * arguments.windows].view(-1, arguments.window)
    rows = []
    for kv in KV_TYPES:
        perplexity, lost = measure(path, windows, kv)
        mean = torch.tensor(lost).mean().item()
        spread = torch.tensor(lost).std().item() / math.sqrt(len(lost))
        rows.append({"kv": kv, "perplexity": perplexity, "kl_mean": mean, "kl_stderr": spread})
        print(f"{kv:8} perplexity {perplexity:.4f}, divergence {mean:.6f} +- {spread:.6f} nats")
    scored = windows.numel() // 2
    result = {
        "model": "SmolLM2-135M-Instruct, weights in bfloat16",
        "text": "wiki.eval",
        "window": arguments.window,
        "stride": arguments.window,
        "scored_tokens": scored,
        "commit": commit(),
        "environment": environment(),
        "caches": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
