"""LoRA adapters of PEFT on packed linears."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import UsageError
from fewbit.modules import FewbitLinear
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize

peft = pytest.importorskip("peft")

IDS = torch.arange(24).view(2, 12) % 90 + 3


@pytest.fixture(scope="module")
def checkpoints(tiny_models, branched_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    quantize(tiny_models["tied"], root / "trellis", QuantizeOptions(rounding="nearest"))
    quantize(branched_dir, root / "twin", QuantizeOptions(format="twinquant", rounding="nearest"))
    return root


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def adapted(path, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return peft.get_peft_model(
        load(path, dtype), peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings})
    )


def train(model, steps=1):
    """Gradient steps at a high rate; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("name", ["trellis", "twin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_changes_the_adapter_and_nothing_else(checkpoints, name, dtype):
    model = adapted(checkpoints / name, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = {key for key in before if "lora_" in key}
    assert len(adapter) == 2 * 2 * 2
    assert {key for key, value in model.named_parameters() if value.requires_grad} == adapter
    losses = train(model, 5)
    assert losses[-1] < losses[0] - 0.01
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key in before:
        same = before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
        assert same == (key not in adapter), key


@pytest.mark.parametrize("name", ["trellis", "twin"])
def test_a_fresh_adapter_adds_nothing_and_a_trained_one_its_product(checkpoints, name):
    model = adapted(checkpoints / name, r=4, lora_alpha=8)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load(checkpoints / name)(IDS).logits)
    train(model, 3)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        product = 2.0 * x @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T
        assert product.abs().max() > 0
        torch.testing.assert_close(layer(x), layer.base_layer(x) + product)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, load(checkpoints / name)(IDS).logits)


def test_adapters_are_saved_and_loaded_alone(checkpoints, tmp_path):
    model = adapted(checkpoints / "trellis")
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS).logits
        again = peft.PeftModel.from_pretrained(load(checkpoints / "trellis"), tmp_path / "adapter")
        assert torch.equal(again(IDS).logits, expected)
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        assert torch.equal(found(IDS).logits, expected)


@pytest.mark.parametrize("name", ["trellis", "twin"])
def test_all_linear_means_packed_linears_too(checkpoints, name):
    model = adapted(checkpoints / name, target_modules="all-linear")
    assert sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules()) == 2 * 7
    assert not isinstance(model.get_base_model().lm_head, peft.tuners.lora.LoraLayer)


@pytest.mark.parametrize("first", ["all-linear", ["q_proj"]])
def test_a_second_adapter_on_all_linears_has_the_places_of_a_first_one(checkpoints, first):
    model = adapted(checkpoints / "trellis", target_modules=first)
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert len(layers) == 2 * 7
    assert all("second" in layer.lora_A for layer in layers.values())
    assert all(isinstance(layer.base_layer, FewbitLinear) for layer in layers.values())
    model.set_adapter("second")
    assert model(input_ids=IDS).logits.shape == (2, 12, 96)


def test_a_head_that_is_trained_whole_gets_no_adapter(tiny_models, tmp_path):
    quantize(tiny_models["biased"], tmp_path / "out", QuantizeOptions(rounding="nearest", head="bf16"))
    model = adapted(tmp_path / "out", modules_to_save=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear"))
    layers = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 2 * 7
    assert not any("lm_head" in name for name in layers)


def test_the_usual_preparations_for_training_work(checkpoints):
    model = peft.prepare_model_for_kbit_training(load(checkpoints / "trellis", torch.bfloat16))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    model.gradient_checkpointing_enable()
    train(model)
    torch.manual_seed(0)
    inside = load(checkpoints / "trellis")
    inside.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))  # transformers' own way
    assert inside(IDS).logits.shape == (2, 12, 96)


def test_what_needs_plain_weights_is_refused(checkpoints):
    model = adapted(checkpoints / "trellis")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UsageError, match=r"cannot be merged into packed weights.*fewbit quantize"):
            merge()
    for settings, name in (
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ):
        with pytest.raises(UsageError, match=name):
            adapted(checkpoints / "trellis", **settings)
    with pytest.raises(UsageError, match="use_dora"):
        model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], use_dora=True))


@pytest.mark.parametrize(
    ("option", "kind"),
    [("velora_config", "VeloraConfig"), ("use_bdlora", "BdLoraConfig"), ("kasa_config", "KasaConfig")],
)
def test_variants_that_read_the_plain_weight_are_refused(checkpoints, option, kind):
    variant = getattr(peft.tuners.lora.config, kind, None)
    if variant is None:
        pytest.skip(f"this release of PEFT has no {option}")
    with pytest.raises(UsageError, match=f"{option} reads the plain weight.*use plain LoRA"):
        adapted(checkpoints / "trellis", **{option: variant()})


def test_models_without_packed_weights_are_left_alone(make_tiny):
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(make_tiny("llama"), config)
    assert config._custom_modules is None
    assert fewbit.__version__


@pytest.mark.parametrize("order", [("fewbit", "peft"), ("peft", "fewbit")])
def test_importing_fewbit_is_enough_whatever_comes_first(checkpoints, order):
    program = (
        f"import {', '.join(order)}\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoints / 'trellis')!r})\n"
        "peft.get_peft_model(model, peft.LoraConfig(target_modules=['q_proj']))\n"
        "assert 'fewbit.serve' not in __import__('sys').modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_layers_keep_the_packed_linear_inside(checkpoints):
    model = adapted(checkpoints / "trellis")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer.base_layer, FewbitLinear)
    assert layer.base_layer.qweight is layer.base_layer.codes
