"""Weights that are the same on every machine and with every version of torch."""

import hashlib

import pytest
import torch


@pytest.fixture
def fixed_weight():
    """`fixed_weight(rows, cols)`: float32, roughly normal with sigma 0.07, from integer arithmetic alone."""

    def make(rows: int, cols: int) -> torch.Tensor:
        index = torch.arange(4 * rows * cols, dtype=torch.int64)
        mixed = ((index + 1) * 2654435761) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 739982445 % 2**32) ^ (mixed >> 7)
        uniform = (mixed >> 8) % 2**16 - 2**15
        total = uniform.view(4, rows, cols).sum(0)
        return total.float() / 2**19

    return make


@pytest.fixture
def fingerprint():
    """`fingerprint(parts)`: the first 16 hexadecimal digits of the sha256 of all parts, in order of their names."""

    def digest(parts: dict[str, torch.Tensor]) -> str:
        state = hashlib.sha256()
        for name in sorted(parts):
            state.update(parts[name].contiguous().view(torch.uint8).numpy().tobytes())
        return state.hexdigest()[:16]

    return digest
