"""The kept predictions of a benchmark's reference are those of the model itself."""

from __future__ import annotations

import pytest
import torch

from fewbit.evaluate import windows

TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture
def references(import_benchmark):
    return import_benchmark("references")


@pytest.mark.parametrize("tied", [False, True])
def test_kept_logits_are_the_models(references, make_tiny, add_tokenizer, tmp_path, tied):
    directory = tmp_path / "model"
    model = make_tiny("llama", tied=tied)
    model.save_pretrained(directory)
    add_tokenizer(directory)
    found = references.kept_logits(directory, TEXT, window=16, tokens=64)
    # The second time they come from the file.
    again = references.kept_logits(directory, TEXT, window=16, tokens=64)
    (kept,) = tmp_path.glob("model-hidden-*.safetensors")
    cuts = windows(references.open_source(directory).tokenizer(), TEXT, 16, 64)
    for ids in cuts:
        with torch.inference_mode():
            expected = model(input_ids=ids[None]).logits
        torch.testing.assert_close(found(ids[None]), expected)
        assert torch.equal(found(ids[None]), again(ids[None]))
    assert kept.stat().st_size > cuts.numel() * 64 * 4


def test_another_text_is_kept_apart(references, make_tiny, add_tokenizer, tmp_path):
    directory = tmp_path / "model"
    make_tiny("llama").save_pretrained(directory)
    add_tokenizer(directory)
    first = references.kept_logits(directory, TEXT, window=16, tokens=64)
    references.kept_logits(directory, TEXT[::-1], window=16, tokens=64)
    assert len(list(tmp_path.glob("model-hidden-*.safetensors"))) == 2
    with pytest.raises(KeyError):
        first(torch.zeros(1, 16, dtype=torch.long))
