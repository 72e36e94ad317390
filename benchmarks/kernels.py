"""Measures the kernels of inference: quantizing inputs, products with one to eight tokens, products with many.

Beside them it measures how fast the same process reads memory. Rates are medians, per second of wall clock
and per second of processor time; the latter says something on a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from encode import commit

import fewbit
from fewbit.environment import cpu_name
from fewbit.formats import get_format
from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import cpu
from fewbit.ops.extension import load_native

OUTPUT = Path(__file__).resolve().parent / "results" / "kernels.json"
SMALL = (640, 4096)  # 1 MB at 3 bits
GEMM = (8192, 2048)
GEMM_TOKENS = 512
ROTATE_TOKENS, ROTATE_COLS = 512, 4096
ROTATIONS = ("rotate_quantize", "rms_norm_rotate_quantize", "silu_rotate_quantize", "gelu_rotate_quantize")
DTYPES = (torch.float32, torch.bfloat16)
FEW_TOKENS = (1, 2, 4, 8)
TARGET_SECONDS = 0.05  # of one repeat


def rate(amount: float, repeats: int, work: Callable[[], object]) -> dict[str, float]:
    """`amount` per second: median of wall clock, its deviation, and the median per second of processor time."""
    start = time.perf_counter()
    work()
    calls = max(1, int(TARGET_SECONDS / (time.perf_counter() - start)))
    walls, cpus = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        for _ in range(calls):
            work()
        cpus.append(amount * calls / (time.process_time() - used))
        walls.append(amount * calls / (time.perf_counter() - start))
    return {
        "median": float(f"{statistics.median(walls):.5g}"),
        "stdev": float(f"{statistics.pstdev(walls):.3g}"),
        "median_per_cpu_second": float(f"{statistics.median(cpus):.5g}"),
    }


def matrix(rows: int, cols: int, bits: int) -> dict[str, torch.Tensor]:
    """Random codes: the kernels' speed does not depend on them."""
    spec = get_format("trellis").spec(rows, cols, bits)
    codes = torch.empty(-(-rows // 16), 2 * bits * cols, dtype=torch.uint8)
    codes.view(torch.int64).random_()
    return {
        "codes": codes,
        "scales": torch.rand(rows, spec.groups).half(),
        "tensor_scale": torch.tensor([0.01]),
        "tables": load_tables(bits)[0],
    }


def product(weights: dict[str, torch.Tensor], tokens: int, cols: int, bits: int) -> Callable[[], torch.Tensor]:
    """The product with inputs that are quantized already."""
    group = cols // weights["scales"].shape[1]
    inputs = cpu.rotate_quantize(
        torch.randn(tokens, cols), None, get_format("trellis").spec(1, cols, bits).block, group
    )
    return lambda: cpu.trellis_linear(*inputs, **weights, bias=None, bits=bits, dtype=torch.bfloat16)


def measure_few(rows: int, cols: int, bits: int, tokens: int, repeats: int) -> dict[str, object]:
    weights = matrix(rows, cols, bits)
    found = rate(rows * cols / 1e9, repeats, product(weights, tokens, cols, bits))
    stored = weights["codes"].numel() + 2 * weights["scales"].numel()
    return {
        "kernel": "product of few tokens",
        "rows": rows,
        "cols": cols,
        "bits": bits,
        "tokens": tokens,
        "megabytes": round(stored / 1e6, 1),
        "billion_weights_per_second": found,
        "gigabytes_per_second": round(found["median"] * stored / (rows * cols), 3),
    }


def measure_many(repeats: int) -> dict[str, object]:
    """A whole linear layer, rotation and quantization of the inputs included."""
    rows, cols = GEMM
    weights, signs = matrix(rows, cols, 3), pack_signs(random_signs(cols, 0))
    x = torch.randn(GEMM_TOKENS, cols).bfloat16()
    found = rate(
        2 * GEMM_TOKENS * rows * cols / 1e12,
        repeats,
        lambda: cpu.linear(x, **weights, signs=signs, bias=None, bits=3, block=256),
    )
    shape = {"rows": rows, "cols": cols, "bits": 3, "tokens": GEMM_TOKENS}
    return {"kernel": "linear of many tokens", **shape, "tera_operations_per_second": found}


def measure_rotation(kernel: str, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Quantizing inputs: alone, after an RMSNorm, and after a gated activation."""
    x, up = (torch.randn(ROTATE_TOKENS, ROTATE_COLS).to(dtype) for _ in range(2))
    weight, rotation = torch.rand(ROTATE_COLS), (pack_signs(random_signs(ROTATE_COLS, 0)), 256, 256)
    calls = {
        "rotate_quantize": lambda: cpu.rotate_quantize(x, *rotation),
        "rms_norm_rotate_quantize": lambda: cpu.rms_norm_rotate_quantize(x, weight, 1e-5, *rotation),
        "silu_rotate_quantize": lambda: cpu.gated_rotate_quantize(x, up, "silu", *rotation),
        "gelu_rotate_quantize": lambda: cpu.gated_rotate_quantize(x, up, "gelu_tanh", *rotation),
    }
    found = rate(ROTATE_TOKENS / 1e6, repeats, calls[kernel])
    return {
        "kernel": kernel,
        "cols": ROTATE_COLS,
        "tokens": ROTATE_TOKENS,
        "dtype": str(dtype).removeprefix("torch."),
        "microseconds_per_token": round(1 / found["median"], 3),
        "cpu_microseconds_per_token": round(1 / found["median_per_cpu_second"], 3),
        "million_tokens_per_second": found,
    }


def measure_reading(megabytes: int, repeats: int) -> dict[str, float]:
    """Gigabytes per second of summing a buffer of 64-bit integers in torch, on as many threads as torch has."""
    buffer = torch.ones(megabytes << 17, dtype=torch.int64)
    return rate(buffer.numel() * 8 / 1e9, repeats, buffer.sum)


def rows_of(isa: str, threads: int, large_rows: int, large_cols: int, repeats: int) -> list[dict[str, object]]:
    found = [measure_rotation(kernel, dtype, repeats) for kernel in ROTATIONS for dtype in DTYPES]
    if isa == "portable":  # there for correctness, too slow for the rest
        found.append(measure_few(*SMALL, 3, 1, repeats))
    else:
        found += [measure_few(*SMALL, bits, tokens, repeats) for bits in (2, 3, 4) for tokens in FEW_TOKENS]
        found.append(measure_few(large_rows, large_cols, 3, 1, repeats))
        found.append(measure_many(repeats))
    return [{"isa": isa, "threads": threads, **row} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", help="instruction sets; default: all of this machine")
    parser.add_argument("--large-rows", type=int, default=262144, help="rows of the matrix that no cache holds")
    parser.add_argument("--large-cols", type=int, default=16384, help="its columns; 1.6 GB at 3 bits by default")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    native = load_native()
    if native is None:
        raise SystemExit("kernels: the native extension is not built; there is nothing to measure")
    load = os.getloadavg()[0]
    reading, rows = {}, []
    for threads in args.threads:
        torch.set_num_threads(threads)
        reading[str(threads)] = measure_reading(1024, args.repeats)
        torch.set_num_threads(1)  # torch's idle threads spin and would take the cores from the native ones
        native.set_num_threads(threads)
        for isa in args.isa or reversed(native.available_isas()):
            native.select_isa(isa)
            for row in rows_of(isa, threads, args.large_rows, args.large_cols, args.repeats):
                rows.append(row)
                print(json.dumps(row), flush=True)
    report = {
        "benchmark": "kernels",
        "machine": {"cpu": cpu_name(), "cores": torch.multiprocessing.cpu_count(), "system": platform.system()},
        "versions": {"fewbit": fewbit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "load_average_before": round(load, 2),
        "repeats": args.repeats,
        "read_gigabytes_per_second": reading,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
