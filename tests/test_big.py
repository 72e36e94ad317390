"""The benchmark of an 8B shape, on a shape of a few thousand weights."""

from __future__ import annotations

from transformers import LlamaConfig


def test_a_model_is_written_compressed_and_compared_with_its_bound(tmp_path, monkeypatch, import_benchmark):
    big = import_benchmark("big")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_hidden_layers=3,
        tie_word_embeddings=False,
    )
    monkeypatch.setattr(big, "SHARD_BYTES", 100_000)
    row = big.measure(config, tmp_path, ["--bits", "4"])
    layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64
    assert row["weights"] == 3 * layer + 2 * 96 * 64 + 64
    assert row["source_bytes"] > 2 * row["weights"]
    assert row["bound_bytes"] == 8 * layer + 10**9
    assert row["bits_per_weight"]["body"] > 4
    assert row["peak_memory_bytes"] > 10**8
    assert row["within_bound"] == (row["peak_memory_bytes"] <= row["bound_bytes"])
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1


def test_the_full_shape_has_eight_billion_weights(import_benchmark):
    big = import_benchmark("big")
    config = LlamaConfig(**big.SHAPE, num_hidden_layers=32)
    assert 32 * big.layer_bytes(config) / 4 + 2 * 128256 * 4096 + 4096 == 8_030_261_248
