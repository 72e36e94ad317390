"""Weights share huge pages: what tensors cost together, where they begin, and that freed ones go back to the system."""

import gc
import itertools
import os
import random
import threading
from pathlib import Path

import pytest

from fewbit.ops.extension import load_native

native = load_native()
STATM, MAPS = Path("/proc/self/statm"), Path("/proc/self/maps")
MB = 1 << 20
SLACK = 5 * MB  # two huge pages that are not full, and what else the process does meanwhile

pytestmark = pytest.mark.skipif(native is None, reason="native extension not built")
# A sanitizer keeps a record of every byte, which counts as well.
counts_memory = pytest.mark.skipif(
    not STATM.exists() or "libasan" in MAPS.read_text(), reason="no count of the resident memory of tensors alone"
)


def resident():
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def filled(size, value):
    tensor = native.huge_bytes(size)
    tensor[:] = value
    return tensor


@counts_memory
@pytest.mark.parametrize(("count", "size"), [(3000, 10_007), (200, 331_776), (40, 2 * MB + 4096), (3, 70 * MB)])
def test_many_tensors_take_hardly_more_than_their_bytes(count, size):
    before = resident()
    tensors = [filled(size, i % 251) for i in range(count)]
    # A page between two large tensors, or a line of the cache between two small ones.
    assert resident() - before < count * (size + (4096 if size >= 65536 else 64)) + SLACK
    assert all(int(tensor[0]) == int(tensor[-1]) == i % 251 for i, tensor in enumerate(tensors))
    del tensors
    assert resident() - before < SLACK


@counts_memory
def test_pages_between_tensors_that_stay_go_back_and_serve_again():
    before = resident()
    tensors = [filled(6 * MB, i) for i in range(10)]
    del tensors[1::2]
    # Of 6 MB at least 4 are huge pages that nothing else stands in.
    assert resident() - before < 40 * MB + SLACK
    tensors += [filled(6 * MB, 10 + i) for i in range(5)]
    assert resident() - before < 60 * MB + SLACK
    assert [int(tensor.min()) for tensor in tensors] == [0, 2, 4, 6, 8, 10, 11, 12, 13, 14]
    assert [int(tensor.max()) for tensor in tensors] == [0, 2, 4, 6, 8, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4095, 65535, 65536, 300_000, 5 * MB + 1])
def test_where_tensors_begin(size):
    kept = [native.huge_bytes(size) for _ in range(3)]
    for tensor in kept:
        assert tensor.ctypes.data % (4096 if size >= 65536 else 64) == 0
    starts = sorted(tensor.ctypes.data for tensor in kept)
    assert all(b - a >= size for a, b in itertools.pairwise(starts))


def test_threads_do_not_meet():
    def work(seed):
        choose, held = random.Random(seed), []
        for step in range(300):
            value = choose.randrange(256)
            held.append((filled(choose.randrange(1, 200_000), value), value))
            if len(held) > 8:
                tensor, value = held.pop(choose.randrange(len(held)))
                if int(tensor.min()) != value or int(tensor.max()) != value:
                    wrong.append((seed, step))

    wrong = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
