"""Find the size that is good enough: python pick_bits.py MODEL DIRECTORY 90MB 110MB 130MB

Each size makes a checkpoint whose tensors have 2, 3 or 4 bits by how much each of them hurts the model's predictions.
Sensitivities are measured anew for each size.
"""

import argparse
from pathlib import Path

import torch

import fewbit
from fewbit.assets import fetch_text
from fewbit.console import parse_size
from fewbit.evaluate import evaluate_many
from fewbit.loading import load_any

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("directory", type=Path)
parser.add_argument("sizes", nargs="+")
parser.add_argument("--calib", nargs="+")
parser.add_argument("--calib-tokens", type=int, default=16384)
parser.add_argument("--text")
parser.add_argument("--tokens", type=int, default=8192)
arguments = parser.parse_args()

calibration = arguments.calib or [fetch_text("c4.calib"), fetch_text("wiki.calib")]
for size in arguments.sizes:
    # Without tuning: it improves all sizes alike, and the one that is chosen can be made again with it.
    options = fewbit.QuantizeOptions(target_bytes=parse_size(size), calib_tokens=arguments.calib_tokens, tune=False)
    if not (arguments.directory / size).exists():
        fewbit.quantize(arguments.model, arguments.directory / size, options, calibration)

full, tokenizer = load_any(arguments.model, torch.float32)
models = {size: fewbit.load(arguments.directory / size, torch.float32)[0] for size in arguments.sizes}
with open(arguments.text or fetch_text("wiki.eval"), encoding="utf-8") as file:
    text = file.read()
scores = evaluate_many(models, tokenizer, text, reference=full, tokens=arguments.tokens)
for size, score in scores.items():
    print(f"{size:>8}   divergence {score.kl_mean:.3g}   same top token {100 * score.top1_agreement:.1f} %")
