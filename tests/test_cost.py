"""The benchmark of what compressing costs, on hollow files and a toy."""

from __future__ import annotations

from transformers import LlamaConfig


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=128,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
    )


def test_a_shape_is_predicted_from_headers_alone(tmp_path, import_benchmark):
    cost = import_benchmark("cost")
    cost.write_hollow(tmp_path, config(2))
    files = list(tmp_path.glob("*.safetensors"))
    weights = 2 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 1024 + 2 * 512) + 2 * 128 * 512 + 512
    assert sum(path.stat().st_size for path in files) > 2 * weights
    assert sum(512 * path.stat().st_blocks for path in files) < 64 * 1024
    found = cost.predicted(config(2), "nearest")
    assert found["weights"] == weights
    assert found["predicted"]["seconds"] > 0


def test_calibrating_is_predicted_to_take_longer(import_benchmark):
    cost = import_benchmark("cost")
    nearest, calibrated = (cost.predicted(config(2), rounding)["predicted"] for rounding in ("nearest", "ldlq"))
    assert calibrated["seconds"] > 2 * nearest["seconds"]
    assert calibrated["peak_memory_bytes"] > nearest["peak_memory_bytes"]


def test_what_a_command_says_is_read(import_benchmark):
    assert import_benchmark("cost").fewbit("info")["fewbit"]
