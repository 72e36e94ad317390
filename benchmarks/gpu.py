"""On a machine with an NVIDIA GPU: checks every kernel against the reference there, then times it.

Prints one line per kernel, shape and number of tokens, and writes `results/gpu-<card>.json`. A kernel that computes
something else than the reference stops the run before anything is timed. Times are medians of CUDA events around
replayed CUDA graphs, out of caches that a large write has emptied. Nobody has run this yet: see docs/gpu.md.
Usage: gpu.py [--tokens 1 8 64 512] [--tune]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import cpu, reference
from fewbit.ops.gpu_layouts import group_major, tile_tables

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))
ROUNDS, RANK = 30, 128
RESULTS = Path(__file__).parent / "results"
Arguments = tuple[Any, ...]


def trellis(rows: int, cols: int, bits: int, device: str) -> Arguments:
    codes = torch.randint(0, 256, (rows // 16, 2 * bits * cols), dtype=torch.uint8, device=device)
    scales = group_major(torch.rand(rows, cols // 256, device=device).half())
    return codes, scales, torch.full((1,), 0.01, device=device), tile_tables(load_tables(bits)[0]).to(device)


def int4(rows: int, cols: int, device: str) -> Arguments:
    codes = torch.randint(0, 256, (rows // 16, 8 * cols), dtype=torch.uint8, device=device)
    return (
        codes,
        group_major(torch.rand(rows, cols // 128, device=device).half()),
        torch.full((1,), 0.01, device=device),
    )


def calls(rows: int, cols: int, tokens: int, device: str) -> dict[str, tuple[str, Arguments]]:
    """Operators by what they are for, with arguments on the device."""
    x = torch.randn(tokens, cols, dtype=torch.bfloat16, device=device)
    signs = pack_signs(random_signs(cols, 0)).to(device)
    block = min(256, cols & -cols)
    found: dict[str, tuple[str, Arguments]] = {
        "rotate_quantize": ("rotate_quantize", (x, signs, block, 256)),
        "norm, rotate_quantize": ("rms_norm_rotate_quantize", (x, x[0].contiguous(), 1e-5, signs, block, 256)),
        "gate, rotate_quantize": ("gated_rotate_quantize", (x, x.clone(), "silu", signs, block, 256)),
    }
    for bits in (2, 3, 4):
        rest = (*trellis(rows, cols, bits, device), signs, None, bits, block, "tiles")
        found[f"trellis, {bits} bits"] = ("linear", (x, *rest))
        found[f"trellis, {bits} bits, inverse"] = ("linear_inverse", (x, *rest))
    for act_bits in (4, 8, 16):
        both = (*int4(RANK, cols, device), *int4(rows, cols + RANK, device))
        found[f"twin, W4A{act_bits}"] = ("twin_linear", (x, *both, signs, None, block, act_bits))
    return found


def check(name: str, operator: str, arguments: Arguments) -> None:
    """Raise `SystemExit` unless the device computes what the reference does (there, in plain torch)."""
    found = getattr(torch.ops.fewbit, operator)(*arguments)
    expected = getattr(reference, operator)(*arguments)
    if isinstance(found, torch.Tensor):
        found, expected = [found], [expected]
    for got, wanted in zip(found, expected, strict=True):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
        if not error < 0.01:
            raise SystemExit(f"{name}: differs from the reference by {error:.3g}")


def milliseconds(run: Callable[[], Any], flush: torch.Tensor) -> float:
    """The median over replays of a CUDA graph, caches emptied in between."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(ROUNDS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def tuned(name: str, call: Callable[[], Any], flush: torch.Tensor, tokens: int) -> dict[str, float]:
    """The same with every tile size that `triton_configs` lists for these tokens, by its fields."""
    from fewbit.ops import triton_configs

    found = {}
    kernel = "inverse" if "inverse" in name else "twin" if "twin" in name else "packed"
    tiers = triton_configs.CONFIGS[kernel]
    for config in triton_configs.candidates(kernel, tokens):
        triton_configs.CONFIGS[kernel] = ((1 << 31, (config,)),)
        try:
            found[str(config)] = milliseconds(call, flush)
        finally:
            triton_configs.CONFIGS[kernel] = tiers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 512])
    parser.add_argument("--tune", action="store_true", help="time every tile size, too")
    options = parser.parse_args()
    if "cuda" not in cpu.KERNEL_DEVICES:
        sys.exit("this needs an NVIDIA GPU, a CUDA build of torch and Triton: pip install 'fewbit[gpu]'")
    torch.manual_seed(0)
    for tokens in (5, 100, 300):  # a size of tile each
        for name, (operator, arguments) in calls(160, 1536, tokens, "cuda").items():
            check(name, operator, arguments)
            print(f"{name}, {tokens} tokens: as the reference", flush=True)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows_of_report = []
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda")
        for tokens in options.tokens:
            x = torch.randn(tokens, cols, dtype=torch.bfloat16, device="cuda")
            timed = {"bf16 matmul": milliseconds(lambda x=x, w=weight: x @ w.T, flush)}
            sizes: dict[str, dict[str, float]] = {}
            for name, (operator, arguments) in calls(rows, cols, tokens, "cuda").items():
                call = lambda o=operator, a=arguments: getattr(torch.ops.fewbit, o)(*a)  # noqa: E731
                timed[name] = milliseconds(call, flush)
                if options.tune and "rotate" not in name:
                    sizes[name] = tuned(name, call, flush, tokens)
            for name, time in timed.items():
                print(f"{rows} x {cols}, {tokens} tokens, {name}: {time:.4f} ms", flush=True)
            shape = {"rows": rows, "cols": cols, "tokens": tokens}
            rows_of_report.append({**shape, "milliseconds": timed, "tile_sizes": sizes})
    card = torch.cuda.get_device_name()
    report = {"card": card, "torch": torch.__version__, "rows": rows_of_report}
    path = RESULTS / f"gpu-{card.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
