"""The blocks of docs/hosts.md do what the page says, on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

import fewbit
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from pages import ROOT, blocks

PAGE = ROOT / "docs" / "hosts.md"
compile_ = torch.compile


@pytest.fixture(scope="module")
def out(tiny_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts") / "checkpoint"
    quantize(tiny_models["tied"], path, QuantizeOptions(rounding="nearest"))
    tokenizer = fewbit.load(path)[1]
    tokenizer.eos_token = "<unk>"  # which the harness cannot do without
    tokenizer.save_pretrained(path)
    return path


def test_transformers(reader, out, monkeypatch, tmp_path):
    # A compiler for machine code would take a minute.
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: compile_(model, fullgraph=fullgraph, backend="eager")
    )
    reader.put(OUT=out)
    found = reader.read(blocks(PAGE, section="transformers"))
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        assert torch.equal(found["compiled"](ids).logits, found["model"](ids).logits)
        assert torch.equal(fewbit.load(tmp_path / "COPY")[0](ids).logits, found["model"](ids).logits)


def test_peft(reader, out, tmp_path):
    pytest.importorskip("peft")
    reader.put(OUT=out)
    found = reader.read(blocks(PAGE, section="PEFT"))
    assert (tmp_path / "ADAPTER" / "adapter_model.safetensors").is_file()
    changed = [value.abs().max() > 0 for name, value in found["model"].named_parameters() if "lora_B" in name]
    assert len(changed) == 4
    assert all(changed)


def test_lm_evaluation_harness(reader, out, tiny_models, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "TASKS").mkdir()
    (description,) = blocks(PAGE, "yaml", section="lm-evaluation-harness")
    (tmp_path / "TASKS" / "continuations.yaml").write_text(description.code)
    question = {"start": "The sky is", "choices": ["blue", "loud"], "label": 0}
    (tmp_path / "TASKS" / "questions.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    reader.put(OUT=out, MODEL=tiny_models["tied"])
    found = reader.read(blocks(PAGE, "python", "sh", section="lm-evaluation-harness"))
    accuracy = found["found"]["results"]["continuations"]["acc,none"]
    assert accuracy in (0, 1)  # three times the same question
    assert f"{accuracy:.4f}" in reader.printed[0]
    assert "reference" in reader.printed[0]
