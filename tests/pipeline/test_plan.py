"""The plan: kinds, bytes, totals and its way through JSON."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fewbit.checkpoint.source import open_source
from fewbit.errors import CorruptFile, UsageError
from fewbit.models import get_family
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import Plan, classify, make_plan


def test_tensors_are_classified_by_what_reads_them():
    family = get_family("llama")
    assert classify(family, "model.embed_tokens.weight") == ("embed", "embed")
    assert classify(family, "lm_head.weight") == ("head", "head")
    assert classify(family, "model.layers.11.self_attn.k_proj.weight") == ("body", "11.0")
    assert classify(family, "model.layers.11.mlp.down_proj.weight") == ("body", "11.3")
    assert classify(family, "model.layers.11.self_attn.k_proj.bias") == ("plain", "")
    assert classify(family, "model.layers.11.input_layernorm.weight") == ("plain", "")
    assert classify(family, "model.norm.weight") == ("plain", "")


def test_totals_count_every_weight_and_every_byte(tiny_models):
    source = open_source(tiny_models["biased"])
    plan = make_plan(source, QuantizeOptions())
    totals = plan.totals()
    assert totals["weights"] == sum(source.tensor(name).numel() for name in source.names())
    assert totals["bytes"] == sum(tensor.bytes for tensor in plan.tensors)
    assert totals["bits_per_weight"]["total"] == pytest.approx(8 * totals["bytes"] / totals["weights"])


@pytest.mark.parametrize("bits", [0, 2, 3, 4])
def test_a_target_size_goes_with_every_number_of_bits_there_is(bits):
    assert QuantizeOptions(target_bytes=10**9, bits=bits).allocates


def test_matrices_that_are_kept_belong_to_their_layers(tiny_models):
    plan = make_plan(open_source(tiny_models["odd"]), QuantizeOptions())
    kept = [tensor for tensor in plan.tensors if tensor.kind == "body" and tensor.spec is None]
    assert [(tensor.module.rpartition(".")[2], tensor.layer) for tensor in kept] == [("down_proj", 0), ("down_proj", 1)]


def test_a_plan_survives_json_with_its_identity(tiny_models, tmp_path):
    plan = make_plan(open_source(tiny_models["odd"]), QuantizeOptions(code="iq3_s"))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.identity == plan.identity


def test_the_identity_follows_options_and_source(tiny_models):
    source = open_source(tiny_models["odd"])
    plans = [
        make_plan(source, QuantizeOptions()),
        make_plan(source, QuantizeOptions(bits=4)),
        make_plan(source, QuantizeOptions(damping=0.02)),
        make_plan(open_source(tiny_models["tied"]), QuantizeOptions()),
    ]
    assert len({plan.identity for plan in plans}) == len(plans)


def without_a_layer(weights: dict) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        del weights[name]


def narrower(weights: dict) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:96].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_layer, r"has no tensor model\.layers\.1\."),
        (narrower, r"up_proj\.weight is \[96, 64\], the configuration says \[128, 64\]"),
    ],
)
def test_a_source_that_is_not_the_whole_model_is_refused(tiny_llama_dir, tmp_path, change, message):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(CorruptFile, match=message):
        make_plan(open_source(model), QuantizeOptions(rounding="nearest"))


def test_layers_that_the_configuration_does_not_count_are_refused(tiny_llama_dir, tmp_path):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CorruptFile, match=r"holds model\.layers\.1\..* the configuration describes 1 layers"):
        make_plan(open_source(model), QuantizeOptions(rounding="nearest"))


@pytest.mark.parametrize("text", ["{", "[]", '{"tensors": [{"spec": null}]}', '{"tensors": 3}'])
def test_a_damaged_plan_is_refused_with_the_remedy(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CorruptFile, match="--fresh"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code": "gptq"}, "unknown code 'gptq'"),
        ({"head": "fp8"}, "unknown head format"),
        ({"rounding": "up"}, "unknown rounding"),
        ({"bits": 5}, "2 or 3 or 4 bits, not 5"),
        ({"bits": float("nan")}, "nan is no number of bits"),
        ({"bits": float("inf")}, "inf is no number of bits"),
        ({"bits": 3.25, "target_bytes": 1000}, "two budgets"),
        ({"code": "ternary", "bits": 4}, "3 bits, not 4"),
        ({"calib_tokens": 100}, "raise --calib-tokens"),
        ({"damping": 0.0}, "between 0 and 1"),
        ({"calib_dtype": "float8"}, "unknown calibration dtype"),
    ],
)
def test_wrong_options_are_refused_by_name(settings, message):
    with pytest.raises(UsageError, match=message):
        QuantizeOptions(**settings)
