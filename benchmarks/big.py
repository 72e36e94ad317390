"""Compresses a synthetic checkpoint of an 8B model's shape without calibration and measures memory and time.

The weights are random bfloat16 in shards as such models have them; a process of its own compresses them, and its
peak is compared with twice the largest decoder layer in float32 plus 1 GB. The files are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from encode import commit
from transformers import LlamaConfig

from fewbit.checkpoint.plain import write_plain
from fewbit.environment import environment

OUTPUT = Path(__file__).resolve().parent / "results" / "big.json"
SHARD_BYTES = 5 << 30
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
COMMAND = "from fewbit.cli import main; main()"


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer by their names in it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = config.num_key_value_heads * hidden // config.num_attention_heads
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def tensors(config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors, each of its own random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        # Several times faster than normal numbers, and as hard to compress: a rotation makes both alike.
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)

    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", random(*table)
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes(config).items():
            yield f"model.layers.{layer}.{name}", random(*shape)
    yield "model.norm.weight", random(config.hidden_size)
    yield "lm_head.weight", random(*table)


def layer_bytes(config: LlamaConfig) -> int:
    """Bytes of a decoder layer's weights in float32."""
    return sum(4 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes(config).values())


def fewbit(*arguments: str) -> dict[str, Any]:
    """What a command says with `--json`."""
    command = [sys.executable, "-c", COMMAND, *arguments, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def measure(config: LlamaConfig, directory: Path, arguments: list[str]) -> dict[str, Any]:
    """Write the model, compress it, and compare the peak with the bound."""
    model = directory / "model"
    write_plain(model, config, tensors(config), torch.bfloat16, SHARD_BYTES)
    source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    found = fewbit("quantize", str(model), str(directory / "out"), "--rounding", "nearest", *arguments)
    bound = 2 * layer_bytes(config) + 10**9
    peak = found["peak_memory_bytes"]
    weights = round(8 * found["bytes"] / found["bits_per_weight"]["total"])
    return {
        "layers": config.num_hidden_layers,
        "weights": weights,
        "source_bytes": source,
        "bytes": found["bytes"],
        "bits_per_weight": found["bits_per_weight"],
        "seconds": found["seconds"],
        "million_weights_per_second": round(weights / found["seconds"] / 1e6, 3),
        "peak_memory_bytes": peak,
        "bound_bytes": bound,
        "within_bound": peak <= bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--directory", type=Path, help="where the files go; 30 GB for 32 layers. Default: a new one")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("arguments", nargs="*", help="after --: further options of fewbit quantize")
    args = parser.parse_args()
    config = LlamaConfig(**SHAPE, num_hidden_layers=args.layers, tie_word_embeddings=False)
    directory = Path(tempfile.mkdtemp(prefix="fewbit-big-", dir=args.directory))
    load = os.getloadavg()[0]
    try:
        row = measure(config, directory, args.arguments)
    finally:
        shutil.rmtree(directory)
    report = {
        "benchmark": "big",
        "environment": environment(),
        "commit": commit(),
        "load_average_before": round(load, 2),
        "options": ["--rounding", "nearest", *args.arguments],
        **row,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
