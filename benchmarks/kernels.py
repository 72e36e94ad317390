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
from typing import Any

import peers
import torch
from encode import commit

import fewbit
from fewbit.environment import cpu_name
from fewbit.formats import get_format
from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import cpu
from fewbit.ops.extension import load_native
from fewbit.ops.layouts import place

OUTPUT = Path(__file__).resolve().parent / "results" / "kernels.json"
SMALL = (640, 4096)  # 1 MB at 3 bits
GEMM = (8192, 2048)
GEMM_TOKENS = 512
ROTATE_TOKENS, ROTATE_COLS = 512, 4096
CODES = {"trellis": "trellis", "int4": "nibbles"}
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


def matrix(rows: int, cols: int, bits: int, kind: str = "trellis") -> dict[str, Any]:
    """Random codes, placed as a loaded model has them: the kernels' speed does not depend on what they are."""
    spec = get_format(kind).spec(rows, cols, bits)
    codes = torch.empty(-(-rows // 16), 2 * bits * cols, dtype=torch.uint8)
    codes.view(torch.int64).random_()
    codes, code = place(codes, bits, spec.group, CODES[kind])
    return {
        "codes": codes,
        "scales": torch.rand(rows, spec.groups).half(),
        "tensor_scale": torch.tensor([0.01]),
        "tables": load_tables(bits)[0],
        "bits": bits,
        "code": code,
    }


def product(weights: dict[str, Any], tokens: int, cols: int) -> Callable[[], None]:
    """The native product with inputs that are quantized already, as one call from Python."""
    native, rows = load_native(), weights["scales"].shape[0]
    group = cols // weights["scales"].shape[1]
    # As arrays of numpy, which a call takes faster than tensors: with 1 MB of weights that shows.
    found = cpu.rotate_quantize(torch.randn(tokens, cols), None, min(group & -group, 256), group)
    inputs = [tensor.numpy() for tensor in found]
    matrix_ = native.Matrix(
        weights["codes"],
        weights["scales"].view(torch.uint16),
        0.01,
        weights["tables"],
        None,
        cols,
        weights["bits"],
        weights["code"],
    )
    out = torch.empty(tokens, rows).numpy()
    return lambda: native.packed_linear(*inputs, matrix_, out)


def measure_few(rows: int, cols: int, bits: int, tokens: int, repeats: int, kind: str = "trellis") -> dict[str, object]:
    weights = matrix(rows, cols, bits, kind)
    found = rate(rows * cols / 1e9, repeats, product(weights, tokens, cols))
    stored = weights["codes"].numel() + 2 * weights["scales"].numel()
    return {
        "kernel": "product of few tokens",
        "format": kind,
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
        lambda: cpu.linear(x, **weights, signs=signs, bias=None, block=256),
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
    """Gigabytes per second of reading a buffer in huge pages, next to nothing done with what is read."""
    native = load_native()
    buffer = native.huge_bytes(megabytes << 20)
    buffer.fill(1)
    return rate(buffer.nbytes / 1e9, repeats, lambda: native.read_bytes(buffer))


def measure_call(repeats: int) -> dict[str, float]:
    """Millions of calls per second with a matrix so small that nothing but the call takes time."""
    return rate(1e-6, repeats, product(matrix(16, 256, 3), 1, 256))


def rows_of(isa: str, threads: int, large_rows: int, large_cols: int, repeats: int) -> list[dict[str, object]]:
    if isa == "amx":  # all but the products of many tokens is avx512's
        return [{"isa": isa, "threads": threads, **measure_many(repeats)}]
    found = [measure_rotation(kernel, dtype, repeats) for kernel in ROTATIONS for dtype in DTYPES]
    if isa == "portable":  # there for correctness, too slow for the rest
        found.append(measure_few(*SMALL, 3, 1, repeats))
    else:
        kinds = [("trellis", 2), ("trellis", 3), ("trellis", 4), ("int4", 4)]
        found += [measure_few(*SMALL, bits, tokens, repeats, kind) for kind, bits in kinds for tokens in FEW_TOKENS]
        found += [measure_few(large_rows, large_cols, bits, 1, repeats, kind) for kind, bits in kinds[1:]]
        found.append(measure_many(repeats))
    return [{"isa": isa, "threads": threads, **row} for row in found]


def pin(threads: int, cores: set[int]) -> None:
    """Keeps one thread, and the programs it starts, on one core."""
    if cores:
        os.sched_setaffinity(0, {max(cores)} if threads == 1 else cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", help="instruction sets; default: all of this machine")
    parser.add_argument("--large-rows", type=int, default=262144, help="rows of the matrix that no cache holds")
    parser.add_argument("--large-cols", type=int, default=16384, help="its columns; 1.6 GB at 3 bits by default")
    parser.add_argument("--peers", action="store_true", help="measure llama.cpp's kernels, too (builds them once)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if not args.peers and args.output.exists() and json.loads(args.output.read_text())["peers"]:
        parser.error(f"{args.output} has llama.cpp's kernels, too; give --peers or another --output")
    native = load_native()
    if native is None:
        raise SystemExit("kernels: the native extension is not built; there is nothing to measure")
    isas = args.isa or list(reversed(native.available_isas()))
    drivers = peers.drivers(isas) if args.peers else {}
    load = os.getloadavg()[0]
    torch.set_num_threads(1)  # torch's idle threads spin and would take the cores from the native ones
    native.set_num_threads(1)
    call = measure_call(args.repeats)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    reading, rows, peer_rows = {}, [], []
    for threads in args.threads:
        pin(threads, cores)
        native.set_num_threads(threads)
        reading[str(threads)] = measure_reading(1024, args.repeats)
        for isa in isas:
            native.select_isa(isa)
            for row in rows_of(isa, threads, args.large_rows, args.large_cols, args.repeats):
                rows.append(row)
                print(json.dumps(row), flush=True)
        for isa, driver in drivers.items():
            shapes = ((args.large_rows, args.large_cols), SMALL[1], (*GEMM, GEMM_TOKENS))
            for row in peers.measure(driver, threads, args.repeats, *shapes):
                peer_rows.append({"isa": isa, "threads": threads, **row})
                print(json.dumps(peer_rows[-1]), flush=True)
    report = {
        "benchmark": "kernels",
        "machine": {"cpu": cpu_name(), "cores": torch.multiprocessing.cpu_count(), "system": platform.system()},
        "versions": {"fewbit": fewbit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "peer_versions": {peers.PACKAGE: peers.VERSION} if peer_rows else {},
        "commit": commit(),
        "load_average_before": round(load, 2),
        "repeats": args.repeats,
        "read_gigabytes_per_second": reading,
        "call_microseconds": round(1 / call["median_per_cpu_second"], 2),
        "rows": rows,
        "peers": peer_rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
