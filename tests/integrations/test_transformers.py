"""fewbit checkpoints inside transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.loading import load
from fewbit.modules import FewbitEmbedding, FewbitLinear, PackedTensor, TiedHead
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize


@pytest.fixture(scope="module")
def checkpoints(tiny_models, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("tied", "biased"):
        quantize(tiny_models[name], root / name, QuantizeOptions(rounding="nearest"))
    return root


def plain_copy(source_path, packed):
    """The full model with every packed weight replaced by its plain, un-rotated value."""
    model = load_plain(open_source(source_path), torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, PackedTensor):
            model.get_submodule(name).weight.data = module.plain_weight()
    return model


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_rotated_inputs_and_unrotated_weights_give_the_same_logits(tiny_models, checkpoints, name):
    packed, _ = load(checkpoints / name, torch.float32)
    ids = torch.arange(40)[None] % 90 + 3
    torch.testing.assert_close(
        packed(ids).logits, plain_copy(tiny_models[name], packed)(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_importing_fewbit_is_enough_whatever_comes_first(checkpoints):
    for first, second in (("fewbit", "transformers"), ("transformers", "fewbit")):
        program = (
            f"import {first}, {second}\n"
            "from transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(checkpoints / 'biased')!r})\n"
            "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'FewbitLinear'\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_modules_stay_packed_and_keep_their_bits_under_dtype_changes(checkpoints):
    model, _ = load(checkpoints / "biased")
    linear = model.model.layers[0].self_attn.q_proj
    assert isinstance(linear, FewbitLinear)
    assert isinstance(model.model.embed_tokens, FewbitEmbedding)
    assert linear.bias.dtype == torch.bfloat16
    before = {name: part.clone() for name, part in linear.parts().items()}
    model.to(torch.float64)
    after = linear.parts()
    assert {name: part.dtype for name, part in after.items()} == {name: part.dtype for name, part in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert linear.bias.dtype == torch.float64


def test_a_tied_table_is_stored_once_and_read_by_both_ends(checkpoints):
    model, _ = load(checkpoints / "tied")
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.table is model.model.embed_tokens
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    model.tie_weights()
    assert isinstance(model.lm_head, TiedHead)


def test_saving_again_writes_the_same_tensors(checkpoints, tmp_path):
    from safetensors.torch import load_file

    model, _ = load(checkpoints / "biased")
    model.save_pretrained(tmp_path / "again")
    first = load_file(checkpoints / "biased" / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    packed = {name for name in first if not name.endswith((".bias", "norm.weight"))}
    assert set(second) == set(first)
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in packed)


def test_transformers_continues_a_prompt_with_packed_weights(checkpoints):
    model, tokenizer = load(checkpoints / "tied")
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert answer.shape == (1, 9 + 12)
    assert torch.equal(answer[:, :9], ids)


def test_a_module_that_the_model_lacks_is_refused(checkpoints, tmp_path):
    import json
    import shutil

    from fewbit.errors import CorruptFile

    copy = shutil.copytree(checkpoints / "biased", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.7.mlp.up_proj"] = modules["model.layers.0.mlp.up_proj"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFile, match=r"model.layers.7.mlp.up_proj"):
        AutoModelForCausalLM.from_pretrained(copy)
