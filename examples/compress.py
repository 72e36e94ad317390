"""Compress a model to 3 bits and say what that cost: python compress.py MODEL OUT

MODEL is a Hugging Face directory, a hub id or a .gguf file. A run that was cut off goes on where it was; a checkpoint
that is there already is only measured, whatever it was made with.
"""

import argparse
from pathlib import Path

import torch

import fewbit
from fewbit.assets import fetch_text
from fewbit.checkpoint.artifact import Artifact
from fewbit.evaluate import evaluate_many
from fewbit.loading import load_any

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=float, default=3)
parser.add_argument("--calib", nargs="+", help="your own text: the nearer to your use, the better")
parser.add_argument("--calib-tokens", type=int, default=65536)
parser.add_argument("--text", help="held-out text to measure on")
parser.add_argument("--tokens", type=int, default=20480)
arguments = parser.parse_args()

options = fewbit.QuantizeOptions(bits=arguments.bits, calib_tokens=arguments.calib_tokens)
calibration = arguments.calib or [fetch_text("c4.calib"), fetch_text("wiki.calib")]
if not arguments.out.exists():
    fewbit.quantize(arguments.model, arguments.out, options, calibration)
made = Artifact.open(arguments.out).inspect()
print(f"{made['bytes'] / 1e6:.0f} MB, {made['bits_per_weight']['body']:.2f} bits per weight in the layers")

# float32, so that nothing but the weights differs.
full, tokenizer = load_any(arguments.model, torch.float32)
packed, _ = fewbit.load(arguments.out, torch.float32)
with open(arguments.text or fetch_text("wiki.eval"), encoding="utf-8") as file:
    text = file.read()
scores = evaluate_many({"full": full, "packed": packed}, tokenizer, text, reference=full, tokens=arguments.tokens)
for name, score in scores.items():
    print(f"{name:8} perplexity {score.perplexity:8.3f}   divergence {score.kl_mean:.3g}")
