"""The native kernels: every instruction set, every number of threads and pure torch agree bit for bit."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from fewbit.formats import get_format, trellis
from fewbit.math.rounding import inverse_factor, quantize_rotated
from fewbit.ops.extension import load_native

native = load_native()
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")
FORMAT = get_format("trellis")
ROWS, COLS = 37, 192

# Quantizes and decodes in a fresh interpreter; argv: number of threads (0: leave), "missing" to hide the extension.
SCRIPT = """
import hashlib, sys, warnings
if "missing" in sys.argv: sys.modules["fewbit._native"] = None
import torch
from fewbit.formats import get_format
from fewbit.math.rounding import quantize_rotated
from fewbit.ops.extension import load_native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    native = load_native()
    torch.set_num_threads(1)
    if int(sys.argv[1]): native.set_num_threads(int(sys.argv[1]))
    fmt, state = get_format("trellis"), hashlib.sha256()
    for bits in (2, 3, 4):
        spec = fmt.spec(20, 64, bits)
        weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(bits))
        factor = torch.eye(64) + 0.02 * torch.triu(
            torch.randn(64, 64, generator=torch.Generator().manual_seed(9)), 1)
        for use in (None, factor):
            done = fmt.encode_group(weight, spec, 0.001, use)
            parts = fmt.assemble([done], spec, 0.001)
            for tensor in (parts["codes"], parts["scales"], done.values, fmt.dequantize(parts, spec)):
                state.update(tensor.contiguous().numpy().tobytes())
            if use is not None: state.update(done.error.numpy().tobytes())
print(state.hexdigest(), native.isa() if native else "torch", sum("native extension" in str(w.message) for w in caught))
"""


def _run(isa: str | None = None, threads: int = 0, *flags: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "FEWBIT_ISA"}
    if isa:
        environment["FEWBIT_ISA"] = isa
    command = [sys.executable, "-c", SCRIPT, str(threads), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def reference() -> str:
    """The digest that pure torch computes; also proves that a missing extension warns exactly once."""
    result = _run(None, 0, "missing")
    assert result.returncode == 0, result.stderr
    digest, backend, warnings = result.stdout.split()
    assert (backend, warnings) == ("torch", "1")
    return digest


@needs_native
@pytest.mark.parametrize("isa", [*native.available_isas(), *native.emulated_isas()] if native else [])
def test_every_instruction_set_gives_the_results_of_pure_torch(isa, reference):
    result = _run(isa)
    assert result.stdout.split() == [reference, isa, "0"], result.stderr


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads, reference):
    result = _run(None, threads)
    assert result.stdout.split()[:1] == [reference], result.stderr


@needs_native
def test_an_unknown_instruction_set_is_refused_with_the_ones_there_are():
    result = _run("sse9")
    assert result.returncode != 0
    assert "FEWBIT_ISA=sse9" in result.stderr
    assert "portable" in result.stderr


@needs_native
def test_the_default_is_the_widest_instruction_set():
    assert native.available_isas()[0] == "portable"
    assert native.isa() == (os.environ.get("FEWBIT_ISA") or native.available_isas()[-1])


@needs_native
def test_emulated_instruction_sets_are_listed_apart_and_taken_only_when_asked_for():
    assert not set(native.emulated_isas()) & set(native.available_isas())
    assert "emulated" not in _run(None).stdout
    for name in native.emulated_isas():
        assert name.endswith("-emulated")
        assert _run(name).stdout.split()[1] == name


@needs_native
def test_a_forked_child_gets_threads_of_its_own():
    script = (
        "import os, torch, hashlib\n"
        "from fewbit.formats import get_format, trellis\n"
        "n = trellis.load_native(); n.set_num_threads(3)\n"
        "tables = trellis.load_tables(3)[0]\n"
        "def work():\n"
        "    out = torch.empty(64, 64)\n"
        "    n.trellis_dequantize(torch.full((4, 384), 77, dtype=torch.uint8), torch.ones(64, 1), tables, 3, 64, out)\n"
        "    return out.sum().item()\n"
        "before = work(); child = os.fork()\n"
        "if child == 0: os._exit(0 if work() == before else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), work() == before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["0", "True"], result.stderr


@needs_native
def test_threads_can_be_set_and_nonsense_is_refused():
    before = native.num_threads()
    native.set_num_threads(3)
    assert native.num_threads() == 3
    native.set_num_threads(before)
    with pytest.raises(ValueError, match="1 to 4096"):
        native.set_num_threads(0)


def _decode_arguments() -> dict:
    return {
        "codes": torch.zeros(3, 2 * 3 * COLS, dtype=torch.uint8),
        "scales": torch.ones(ROWS, 1),
        "tables": trellis.load_tables(3)[0],
        "bits": 3,
        "group": COLS,
        "out": torch.empty(ROWS, COLS),
    }


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "2, 3 or 4 bits, not 5"),
        ({"group": 24}, "multiple of 16 up to 256 columns, not 24"),
        ({"group": 128}, "not a multiple of the group 128"),
        ({"codes": torch.zeros(2, 2 * 3 * COLS, dtype=torch.uint8)}, r"codes must be \[3, 1152\], not \[2, 1152\]"),
        ({"scales": torch.ones(ROWS, 2)}, r"scales must be \[37, 1\]"),
        ({"tables": torch.zeros(39, dtype=torch.int8)}, "tables must have 40 entries, not 39"),
        ({"tables": torch.full((40,), 100, dtype=torch.int8)}, r"within \+-127"),
    ],
)
def test_wrong_shapes_raise_value_errors_that_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        native.trellis_dequantize(**{**_decode_arguments(), **change})


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(3, 2 * 3 * COLS, dtype=torch.int32)},
        {"scales": torch.ones(1, ROWS).double().t()},
        {"out": torch.empty(COLS, ROWS).t()},
        {"out": torch.empty(ROWS * COLS)},
    ],
)
def test_wrong_dtypes_strides_and_dimensions_raise_type_errors(change):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.trellis_dequantize(**{**_decode_arguments(), **change})


@needs_native
@pytest.mark.parametrize("cols", [0, -1, 1 << 40, (1 << 63) - 1])
def test_matrices_of_absurd_widths_are_refused(cols):
    codes, scales = torch.zeros(1, 384, dtype=torch.uint8), torch.zeros(16, 1, dtype=torch.uint16)
    with pytest.raises(ValueError, match="from 1 to 2147483648 columns"):
        native.Matrix(codes, scales, 1.0, trellis.load_tables(3)[0], None, cols, 3, "trellis")


@needs_native
def test_a_factor_without_its_outputs_is_refused():
    weight, ones = torch.zeros(16, 64), torch.ones(16)
    codes, values = torch.zeros(1, 384, dtype=torch.uint8), torch.zeros(16, 64)
    tables = trellis.load_tables(3)[0]
    with pytest.raises(ValueError, match="given together"):
        native.trellis_encode_group(weight, ones, ones, tables, 3, torch.eye(64), codes, values, None, None)


@needs_native
def test_calls_from_many_python_threads_at_once_agree():
    from concurrent.futures import ThreadPoolExecutor

    spec = FORMAT.spec(48, 64, 3)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: FORMAT.encode_group(weight, spec, 0.001, None).parts["codes"], range(8)))
    assert all(torch.equal(codes, found[0]) for codes in found)


def test_hessian_factors_of_the_pipeline_encode_alike_in_torch_and_natively(monkeypatch):
    mixing = torch.randn(128, 64, generator=torch.Generator().manual_seed(5))
    factor = inverse_factor(mixing.t() @ mixing)
    spec = FORMAT.spec(17, 64, 3)
    weight = torch.randn(17, 64, generator=torch.Generator().manual_seed(6))
    here = quantize_rotated(FORMAT, weight, spec, factor)
    monkeypatch.setattr(trellis, "load_native", lambda: None)
    plain = quantize_rotated(FORMAT, weight, spec, factor)
    assert hashlib.sha256(here.parts["codes"].numpy()).digest() == hashlib.sha256(plain.parts["codes"].numpy()).digest()
    assert torch.equal(here.values, plain.values)
