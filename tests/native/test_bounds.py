"""No kernel touches a byte outside its arrays: every argument lies against a page that cannot be read.

AddressSanitizer (`make test-sanitize`) sees inner mistakes too, but neither masked loads nor inline assembly.
"""

import os
import signal
import subprocess
import sys

import pytest

from fewbit.ops.extension import load_native

native = load_native()
pytestmark = [
    pytest.mark.skipif(native is None, reason="the native extension is not built"),
    pytest.mark.skipif(os.name != "posix", reason="pages are protected by mprotect"),
]

# Calls every operator in a fresh interpreter and prints a digest of the results. argv: whether arrays "begin" or "end"
# at a protected page, or "leave", which claims a row of codes that is not there.
SCRIPT = """
import ctypes, hashlib, mmap, resource, sys
import numpy as np
from fewbit.formats.trellis import load_tables
from fewbit.ops.extension import load_native
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
libc, page, kept, state = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, [], hashlib.sha256()
native, random = load_native(), np.random.default_rng(0)

def guarded(array):
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (address, address + page + size):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    kept.append(memory)
    start = page if sys.argv[1] == "begin" else page + size - array.nbytes
    view = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    view[...] = array
    return view

def call(function, *arguments, results):
    arguments = [guarded(a) if isinstance(a, np.ndarray) else a for a in arguments]
    function(*arguments)
    for place in results:
        state.update(arguments[place].tobytes())

def codes_of(rows, cols, bits):
    return random.integers(0, 256, (-(-rows // 16), 2 * bits * cols), np.uint8)

def empty(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)

def rotate_quantize(tokens, cols, block, group):
    x, groups = random.standard_normal((tokens, cols), np.float32), cols // group
    signs = random.integers(0, 256, cols // 8, np.uint8) if block > 1 else None
    weight = random.standard_normal(cols, np.float32)
    for given in (x, (x.view(np.uint32) >> 16).astype(np.uint16)):
        found = (empty(tokens, cols, dtype=np.int8), empty(tokens, groups), empty(tokens, groups, dtype=np.int32))
        call(native.rotate_quantize, given, signs, block, group, 8, *found, weight, results=(5, 6, 7))
        call(native.rms_norm_rotate_quantize, given, weight, 1e-5, signs, block, group, 4, *found, results=(7, 8, 9))
        call(native.gated_rotate_quantize, given, given, "silu", signs, block, group, 8, *found, results=(7, 8, 9))
    call(native.round_groups, x, group, 4, empty(tokens, cols), results=(3,))
    call(native.round_groups_back, x, x[::-1].copy(), group, 8, empty(tokens, cols), results=(4,))

def multiply(q, scale, sums, codes, scales, tables, bias, out, cols, bits, code):
    matrix = native.Matrix(codes, scales, 0.5, tables, bias, cols, bits, code)
    native.packed_linear(q, scale, sums, matrix, out)

def packed_linear(tokens, rows, cols, group, bits, code="trellis", beside=1):
    q, groups = random.integers(-127, 128, (tokens, cols), np.int8), cols // group
    scales = random.standard_normal((rows, groups)).astype(np.float16).view(np.uint16)
    sums = q.reshape(tokens, groups, group).sum(2, dtype=np.int32)
    codes = random.integers(0, 256, (-(-rows // (16 * beside)), 2 * bits * cols * beside), np.uint8)
    tables = None if code == "nibbles" else load_tables(bits)[0].numpy()
    for dtype, bias in ((np.float32, random.standard_normal(rows, np.float32)), (np.uint16, None)):
        call(multiply, q, random.random((tokens, groups), np.float32), sums, codes, scales, tables, bias,
             empty(tokens, rows, dtype=dtype), cols, bits, code, results=(7,))

def twin(x, signs, down, down_scales, codes, scales, out, cols, rank):
    first = native.Matrix(down, down_scales, 0.5, None, None, cols, 4, "nibbles")
    second = native.Matrix(codes, scales, 0.5, None, None, cols + rank, 4, "nibbles")
    native.twin_linear(x, signs, 64, 8, first, second, out)

def twin_linear(tokens, rows, cols, rank, group):
    def halves(*shape):
        return random.standard_normal(shape).astype(np.float16).view(np.uint16)
    call(twin, random.standard_normal((tokens, cols), np.float32), random.integers(0, 256, cols // 8, np.uint8),
         codes_of(rank, cols, 4), halves(rank, cols // group), codes_of(rows, cols + rank, 4),
         halves(rows, (cols + rank) // group), empty(tokens, rows), cols, rank, results=(6,))

def trellis_dequantize(rows, cols, group, bits):
    call(native.trellis_dequantize, codes_of(rows, cols, bits), random.random((rows, cols // group), np.float32),
         load_tables(bits)[0].numpy(), bits, group, empty(rows, cols), results=(5,))

def trellis_encode_group(rows, group, bits):
    weight, scale = random.standard_normal((rows, group), np.float32), np.full(rows, 0.05, np.float32)
    for factor in (None, np.eye(group, dtype=np.float32)):
        kept_values = (None, None) if factor is None else (empty(rows, group), empty(rows, group))
        call(native.trellis_encode_group, weight, scale, 256 / scale, load_tables(bits)[0].numpy(), bits, factor,
             np.zeros_like(codes_of(rows, group, bits)), empty(rows, group), *kept_values, results=(6, 7))

def trellis_encode_streams(streams, steps, bits):
    call(native.trellis_encode_streams, random.integers(-9999, 9999, (streams, steps), np.int16),
         random.integers(-9999, 9999, 4096, np.int16), bits, empty(streams, steps, dtype=np.uint8), results=(3,))

def round_columns(rows, group):
    weight, steps = random.standard_normal((rows, group), np.float32), np.full(rows, 0.3, np.float32)
    call(native.best_scales, weight, np.array([1.0, 0.9], np.float32), -8, 7, empty(rows), results=(4,))
    for factor in (None, np.eye(group, dtype=np.float32)):
        error = None if factor is None else empty(rows, group)
        call(native.round_columns, weight, steps, -8, 7, factor, empty(rows, group, dtype=np.int8), empty(rows, group),
             error, results=(5, 6) if factor is None else (5, 6, 7))

if sys.argv[1] == "leave":
    codes = guarded(codes_of(16, 64, 3))
    native.trellis_dequantize(np.lib.stride_tricks.as_strided(codes, (2, 384)), empty(32, 1), load_tables(3)[0], 3, 64,
                              empty(32, 64))
for rows, group in ((1, 32), (16, 96), (21, 256)):
    round_columns(rows, group)
for cols, block, group in ((32, 32, 32), (192, 64, 192), (512, 256, 256), (512, 256, 128), (192, 1, 64)):
    rotate_quantize(3, cols, block, group)
for bits in (2, 3, 4):
    for rows, cols, group in ((1, 32, 32), (17, 64, 32), (33, 192, 96), (40, 512, 256)):
        for tokens in (1, 2, 5, 8, 13):
            packed_linear(tokens, rows, cols, group, bits)
        trellis_dequantize(rows, cols, group, bits)
    for rows, cols, group, beside in ((1, 64, 64, 2), (33, 192, 192, 4), (70, 512, 256, 2), (130, 256, 128, 4)):
        for tokens in (1, 2, 5, 8, 13):
            packed_linear(tokens, rows, cols, group, bits, "lanes", beside)
    trellis_dequantize(16, 16, 16, bits)
    trellis_encode_group(17, 32, bits)
    trellis_encode_streams(2, 512, bits)
for tokens in (1, 3, 8, 40):
    for rows, cols, group in ((1, 32, 32), (17, 64, 32), (33, 192, 64), (40, 512, 128)):
        packed_linear(tokens, rows, cols, group, 4, "nibbles")
    twin_linear(tokens, 33, 192, 64, 64)
print(state.hexdigest(), native.isa())
"""


def _run(isa: str, mode: str) -> subprocess.CompletedProcess:
    # AddressSanitizer, where it is loaded, leaves the signal of a protected page alone.
    options = os.environ.get("ASAN_OPTIONS", "") + ":handle_segv=0:handle_sigbus=0"
    environment = {**os.environ, "FEWBIT_ISA": isa, "ASAN_OPTIONS": options}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", [*native.available_isas(), *native.emulated_isas()] if native else [])
def test_every_kernel_stays_within_its_arrays(isa):
    before, behind = _run(isa, "begin"), _run(isa, "end")
    assert before.returncode == 0, before.stderr
    assert behind.returncode == 0, behind.stderr
    assert before.stdout == behind.stdout
    assert before.stdout.split()[1] == isa


@pytest.mark.parametrize("isa", [*native.available_isas(), *native.emulated_isas()] if native else [])
def test_a_kernel_that_leaves_its_arrays_would_be_noticed(isa):
    assert _run(isa, "leave").returncode in (-signal.SIGSEGV, -signal.SIGBUS)
