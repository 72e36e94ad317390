"""The committed table of the GPU kernels' machine code holds what it must, and is what compiling gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = json.loads((ROOT / "benchmarks" / "results" / "gpu-static.json").read_text())
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
SHARED_LIMITS = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}  # KiB that a program may have
ROWS = [(name, arch, row) for name, found in REPORT["kernels"].items() for arch, row in found.items()]


def test_every_kernel_was_compiled_for_every_architecture():
    assert len(REPORT["kernels"]) >= 35
    for name, found in REPORT["kernels"].items():
        assert set(found) == set(ARCHITECTURES), name


@pytest.mark.parametrize(("name", "arch", "row"), ROWS, ids=[f"{name}, sm_{arch}" for name, arch, _ in ROWS])
def test_nothing_spills_shared_memory_fits_and_tensor_cores_are_used(name, arch, row):
    assert row["spill_instructions"] == 0
    assert row["stack_bytes"] == 0
    assert row["shared_bytes"] <= 1024 * SHARED_LIMITS[arch]
    products = row["tensor_core"]
    if name == "gemv, reduction":
        assert not products
    elif "16-bit" in name or "W4A16" in name or "inverse" in name or ("rotate" in name and "with h" not in name):
        assert any(operation.startswith(("HMMA", "HGMMA", "UTCHMMA")) for operation in products)
    else:
        assert any(operation.startswith(("IMMA", "IGMMA", "UTCIMMA")) for operation in products)


def test_a_fresh_compilation_gives_the_committed_table():
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fewbit[gpu]'")
    import triton

    if triton.__version__ != REPORT["triton"]:
        pytest.skip(f"the table was made by Triton {REPORT['triton']}, this is {triton.__version__}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_static.py"), "--print", "--arch", "90"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for name, found in json.loads(run.stdout)["kernels"].items():
        assert found["90"] == REPORT["kernels"][name]["90"], f"{name}: run python benchmarks/gpu_static.py"
