"""Accuracy on tasks of lm-evaluation-harness, with questions that are made here from Wikipedia text."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest

from fewbit.errors import FewbitError, UsageError
from fewbit.evaluate import tasks as module
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Nothing here may ask the hub."""
    pytest.importorskip("lm_eval")
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def questions(text: str, count: int, seed: int = 0) -> list[dict]:
    """Which of four half sentences continues the other half: the true one, or one of three from elsewhere."""
    found = [match[0].split() for match in re.finditer(r"[A-Z][^.\n]{80,220}\.", text)]
    draw = random.Random(seed)
    draw.shuffle(found)
    made = []
    for number in range(count):
        words, *others = found[4 * number : 4 * number + 4]
        choices = [" ".join(sentence[len(sentence) // 2 :]) for sentence in (words, *others)]
        order = draw.sample(range(4), 4)
        start = " ".join(words[: len(words) // 2])
        made.append({"start": start, "choices": [choices[i] for i in order], "label": order.index(0)})
    return made


@pytest.fixture
def make_task(tmp_path):
    """The function `make_task(questions)`: a directory with the task `continuations`."""

    def make(made: list[dict]):
        directory = tmp_path / "tasks"
        directory.mkdir()
        (directory / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in made))
        description = {
            "task": "continuations",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(directory / "questions.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{start}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        }
        (directory / "continuations.yaml").write_text(json.dumps(description))  # which is YAML, too
        return directory

    return make


@pytest.fixture(scope="module")
def checkpoint(tiny_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks") / "out"
    quantize(tiny_models["tied"], out, QuantizeOptions(rounding="nearest"))
    return out


TOY = [{"start": "the quick", "choices": ["model", "zzzz", "QQQQ", "12345"], "label": i % 4} for i in range(12)]


def test_a_checkpoint_and_its_source_answer_a_local_task(run, make_task, checkpoint, tiny_models):
    arguments = ("--tasks", "continuations", "--include-path", make_task(TOY), "--dtype", "float32")
    code, out, err = run("eval", checkpoint, "--reference", tiny_models["tied"], *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    for role in ("tasks", "reference"):
        scores = report[role]["continuations"]
        assert scores["samples"] == 12
        assert set(scores["metrics"]) == {"acc", "acc_norm"}
        # All questions are alike, so whatever the model prefers is right for a fourth of them.
        assert scores["metrics"]["acc"]["value"] == 0.25
        assert scores["metrics"]["acc"]["stderr"] > 0
    assert report["limit"] is None
    assert report["dtype"] == "float32"
    code, out, _ = run("eval", checkpoint, *arguments, "--limit", 5)
    assert code == 0
    assert "continuations" in out
    assert re.search(r"acc_norm\D+0\.\d{4} \+- 0\.\d{4}\D+5\b", out)


def test_scores_are_those_of_the_models_own_logits(make_task, checkpoint, wiki_eval):
    import torch

    from fewbit.loading import load

    made = questions(wiki_eval, 6)
    model, tokenizer = load(checkpoint, torch.float32)
    right = 0
    for entry in made:
        scores = []
        for choice in entry["choices"]:
            start, whole = (tokenizer(part)["input_ids"] for part in (entry["start"], f"{entry['start']} {choice}"))
            whole = whole[-(model.config.max_position_embeddings + 1) :]  # the harness cuts at the left, too
            count = min(len(tokenizer(f" {choice}")["input_ids"]), len(whole) - 1)
            assert whole[: len(start)] == start or len(whole) > model.config.max_position_embeddings
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            targets = torch.tensor(whole[1:])
            scores.append(logits.gather(1, targets[:, None])[-count:].sum().item())
        right += max(range(4), key=scores.__getitem__) == entry["label"]
    manager = module.find_tasks(["continuations"], make_task(made))
    found = module.evaluate_tasks(model, tokenizer, ["continuations"], manager)
    assert found["continuations"]["metrics"]["acc"]["value"] == pytest.approx(right / 6)


def test_what_is_wrong_with_a_task_is_said_with_a_remedy(run, make_task, checkpoint, tmp_path, monkeypatch):
    directory = make_task(TOY)
    for arguments, message in (
        (("--tasks", "continuations", "--include-path", tmp_path / "none"), "is not a directory"),
        (("--tasks", "continuations", "--include-path", directory, "--limit", 0), "--limit 0: give a number"),
        (("--tasks", "continuations", "--text", directory / "questions.jsonl"), "two measurements"),
    ):
        code, out, err = run("eval", checkpoint, *arguments)
        assert (code, out) == (2, "")
        assert message in err
    (directory / "questions.jsonl").unlink()
    with pytest.raises(FewbitError, match=r"cannot load continuations .* --include-path"):
        module.find_tasks(["continuations"], directory)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fewbit\[eval\]'"):
        module.find_tasks(["continuations"])


@pytest.mark.slow
def test_a_task_that_nobody_has_is_refused(checkpoint):
    with pytest.raises(UsageError, match=r"no task is called 'no_such_task'.*lm-eval ls tasks.*--include-path"):
        module.find_tasks(["no_such_task"])


@pytest.mark.slow
def test_compression_keeps_the_accuracy_of_a_real_model(make_task, smollm2_dir, wiki_eval, wiki_calib_path, tmp_path):
    from fewbit.loading import load_any

    quantize(smollm2_dir, tmp_path / "out", QuantizeOptions(calib_tokens=8192, tune=False), [str(wiki_calib_path)])
    manager = module.find_tasks(["continuations"], make_task(questions(wiki_eval, 100)))
    accuracy = {}
    for path in (smollm2_dir, tmp_path / "out"):
        model, tokenizer = load_any(path)
        found = module.evaluate_tasks(model, tokenizer, ["continuations"], manager)
        accuracy[path.name] = found["continuations"]["metrics"]["acc_norm"]["value"]
    print(accuracy)
    full, compressed = accuracy.values()
    assert full > 0.6  # a fourth would be chance
    assert compressed > full - 0.12
