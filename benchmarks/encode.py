"""Measures how many weights per second the trellis encoder and decoder handle, for every instruction set.

Writes one JSON with medians and deviations, the machine, the versions and the commit. The pure-torch rows use
a small sample, since that path exists for correctness and not for speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fewbit
from fewbit.environment import cpu_name
from fewbit.formats import get_format, trellis
from fewbit.ops.extension import load_native

OUTPUT = Path(__file__).resolve().parent / "results" / "encode.json"
GROUP = 256
DECODE_COLS = 2048


def commit() -> str | None:
    """The checked-out commit, or None outside a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def rate(weights: int, repeats: int, work: Callable[[], object]) -> dict[str, float]:
    """Median, least, most and standard deviation of millions of weights per second over `repeats` runs.

    `median_per_cpu_second` divides by the processor time of all threads instead: unlike the others it says
    something on a machine that is busy with other work.
    """
    work()
    found, per_cpu = [], []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        per_cpu.append(weights / (time.process_time() - cpu) / 1e6)
        found.append(weights / (time.perf_counter() - start) / 1e6)
    spread = statistics.stdev(found) if repeats > 1 else 0.0
    return {
        "median": round(statistics.median(found), 4),
        "min": round(min(found), 4),
        "max": round(max(found), 4),
        "stdev": round(spread, 4),
        "median_per_cpu_second": round(statistics.median(per_cpu), 4),
    }


def measure(bits: int, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """Rates of encoding a group without and with error feedback, and of decoding a matrix."""
    form = get_format("trellis")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, GROUP, generator=generator) * 0.02
    factor = torch.eye(GROUP) + torch.triu(torch.randn(GROUP, GROUP, generator=generator) * 0.02, 1)
    spec = form.spec(rows, GROUP, bits)
    scale = form.tensor_scale(weight, spec)
    wide = form.spec(rows, DECODE_COLS, bits)
    encoded = form.encode_group(weight, spec, scale, None)
    parts = form.assemble([encoded] * wide.groups, wide, scale)
    return {
        "encode": rate(weight.numel(), repeats, lambda: form.encode_group(weight, spec, scale, None)),
        "encode_with_feedback": rate(weight.numel(), repeats, lambda: form.encode_group(weight, spec, scale, factor)),
        "dequantize": rate(rows * DECODE_COLS, repeats, lambda: form.dequantize(parts, wide)),
    }


def measure_torch(bits: int, repeats: int) -> dict[str, dict[str, float]]:
    """The same with the native extension out of sight."""
    found = trellis.load_native
    trellis.load_native = lambda: None  # type: ignore[assignment]
    try:
        return measure(bits, 64, repeats)
    finally:
        trellis.load_native = found


def native_rows(rows: int, repeats: int) -> list[dict[str, object]]:
    native = load_native()
    if native is None:
        return []
    found: list[dict[str, object]] = []
    for isa in reversed(native.available_isas()):
        native.select_isa(isa)
        for threads in (1, 2):
            native.set_num_threads(threads)
            for bits in (2, 3, 4):
                share = 16 if isa == "portable" else 1
                entry = {"isa": isa, "bits": bits, "threads": threads, "rows": rows // share}
                found.append({**entry, "million_weights_per_second": measure(bits, rows // share, repeats)})
                print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the matrix; 256 columns are encoded")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)  # torch's idle threads spin and would take the cores from the native ones
    rows = native_rows(args.rows, args.repeats)
    for bits in (2, 3, 4):
        entry = {"isa": "torch", "bits": bits, "threads": 1, "rows": 64}
        rows.append({**entry, "million_weights_per_second": measure_torch(bits, 3)})
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "benchmark": "encode",
        "machine": {"cpu": cpu_name(), "cores": torch.multiprocessing.cpu_count(), "system": platform.system()},
        "versions": {"fewbit": fewbit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "load_average_before": round(load, 2),
        "group": GROUP,
        "repeats": args.repeats,
        "torch_repeats": 3,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
