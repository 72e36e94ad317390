"""TorchDecoder keeps the protocol: slots are apart, positions may be written again, caches can be copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.runtime.batch import Batch
from fewbit.runtime.torch_decoder import TorchDecoder

TOKENS = [int(token) for token in (torch.arange(40) * 7) % 90 + 3]


def batch(*parts: tuple[int, int, list[int]], wanted=None) -> Batch:
    """Parts are (slot, first position, tokens); the last token's logits of each are wanted unless told."""
    tokens = [token for _, _, own in parts for token in own]
    positions = [first + index for _, first, own in parts for index in range(len(own))]
    slots = [slot for slot, _, own in parts for _ in own]
    ends = np.cumsum([len(own) for _, _, own in parts]) - 1
    return Batch(
        *(np.array(values, dtype=np.int32) for values in (tokens, positions, slots)),
        ends.astype(np.int32) if wanted is None else np.array(wanted, dtype=np.int32),
    )


@pytest.fixture
def model(make_tiny):
    return make_tiny("llama")


@torch.inference_mode()
def full(model, tokens) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


def test_logits_are_the_models_however_a_sequence_is_cut(model):
    decoder = TorchDecoder(model, slots=2)
    expected = full(model, TOKENS)
    decoder.forward(batch((0, 0, TOKENS[:7]), (1, 0, TOKENS[:20]), wanted=[]))
    rows = decoder.forward(batch((0, 7, TOKENS[7:12]), (1, 20, TOKENS[20:21]), wanted=[2, 4, 5]))
    assert np.allclose(rows, expected[[9, 11, 20]], atol=1e-5)
    assert rows.dtype == np.float32


def test_writing_at_a_lower_position_forgets_what_was_there(model):
    decoder = TorchDecoder(model)
    decoder.forward(batch((0, 0, [*TOKENS[:9], 50, 51, 52])))
    rows = decoder.forward(batch((0, 9, TOKENS[9:14])))
    assert np.allclose(rows, full(model, TOKENS)[[13]], atol=1e-5)


def test_a_copy_is_apart_from_what_it_was_copied_from(model):
    decoder = TorchDecoder(model, slots=2)
    decoder.forward(batch((0, 0, TOKENS[:20])))
    decoder.copy(0, 1, 11)
    decoder.forward(batch((0, 5, [60, 61, 62])))
    rows = decoder.forward(batch((1, 11, TOKENS[11:13])))
    assert np.allclose(rows, full(model, TOKENS)[[12]], atol=1e-5)


def test_sliding_layers_keep_all_positions_so_that_they_can_be_cut(make_tiny):
    model = make_tiny("mistral")
    model.config.sliding_window = 8
    decoder = TorchDecoder(model)
    expected = full(model, TOKENS)
    decoder.forward(batch((0, 0, [*TOKENS[:30], 50, 51])))
    rows = decoder.forward(batch((0, 12, TOKENS[12:20])))
    assert np.allclose(rows, expected[[19]], atol=1e-5)
    assert not torch.allclose(expected[19], full(make_tiny("mistral"), TOKENS)[19], atol=1e-3)


def test_positions_that_skip_and_blocks_that_are_too_long_are_refused(model):
    decoder = TorchDecoder(model, block=8)
    with pytest.raises(ValueError, match="cannot be written yet"):
        decoder.forward(batch((0, 3, TOKENS[:2])))
    with pytest.raises(ValueError, match="more than a block of 8"):
        decoder.forward(batch((0, 0, TOKENS[:9])))


def test_the_model_says_what_ends_a_text_and_how_long_it_may_be(model):
    decoder = TorchDecoder(model, eos=(2,))
    assert decoder.eos == (2,)
    assert (decoder.context, decoder.vocabulary) == (128, 96)
    assert TorchDecoder(model, context=64).context == 64
