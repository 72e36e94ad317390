"""Weights as native code takes them, read from checkpoints in pieces."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.store import read_tensors, write_tensors
from fewbit.dtypes import NAMES, name_of, numpy_dtype, to_bfloat16, to_float32, torch_dtype
from fewbit.errors import CorruptFile
from fewbit.ops.extension import load_native
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from fewbit.runtime import weights
from fewbit.runtime.decoder import ending_tokens, open_decoder
from fewbit.runtime.torch_decoder import TorchDecoder
from fewbit.runtime.weights import PANEL, Dense, PackedWeights

EMBED = "model.embed_tokens.weight"


@pytest.fixture
def checkpoint(tiny_models, tmp_path):
    """A checkpoint whose embedding and head stay in 16 bits."""
    out = tmp_path / "packed"
    quantize(tiny_models["tied"], out, QuantizeOptions(rounding="nearest", head="bf16"))
    return out


def opened(path) -> PackedWeights:
    native = load_native()
    if native is None:
        pytest.skip("the native extension is not built")
    return PackedWeights(native, Artifact.open(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("piece", [1, 20_000, 1 << 20])
def test_dense_matrices_are_the_stored_ones_in_panels(checkpoint, monkeypatch, dtype, piece):
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    file = checkpoint / "model.safetensors"
    tensors, metadata = read_tensors(file)
    rows = 90  # the last panel is not full
    tensors[EMBED] = stored = tensors[EMBED][:rows].to(dtype) * 1.001
    write_tensors(file, tensors, metadata)
    found = opened(checkpoint).linear("model.embed_tokens")
    assert isinstance(found, Dense)
    assert (found.rows, found.cols) == stored.shape
    wanted = torch.zeros(96, stored.shape[1], dtype=torch.bfloat16)
    wanted[:rows] = stored.bfloat16()
    wanted = wanted.view(3, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint16)
    assert np.array_equal(found.panels, wanted.numpy())


def test_parts_that_are_missing_or_of_another_dtype_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors, metadata = read_tensors(file)
    name = "model.layers.0.mlp.up_proj"
    for change in ({f"{name}.scales": tensors[f"{name}.scales"].float()}, {f"{name}.signs": None}):
        left = {key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}
        write_tensors(file, left, metadata)
        with pytest.raises(CorruptFile, match="copy the checkpoint again"):
            opened(checkpoint).linear(name)


def test_types_have_one_name_everywhere():
    for name in NAMES:
        dtype = torch_dtype(name)
        assert name_of(dtype) == name
        assert numpy_dtype(name).itemsize == dtype.itemsize


def test_numbers_turn_into_float32_and_bfloat16_as_in_torch():
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, 3.4e38, torch.inf, -torch.inf])])
    bits = values.bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values.numpy(), "F32"), bits)
    assert np.array_equal(to_float32(bits, "BF16"), values.bfloat16().float().numpy(), equal_nan=True)
    half = values.clamp(-6e4, 6e4).half()
    assert np.array_equal(to_float32(half.numpy(), "F16"), half.float().numpy(), equal_nan=True)
    assert np.array_equal(to_bfloat16(half.numpy(), "F16"), half.bfloat16().view(torch.uint16).numpy())
    nan = np.array([np.nan], np.float32)
    assert np.isnan(to_float32(to_bfloat16(nan, "F32"), "BF16")).all()


@pytest.mark.parametrize("text", ["[1", "[]", '"eos"'])
def test_a_generation_configuration_that_is_none_is_named(checkpoint, text):
    opened(checkpoint)  # skips without native code
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"generation_config\.json"):
        open_decoder(checkpoint)


def test_a_generation_configuration_says_what_ends_a_text_in_transformers_too(tiny_models, tmp_path, monkeypatch):
    shutil.copytree(tiny_models["tied"], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 70]}')
    for native in (True, False):
        if not native:
            monkeypatch.setattr("fewbit.runtime.decoder.load_native", lambda: None)
        decoder, _ = open_decoder(tmp_path / "model")
        assert decoder.eos == (2, 70)
        decoder.close()


def test_a_configuration_without_positions_runs_in_transformers(tmp_path, add_tokenizer, capfd):
    config = AutoConfig.for_model("bloom", vocab_size=96, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    decoder, _ = open_decoder(tmp_path)
    assert isinstance(decoder, TorchDecoder)
    assert "running in transformers" in capfd.readouterr().err


def test_what_ends_a_text_is_one_token_or_several(tmp_path):
    config = SimpleNamespace(eos_token_id=7)
    assert ending_tokens(tmp_path, config) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert ending_tokens(tmp_path, config) == (2, 3)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ending_tokens(tmp_path, config) == (7,)
