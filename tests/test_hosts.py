"""The blocks of docs/hosts.md do what the page says, on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

import fewbit
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize

compile_ = torch.compile


@pytest.fixture(scope="module")
def out(tiny_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts") / "checkpoint"
    quantize(tiny_models["tied"], path, QuantizeOptions(rounding="nearest"))
    tokenizer = fewbit.load(path)[1]
    tokenizer.eos_token = "<unk>"  # which the harness cannot do without
    tokenizer.save_pretrained(path)
    return path


def test_transformers(host_section, out, monkeypatch, tmp_path):
    # A compiler for machine code would take a minute.
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: compile_(model, fullgraph=fullgraph, backend="eager")
    )
    found = host_section("transformers", OUT=out, COPY=tmp_path / "copy")
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        assert torch.equal(found["compiled"](ids).logits, found["model"](ids).logits)
        assert torch.equal(fewbit.load(tmp_path / "copy")[0](ids).logits, found["model"](ids).logits)


def test_peft(host_section, out, tmp_path):
    pytest.importorskip("peft")
    found = host_section("PEFT", OUT=out, ADAPTER=tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    changed = [value.abs().max() > 0 for name, value in found["model"].named_parameters() if "lora_B" in name]
    assert len(changed) == 4
    assert all(changed)


def test_lm_evaluation_harness(host_section, out, tiny_models, tmp_path):
    pytest.importorskip("lm_eval")
    places = {"OUT": out, "MODEL": tiny_models["tied"], "TASKS": tmp_path}
    (description,) = host_section("lm-evaluation-harness", ("yaml",), only=True, **places)
    (tmp_path / "continuations.yaml").write_text(description)
    question = {"start": "The sky is", "choices": ["blue", "loud"], "label": 0}
    (tmp_path / "questions.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    found = host_section("lm-evaluation-harness", **places)
    accuracy = found["found"]["results"]["continuations"]["acc,none"]
    assert accuracy in (0, 1)  # three times the same question
    assert f"{accuracy:.4f}" in found["printed"][0]
    assert "reference" in found["printed"][0]
