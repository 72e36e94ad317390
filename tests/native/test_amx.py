"""The compiled AMX kernel, instruction by instruction, also on machines that have no AMX."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fewbit.ops.extension import load_native

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src" / "fewbit" / "native"
VECTORS = ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-mprefer-vector-width=512", "-DFEWBIT_HAVE_AVX512"]

native = load_native()
compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(
    native is None or not native.emulated_isas() or compiler is None or platform.system() != "Linux",
    reason="needs AVX-512, Linux, and a compiler that knows AMX",
)
def test_the_compiled_tile_instructions_compute_what_the_portable_kernel_does(tmp_path):
    vectors = [f"-m{name}" for name in VECTORS]
    common = [compiler, *FLAGS, "-DFEWBIT_HAVE_AMX", f"-I{SOURCE}"]
    units = {
        SOURCE / "product_amx.cpp": [*vectors, "-mamx-tile", "-mamx-int8"],
        SOURCE / "product_portable.cpp": [],
        HERE / "amx_traps.cpp": [],
    }
    objects = [tmp_path / f"{unit.stem}.o" for unit in units]
    for (unit, flags), made in zip(units.items(), objects, strict=True):
        subprocess.run([*common, *flags, "-c", unit, "-o", made], check=True)
    program = tmp_path / "amx_traps"
    subprocess.run([compiler, *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("99 products equal")
