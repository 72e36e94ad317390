"""Exported models: transformers alone gives the logits of the checkpoint's decoded weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fewbit.checkpoint import store
from fewbit.checkpoint.export import export
from fewbit.errors import CorruptFile, FewbitError, NonFiniteWeights, UsageError
from fewbit.loading import load
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from gguf_files import logits, write_gguf

DENSE = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"tied": True},
}
CALIBRATED = {"calib_tokens": 2048, "calib_window": 64, "calib_dtype": "float32", "tune": False}


@pytest.fixture(scope="module")
def compress(make_tiny, make_mixture, add_tokenizer, calibration_text, tmp_path_factory):
    """The function `compress(kind, tied=False, model={}, **options)`: a checkpoint of a tiny model, made once."""
    made: dict[str, Path] = {}

    def one(kind: str, tied: bool = False, model: dict | None = None, **options) -> Path:
        key = repr((kind, tied, model, sorted(options.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("model")
            changes = {**DENSE.get(kind, {}), **(model or {})}
            tiny = make_tiny(kind, changes.pop("tied", tied), **changes) if kind in DENSE else make_mixture(kind)
            tiny.save_pretrained(directory / "plain")
            add_tokenizer(directory / "plain")
            chosen = QuantizeOptions(**{"rounding": "nearest", **options})
            quantize(directory / "plain", directory / "out", chosen, [calibration_text])
            made[key] = directory / "out"
        return made[key]

    return one


def decoded_logits(path: Path) -> torch.Tensor:
    """Logits of the loaded checkpoint with decoded weights, which it multiplies with where gradients are wanted."""
    model = load(path, torch.float32)[0]
    embedded = model.get_input_embeddings()(torch.arange(40)[None] * 7 % 96)
    return model(inputs_embeds=embedded.detach().requires_grad_()).logits.detach()


def plain_logits(path: Path) -> torch.Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return logits(model)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [*DENSE, "mixtral", "qwen3_moe"])
def test_every_family_exports_what_its_checkpoint_decodes_to(compress, tmp_path, kind):
    checkpoint = compress(kind)
    result = export(checkpoint, tmp_path / "plain", "float32")
    assert_same(plain_logits(tmp_path / "plain"), decoded_logits(checkpoint))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == kind
    assert result.files == 1
    assert any("inputs" in note and "8 bits" in note for note in result.notes)


@pytest.mark.parametrize("code", ["ternary", "iq3_s", "lloyd8"])
def test_every_code_is_decoded(compress, tmp_path, code):
    checkpoint = compress("llama", tied=True, code=code, head="int8")
    export(checkpoint, tmp_path / "plain", "float32")
    assert_same(plain_logits(tmp_path / "plain"), decoded_logits(checkpoint))


def test_a_tied_table_stays_tied(compress, tmp_path):
    export(compress("llama", tied=True), tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("choices", [{}, {"code": "svdquant", "rank": 8, "act_bits": 16}], ids=["twin", "svdquant"])
def test_constants_of_twinquant_become_biases(compress, tmp_path, kind, choices):
    choices = {"format": "twinquant", "rounding": "ldlq", **CALIBRATED, "rank": 64, **choices}
    checkpoint = compress(kind, **choices, learn=False)
    result = export(checkpoint, tmp_path / "plain", "float32")
    assert_same(plain_logits(tmp_path / "plain"), decoded_logits(checkpoint))
    assert any("have biases that the original has not" in note for note in result.notes)
    assert AutoConfig.from_pretrained(tmp_path / "plain").model_type == "llama"


def test_branches_and_learned_axes_are_folded_and_the_head_is_a_table_of_its_own(compress, tmp_path):
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_key_value_heads": 4}
    choices = {"format": "twinquant", "rounding": "ldlq", **CALIBRATED, "rank": 128, "learn": True, "learn_steps": 16}
    checkpoint = compress("llama", True, sizes, **choices)
    assert json.loads((checkpoint / "config.json").read_text())["quantization_config"]["rotated_output"]
    result = export(checkpoint, tmp_path / "plain", "float32")
    assert_same(plain_logits(tmp_path / "plain"), decoded_logits(checkpoint))
    assert any("output head is a table of its own" in note for note in result.notes)
    assert "a table of its own" in (tmp_path / "plain" / "README.md").read_text()


def test_constants_that_have_no_place_are_reported(compress, tmp_path, run):
    choices = {"format": "twinquant", "rounding": "ldlq", **CALIBRATED, "learn": False}
    checkpoint = compress("qwen3", **choices)
    code, out, _ = run("export", checkpoint, tmp_path / "plain", "--dtype", "float32", "--json")
    assert code == 0
    (note,) = [note for note in json.loads(out)["notes"] if "are lost" in note]
    assert note.startswith("6 linears")
    assert "mlp.down_proj first" in note
    assert note in (tmp_path / "plain" / "README.md").read_text()
    found, expected = plain_logits(tmp_path / "plain"), decoded_logits(checkpoint)
    assert (found - expected).norm() < 0.5 * expected.norm()


def test_transformers_alone_loads_an_exported_model(compress, tmp_path):
    checkpoint = compress("mixtral")
    export(checkpoint, tmp_path / "plain", "float32", shard_bytes=100_000)
    assert len(list((tmp_path / "plain").glob("model-0*.safetensors"))) > 1
    program = """
import sys
sys.modules["fewbit"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.decode(tokenizer("all well").input_ids) == "all well"
torch.save(model(torch.arange(40)[None] * 7 % 96).logits.detach(), sys.argv[2])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "plain"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert_same(torch.load(tmp_path / "logits.pt"), decoded_logits(checkpoint))


def test_a_mixture_has_the_names_of_its_release(compress, tmp_path):
    export(compress("mixtral"), tmp_path / "plain")
    names = set(load_file(tmp_path / "plain" / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    assert not any(".mlp." in name for name in names)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("gemma3_text", "float16"), ("mixtral", "bfloat16")])
def test_gguf_goes_in_and_safetensors_come_out(make_tiny, make_mixture, tmp_path, kind, dtype):
    changes = {"query_pre_attn_scalar": 16} if kind == "gemma3_text" else {}
    model = make_mixture(kind) if kind == "mixtral" else make_tiny(kind, kind == "gemma3_text", **changes)
    file = write_gguf(tmp_path / "model.gguf", model)
    result = export(file, tmp_path / "plain", dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.dtype == getattr(torch, dtype)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.to(loaded.dtype), rtol=1e-2, atol=1e-2)
    assert result.notes == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"] == 95


def test_a_model_in_several_files_becomes_one_of_other_files(tiny_models, tmp_path):
    result = export(tiny_models["biased"], tmp_path / "plain", "float32", shard_bytes=60_000)
    assert result.files > 1
    assert torch.equal(plain_logits(tmp_path / "plain"), plain_logits(tiny_models["biased"]))
    assert result.bytes >= 4 * result.weights


def test_a_source_without_a_tokenizer_gives_a_model_without_one_and_says_so(make_tiny, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", make_tiny("qwen2"), tokenizer=False)
    assert export(file, tmp_path / "plain").notes == ["The source has no tokenizer, and so has this model."]
    assert (tmp_path / "plain" / "generation_config.json").exists()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_older_releases_find_rotary_parameters_and_type_under_their_names(make_tiny, tmp_path, kind):
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}
    local = {"rope_type": "default", "rope_theta": 20000.0}
    rope = {"full_attention": scaled, "sliding_attention": local} if kind == "gemma3_text" else scaled
    make_tiny(kind, kind == "gemma3_text", rope_parameters=rope).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "plain", "float16")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["rope_theta"] == 50000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config.get("rope_local_base_freq") == (20000.0 if kind == "gemma3_text" else None)
    assert AutoConfig.from_pretrained(tmp_path / "plain").rope_parameters == rope


def test_an_output_that_exists_is_left_alone(tiny_models, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "precious").touch()
    with pytest.raises(UsageError, match="exists already"):
        export(tiny_models["tied"], tmp_path / "plain")
    with pytest.raises(UsageError, match="unknown dtype 'int8': choose float32, float16, bfloat16"):
        export(tiny_models["tied"], tmp_path / "other", "int8")
    assert os.listdir(tmp_path / "plain") == ["precious"]


def failing(match: str, error: type[FewbitError], source: Path, root: Path, **choices) -> None:
    """An export fails and leaves nothing behind."""
    with pytest.raises(error, match=match):
        export(source, root / "plain", **choices)
    assert [path.name for path in root.iterdir() if "plain" in path.name] == []


def test_weights_that_do_not_fit_a_type_or_are_no_numbers_are_named(tiny_llama_dir, tmp_path):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for value, match, error in (
        (1e5, r"up_proj\.weight: values up to 1e\+05 do not fit float16; use --dtype bfloat16", UsageError),
        (float("nan"), r"up_proj\.weight holds NaN or infinity", NonFiniteWeights),
    ):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, model / "model.safetensors")
        failing(match, error, model, tmp_path, dtype="float16")


def test_a_damaged_checkpoint_is_named_and_leaves_no_output(compress, tmp_path):
    copy = shutil.copytree(compress("llama"), tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    failing("model.safetensors", CorruptFile, copy, tmp_path)


def test_a_full_disk_is_named_before_and_while_it_fills(tiny_llama_dir, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
        failing("has 0 MB free and the model needs", FewbitError, tiny_llama_dir, tmp_path)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    failing("No space left on device; free some space", FewbitError, tiny_llama_dir, tmp_path)


def test_what_a_killed_export_left_is_replaced(tiny_llama_dir, tmp_path):
    (tmp_path / ".plain.partial").mkdir()
    (tmp_path / ".plain.partial" / "model-00007-of-00009.safetensors").touch()
    export(tiny_llama_dir, tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_the_command_prints_what_it_wrote(tiny_models, tmp_path, run):
    code, out, _ = run("export", tiny_models["tied"], tmp_path / "plain", "--shard-size", "60kB")
    assert code == 0
    assert "bfloat16" in out
    code, out, err = run("export", tiny_models["tied"], tmp_path / "plain")
    assert (code, out) == (2, "")
    assert "exists already" in err
