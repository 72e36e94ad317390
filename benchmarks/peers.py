"""Measures llama.cpp's CPU kernels: matrix products with one token and with many, from memory and from cache.

Its sources come out of a Python package whose archive is fetched and unpacked into the cache directory. ggml's
CPU backend is compiled there, once for this processor and once for AVX2 alone, with the driver in `peers/`.
`kernels.py --peers` measures both in one run with fewbit's kernels; this script alone measures one product.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from fewbit.assets import default_cache_dir
from fewbit.environment import cpu_name

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
ARCHIVE = f"llama_cpp_python-{VERSION}"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA = f"{ARCHIVE}/vendor/llama.cpp"
DRIVER = Path(__file__).resolve().parent / "peers"
BUILDS = {
    "avx512": {"GGML_NATIVE": "ON"},  # AMX is off in every build, see peers/CMakeLists.txt
    "avx2": {
        "GGML_NATIVE": "OFF",
        "GGML_AVX2": "ON",
        "GGML_BMI2": "ON",
        "GGML_FMA": "ON",
        "GGML_F16C": "ON",
        "GGML_AVX512": "OFF",
    },
}
TYPES = ("Q4_0", "Q4_K", "Q3_K", "IQ3_S", "IQ3_XXS", "Q8_0")
REPACKED = ("Q4_0", "Q4_K")  # what ggml has interleaved kernels for on AVX2 and AVX-512
SMALL_BYTES = 1 << 20
GEMV_UNIT, GEMM_UNIT = "billion_weights_per_second", "tera_operations_per_second"


def run(command: list[str], what: str) -> str:
    """The output of a tool; its last words end the benchmark if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()[-20:]
        raise SystemExit(f"peers: could not {what}:\n" + "\n".join(words))
    return done.stdout


def fetch(cache: Path) -> Path:
    """The directory of llama.cpp's sources, downloaded on first use. Nothing of the package is built or run."""
    target = cache / LLAMA
    if (target / "CMakeLists.txt").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        pip += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", scratch]
        run([*pip, f"{PACKAGE}=={VERSION}"], f"fetch {PACKAGE}")
        archive = Path(scratch) / f"{ARCHIVE}.tar.gz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"peers: {archive.name}: sha256 {found} instead of {SHA256}; it is not the one expected")
        with tarfile.open(archive) as tree:
            wanted = [member for member in tree if member.name.startswith(f"{LLAMA}/")]
            tree.extractall(scratch, wanted, filter="data")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The sources have their final name only once they are complete.
        os.replace(Path(scratch) / LLAMA, target)
    return target


def build(isa: str) -> Path:
    """The driver linked with ggml for one instruction set."""
    return build_target("vec_dot", f"build-{isa}", BUILDS[isa]) / "vec_dot"


def build_target(target: str, prefix: str, options: dict[str, str]) -> Path:
    """The directory where `target` is built with ggml; what is built already for this processor is kept."""
    cache = default_cache_dir() / "peers"
    settings = {"CMAKE_BUILD_TYPE": "Release", "GGML_SOURCE": str(fetch(cache) / "ggml"), **options}
    return cmake_build(DRIVER, cache, prefix, settings, [target])


def cmake_build(source: Path, cache: Path, prefix: str, settings: dict[str, str], targets: list[str]) -> Path:
    """The directory where `targets` are built; what is built already for this processor is kept."""
    key = hashlib.sha256(json.dumps([cpu_name(), str(source), settings]).encode()).hexdigest()[:8]
    directory = cache / f"{prefix}-{key}"
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None:
        raise SystemExit("peers: cmake is not installed; make venv installs it")
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    run([cmake, "-S", str(source), "-B", str(directory), *defines], "configure ggml")
    jobs = str(min(2, os.cpu_count() or 1))
    run([cmake, "--build", str(directory), "--target", *targets, "--parallel", jobs], "build ggml")
    return directory


def drivers(isas: Iterable[str]) -> dict[str, Path]:
    """A driver for each of the instruction sets that llama.cpp is compared on."""
    return {isa: build(isa) for isa in isas if isa in BUILDS}


def summary(amount: float, seconds: dict[str, Any]) -> dict[str, float]:
    """`amount` per second as the other kernels report it: medians by the wall clock and by processor time."""
    walls = [amount * seconds["calls"] / wall for wall in seconds["wall_seconds"]]
    cpus = [amount * seconds["calls"] / cpu for cpu in seconds["cpu_seconds"]]
    return {
        "median": float(f"{statistics.median(walls):.5g}"),
        "stdev": float(f"{statistics.pstdev(walls):.3g}"),
        "median_per_cpu_second": float(f"{statistics.median(cpus):.5g}"),
    }


def products(
    driver: Path, kind: str, rows: int, cols: int, tokens: int, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """One row for each way in which ggml multiplies a matrix of this type."""
    plain = ["vec_dot", "mul_mat"] if tokens == threads == 1 else ["mul_mat"]
    found = []
    for paths in [plain, ["repacked"]] if kind in REPACKED else [plain]:
        numbers = [str(number) for number in (rows, cols, tokens, threads, repeats)]
        report = json.loads(run([str(driver), kind, *numbers, *paths], f"measure {kind}"))
        for path, seconds in report["times"].items():
            shape = {"rows": rows, "cols": cols, "tokens": tokens}
            size = {
                "megabytes": round(report["bytes"] / 1e6, 1),
                "bits_per_weight": round(8 * report["bytes"] / (rows * cols), 4),
            }
            if tokens == 1:
                speed = {GEMV_UNIT: summary(rows * cols / 1e9, seconds)}
            else:
                speed = {GEMM_UNIT: summary(2 * tokens * rows * cols / 1e12, seconds)}
            found.append({"type": kind, "path": path, **shape, **size, **speed, "build": " ".join(report["features"])})
    return found


def measure(
    driver: Path, threads: int, repeats: int, large: tuple[int, int], small_cols: int, many: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    """Rows of every type: from memory, shape `large`; from cache, 1 MB; and (rows, cols, tokens) `many`."""
    for kind in TYPES:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        small_rows = SMALL_BYTES // (small_cols // block * size) // 8 * 8  # interleaving takes 8 rows together
        for shape in ((*large, 1), (small_rows, small_cols, 1), many):
            for row in products(driver, kind, *shape, threads, repeats):
                yield {"peer": "llama.cpp", **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", default=TYPES, help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--isa", choices=BUILDS, default="avx2")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    driver = build(args.isa)
    shape = (args.rows, args.cols, args.tokens, args.threads, args.repeats)
    rows = [{"isa": args.isa, **row} for kind in args.types for row in products(driver, kind, *shape)]
    print(json.dumps({"versions": {PACKAGE: VERSION}, "build": BUILDS[args.isa], "peers": rows}, indent=1))


if __name__ == "__main__":
    main()
