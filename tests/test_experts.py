"""Mixtures of experts: one linear per expert and matrix, from whichever layout, all the way to the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import UsageError
from fewbit.experts import SeparateExperts, fuse_names, separate_experts
from fewbit.loading import load
from fewbit.models import get_family
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.run import quantize

KINDS = ("mixtral", "qwen3_moe")
OPTIONS = QuantizeOptions(bits=4, head="bf16", calib_tokens=1024, calib_window=128, calib_dtype="float32", tune=False)


def save(model, directory: Path, layout: str, tokenizer: Path) -> Path:
    """As transformers saves it ("apart"), or with the experts of a layer in one tensor ("fused")."""
    model.save_pretrained(directory)
    if layout == "fused":
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, directory / "all")
        (directory / "all").replace(directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    return directory


def stored_names(directory: Path) -> list[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.fixture(params=[(kind, layout) for kind in KINDS for layout in ("apart", "fused")], ids="-".join)
def saved(make_mixture, request, tiny_models, tmp_path):
    kind, layout = request.param
    model = make_mixture(kind)
    directory = save(model, tmp_path / "model", layout, tiny_models["tied"])
    assert any("gate_up_proj" in name for name in stored_names(directory)) == (layout == "fused")
    return model, directory


def test_both_layouts_give_one_matrix_per_expert_under_the_same_names(saved):
    model, directory = saved
    source = open_source(directory)
    names = source.names()
    assert len(set(names)) == len(names)
    assert source.weights() == sum(parameter.numel() for parameter in model.parameters())
    for layer, block in enumerate(model.model.layers):
        fused = block.mlp.experts
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            gate, up = fused.gate_up_proj[expert].chunk(2)
            for part, expected in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[expert])):
                name = f"{prefix}{part}.weight"
                assert source.shape(name) == tuple(expected.shape)
                assert torch.equal(source.tensor(name), expected)
                assert torch.equal(source.rows(name, 5, 1000), expected[5:])
    assert sum(".experts." in name for name in names) == 2 * 4 * 3


def test_every_weight_is_planned_exactly_once(saved):
    model, directory = saved
    plan = make_plan(open_source(directory), OPTIONS)
    assert plan.totals()["weights"] == sum(parameter.numel() for parameter in model.parameters())
    experts = [tensor for tensor in plan.quantized if ".experts." in tensor.name]
    assert len(experts) == 2 * 4 * 3
    assert len({tensor.shared_input for tensor in experts}) == 2 * 4 * 2
    assert len({tensor.signs_seed for tensor in experts}) == 2 * 2
    routers = [tensor for tensor in plan.tensors if tensor.name.endswith("mlp.gate.weight")]
    assert [tensor.spec for tensor in routers] == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_separate_experts_compute_what_the_fused_module_computes(make_mixture, kind):
    model = make_mixture(kind)
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        separate_experts(model, get_family(kind))
        assert all(isinstance(layer.mlp.experts, SeparateExperts) for layer in model.model.layers)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    fused = fuse_names(dict(model.state_dict()), get_family(kind))
    assert set(fused) == set(before)
    assert all(torch.equal(fused[name], before[name]) for name in before)


def test_the_plain_model_is_the_original(saved):
    model, directory = saved
    ids = torch.randint(0, 96, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(load_plain(open_source(directory), torch.float32)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_four_bits_come_close_survive_transformers_and_verify(saved, calibration_text, tmp_path):
    model, directory = saved
    result = quantize(directory, tmp_path / "out", OPTIONS, [calibration_text])
    assert result.unseen == []
    packed, tokenizer = load(tmp_path / "out", torch.float32)
    ids = tokenizer("the quick model reads many words", return_tensors="pt")["input_ids"]
    expected, found = model(ids).logits, packed(ids).logits
    assert (found - expected).norm() < 0.25 * expected.norm()
    packed.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", torch.float32)[0](ids).logits, found)
    assert not [name for name, problem in Artifact.open(tmp_path / "out").verify(open_source(directory)) if problem]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_expert_matrices_that_no_format_takes_stay_and_still_load(
    make_mixture, kind, tiny_models, calibration_text, tmp_path
):
    model = make_mixture(kind, inner=72)  # no block of 32 divides what the down projections read
    directory = save(model, tmp_path / "model", "apart", tiny_models["tied"])
    quantize(directory, tmp_path / "out", OPTIONS, [calibration_text])
    packed, _ = load(tmp_path / "out", torch.float32)
    for full, layer in zip(model.model.layers, packed.model.layers, strict=True):
        for expected, expert in zip(full.mlp.experts.down_proj, layer.mlp.experts, strict=True):
            torch.testing.assert_close(expert.down_proj.weight, expected.bfloat16().float())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_no_token_reaches_is_rounded_and_reported(
    make_mixture, kind, tiny_models, calibration_text, tmp_path
):
    model = make_mixture(kind, experts=5)
    for layer in model.model.layers:
        one, two = layer.mlp.gate.weight[0].clone(), layer.mlp.gate.weight[1].clone()
        # Two of the first four are always above 0, which the last expert always gets.
        layer.mlp.gate.weight.copy_(torch.stack([one, -one, two, -two, torch.zeros_like(one)]))
    directory = save(model, tmp_path / "model", "apart", tiny_models["tied"])
    result = quantize(directory, tmp_path / "out", OPTIONS, [calibration_text])
    parts = ("down_proj", "gate_proj", "up_proj")
    unseen = [f"model.layers.{layer}.mlp.experts.4.{part}.weight" for layer in (0, 1) for part in parts]
    assert sorted(result.unseen) == unseen
    recorded = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / "fewbit.json").read_text())["tensors"]}
    assert {name for name, entry in recorded.items() if entry.get("tokens") == 0} == set(unseen)
    for name in unseen:
        seen = recorded[name.replace("experts.4", "experts.0")]
        assert 0 < recorded[name]["relative_error"] < 1.5 * seen["relative_error"]
    packed, _ = load(tmp_path / "out", torch.float32)
    x = torch.randn(7, 64)
    expected = model.model.layers[1].mlp.experts
    separate_experts(model, get_family(kind))
    expected, found = (each.model.layers[1].mlp.experts[4](x) for each in (model, packed))
    assert (found - expected).norm() < 0.25 * expected.norm()


def test_a_changed_source_does_not_verify(saved, calibration_text, tmp_path):
    _, directory = saved
    quantize(directory, tmp_path / "out", QuantizeOptions(rounding="nearest"))
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x42")
    with pytest.raises(UsageError, match="is not the model that"):
        list(Artifact.open(tmp_path / "out").verify(open_source(directory)))


def test_a_changed_shard_of_the_checkpoint_is_found(saved, tmp_path):
    _, directory = saved
    quantize(directory, tmp_path / "out", QuantizeOptions(rounding="nearest"))
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x42")
    damaged = [name for name, problem in Artifact.open(tmp_path / "out").verify(open_source(directory)) if problem]
    assert len(damaged) == 1


def test_a_tuned_mixture_is_closer_than_one_that_is_not(make_mixture, tiny_models, calibration_text, tmp_path):
    model = make_mixture("qwen3_moe")
    directory = save(model, tmp_path / "model", "apart", tiny_models["tied"])
    settings = {"bits": 2, "calib_tokens": 2048, "calib_window": 128, "calib_dtype": "float32"}
    quantize(directory, tmp_path / "out", QuantizeOptions(**settings, tune=True, tune_steps=32), [calibration_text])
    history = json.loads((tmp_path / "out" / "fewbit.json").read_text())["tuning"]["history"]
    assert min(entry["held"] for entry in history) <= history[0]["held"]
    assert torch.isfinite(load(tmp_path / "out", torch.float32)[0](torch.arange(20)[None]).logits).all()
