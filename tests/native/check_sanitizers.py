"""That the sanitizers of `make test-sanitize` are awake: the right extension is loaded, and planted errors end it.

pytest runs this file where it is named, as scripts/test_sanitize.sh does before everything else.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.ops.extension import load_native

ROOT = Path(__file__).resolve().parents[2]
native = load_native()

# The errors are planted from outside: views that claim more memory than there is, or that begin where no float can.
SCRIPT = """
import sys
import numpy as np
import torch
from fewbit.formats.trellis import load_tables
from fewbit.ops.extension import load_native
native, tables = load_native(), load_tables(3)[0]
native.set_num_threads(1)

def longer(array, rows):
    return np.lib.stride_tricks.as_strided(array, (rows, array.shape[1]))

def dequantize(scales):
    native.trellis_dequantize(np.zeros((2, 6 * 64), np.uint8), scales, tables, 3, 64, np.empty((32, 64), np.float32))

def product(tokens, q, codes):
    matrix = native.Matrix(longer(codes.numpy(), 3), torch.zeros(48, 2, dtype=torch.uint16), 1.0, tables, None, 192, 3,
                           "trellis")
    native.packed_linear(longer(q.numpy(), tokens), torch.zeros(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32),
                         matrix, torch.empty(tokens, 48))

def memory_of_numpy():
    dequantize(longer(np.ones((31, 1), np.float32), 32))

def memory_of_torch():
    dequantize(longer(torch.ones(31, 1).numpy(), 32))

def inputs():
    product(2, torch.zeros(1, 192, dtype=torch.int8), torch.zeros(3, 6 * 192, dtype=torch.uint8))

def codes():
    product(20, torch.zeros(20, 192, dtype=torch.int8), torch.zeros(1, 6 * 192, dtype=torch.uint8))

def output():
    native.rotate_quantize(torch.ones(2, 64), None, 64, 64, 8, longer(torch.empty(1, 64, dtype=torch.int8).numpy(), 2),
                           torch.empty(2, 1), torch.empty(2, 1, dtype=torch.int32))

def misaligned():
    dequantize(np.frombuffer(bytearray(4 * 32 + 1), np.float32, 32, 1).reshape(32, 1))

globals()[sys.argv[1]]()
print("survived")
"""


def _report(error: str) -> str:
    """What the sanitizers say about a planted error."""
    environment = {**os.environ, "ASAN_OPTIONS": os.environ["ASAN_OPTIONS"] + ":log_path=stderr"}
    command = [sys.executable, "-c", SCRIPT, error]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "survived" not in result.stdout
    assert "src/fewbit/native/" in result.stderr
    return result.stderr


def test_the_extension_is_the_sanitized_one():
    path = Path(native.__file__)
    assert path.parent == ROOT / "build" / "sanitize" / "package" / "fewbit"
    content = path.read_bytes()
    assert b"__asan_report_load" in content
    assert b"__ubsan_handle_" in content


@pytest.mark.parametrize("error", ["memory_of_numpy", "memory_of_torch", "inputs", "codes"])
def test_reading_behind_an_array_ends_the_process_and_names_the_place(error):
    report = _report(error)
    assert "AddressSanitizer: " in report
    assert "READ of size" in report


def test_writing_behind_an_array_ends_the_process_and_names_the_place():
    report = _report("output")
    assert "AddressSanitizer: " in report
    assert "WRITE of size" in report


def test_undefined_behaviour_ends_the_process_and_names_the_place():
    assert "runtime error: load of misaligned address" in _report("misaligned")
