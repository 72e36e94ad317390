"""Rotary tables against transformers' own: the same frequencies, and functions that differ by a rounding at most."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fewbit.errors import CannotLower
from fewbit.runtime.rotary import FREQUENCIES, rotary_tables

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TYPES = {"default": {}, "linear": {"factor": 4.0}, "llama3": LLAMA3}
ULP = 2.0**-23  # relative to 1


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", TYPES)
def test_tables_are_those_of_transformers(kind, head_dim, theta):
    parameters = {"rope_type": kind, "rope_theta": theta, **TYPES[kind]}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=parameters
    )
    frequencies = FREQUENCIES[kind](parameters, head_dim)
    embedding = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(frequencies, embedding.inv_freq.numpy(), rtol=4 * ULP)
    assert embedding.attention_scaling == 1.0
    tables = rotary_tables(SimpleNamespace(rope_parameters=parameters), "full_attention", head_dim, 2048)
    embedding.inv_freq = torch.from_numpy(frequencies)
    wanted = embedding(torch.zeros(1, 1), torch.arange(2048)[None])
    for table, own in zip(tables, wanted, strict=True):
        assert table.dtype == np.float32
        assert table.flags.c_contiguous
        np.testing.assert_allclose(table, own[0, :, : head_dim // 2].numpy(), rtol=0, atol=ULP / 2)


def test_positions_without_a_native_step_are_named():
    for parameters, message in (
        (None, "without rotary positions"),
        ({"rope_type": "dynamic"}, "dynamic"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "default"),
    ):
        with pytest.raises(CannotLower, match=message):
            rotary_tables(SimpleNamespace(rope_parameters=parameters), "full_attention", 64, 16)
