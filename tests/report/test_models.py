"""Which models a report takes, what it calls them, and which one is the reference."""

from __future__ import annotations

import json
import shutil

import pytest

from fewbit.errors import UsageError
from fewbit.report.models import check_tokenizers, open_subjects


@pytest.fixture(scope="module")
def checkpoint(tiny_models, tmp_path_factory):
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize

    out = tmp_path_factory.mktemp("models") / "out"
    quantize(tiny_models["tied"], out, QuantizeOptions(rounding="nearest", tune=False), [])
    return out


def test_the_full_model_that_a_checkpoint_was_made_from_is_the_reference(checkpoint, tiny_models):
    found = open_subjects([str(tiny_models["odd"]), str(checkpoint), str(tiny_models["tied"])])
    assert found.reference is found.models[0]
    assert found.reference.path == str(tiny_models["tied"])
    assert found.made_from_reference(found.artifacts[0][1])
    other = open_subjects([str(checkpoint)], str(tiny_models["odd"]))
    assert not other.made_from_reference(other.artifacts[0][1])
    alone = open_subjects([str(checkpoint)])
    assert alone.reference is None
    assert not alone.made_from_reference(alone.artifacts[0][1])


def test_a_model_given_twice_is_taken_once_and_equal_names_are_told_apart(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "other" / "out")
    found = open_subjects([str(checkpoint), f"{checkpoint}/", str(checkpoint / ".." / "out"), str(copy)])
    assert [model.name for model in found.models] == [f"{checkpoint.parent.name}/out", "other/out"]


def test_what_cannot_be_compared_is_refused_with_a_remedy(checkpoint, tiny_models, tmp_path):
    wider = shutil.copytree(checkpoint, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    for paths, reference, words in (
        ([str(wider)], str(tiny_models["tied"]), "a vocabulary of 97 tokens and .* one of 96"),
        ([str(tmp_path / "none" / "at" / "all")], None, "no such file or directory"),
        ([str(tmp_path / "empty")], None, "holds neither"),
        ([str(tmp_path / "notes.txt")], None, "not a model"),
        ([str(tiny_models["tied"])], str(checkpoint), "full-precision"),
        ([], None, "one model at least"),
    ):
        with pytest.raises(UsageError, match=words):
            open_subjects(paths, reference)


def test_other_tokenizers_are_refused():
    class Tokenizer:
        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.get_vocab = lambda: vocabulary

    same, other = Tokenizer({"a": 0, "b": 1}), Tokenizer({"a": 1, "b": 0})
    check_tokenizers([("x", same), ("y", Tokenizer({"b": 1, "a": 0}))])
    with pytest.raises(UsageError, match="y has another tokenizer than x"):
        check_tokenizers([("x", same), ("y", other)])
