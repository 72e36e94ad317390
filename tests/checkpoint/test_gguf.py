"""GGUF files of every family and type give the model they were written from, and what cannot be read is named."""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
import torch

from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.gguf_source import readable_types
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from gguf_files import logits, write_gguf

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
MIXTURES = ("mixtral", "qwen3_moe")
# What a GGUF file has no key for is as llama.cpp takes it.
IMPLIED = {
    "qwen3_moe": {"norm_topk_prob": True},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def make(make_tiny, make_mixture):
    """The function `make(kind, **changes)`: a tiny model that a GGUF file can describe."""

    def one(kind: str, **changes):
        if kind in MIXTURES:
            return make_mixture(kind, **IMPLIED.get(kind, {}))
        tied = changes.pop("tied", kind == "gemma3_text")
        return make_tiny(kind, tied, **(IMPLIED.get(kind, {}) | changes))

    return one


def imported(path):
    return load_plain(open_source(path), torch.float32)


@pytest.mark.parametrize("kind", DENSE + MIXTURES)
def test_a_float32_file_of_every_family_gives_the_same_logits(make, tmp_path, kind):
    model = make(kind)
    found = imported(write_gguf(tmp_path / "model.gguf", model))
    expected, weights = model.state_dict(), found.state_dict()
    assert set(weights) == set(expected)
    for name, value in expected.items():
        # Gemma's 1 is added in float32, and taken away again.
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6 if kind == "gemma3_text" else 0)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_files_in_blocks_give_what_the_blocks_decode_to(make, tmp_path, kind, family):
    model = make(family)
    found = imported(write_gguf(tmp_path / "model.gguf", model, kind)).state_dict()
    for name, value in model.state_dict().items():
        if value.ndim == 1:
            assert torch.equal(found[name], value)
            continue
        blocks = gguf.GGMLQuantizationType[kind]
        decoded = torch.tensor(gguf.dequantize(gguf.quantize(value.numpy(), blocks), blocks))
        assert torch.equal(found[name], decoded), name


def test_eight_bits_change_logits_little(make, tmp_path):
    model = make("qwen3")
    off = (logits(imported(write_gguf(tmp_path / "model.gguf", model, "Q8_0"))) - logits(model)).square().mean().sqrt()
    assert off < 0.02 * logits(model).square().mean().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "most"),
    [("Q2_K", 0.4), ("Q3_K", 0.2), ("Q4_K", 0.1), ("Q5_K", 0.05), ("Q6_K", 0.03), ("IQ4_XS", 0.1), ("IQ3_S", 0.2),
     ("IQ2_XS", 0.4)],
)  # fmt: skip
def test_blocks_made_by_llama_cpp_are_near_the_weights(make_tiny, import_benchmark, tmp_path, kind, most):
    quantizers = import_benchmark("quantizers")
    model = make_tiny("llama", hidden_size=256, head_dim=64, intermediate_size=256)

    def encode(kind: str, matrix: np.ndarray) -> np.ndarray:
        # The smallest types are not made without an importance matrix.
        return quantizers.quantize_rows(kind, torch.tensor(matrix), torch.ones(matrix.shape[1]))[0]

    found = imported(write_gguf(tmp_path / "model.gguf", model, kind, encode=encode)).state_dict()
    for name, value in model.state_dict().items():
        assert (found[name] - value).norm() <= most * value.norm(), name


def test_the_usual_types_can_be_read():
    names = {kind.name for kind in readable_types()}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert names >= {f"Q{bits}_K" for bits in range(2, 7)}
    assert names >= {"IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_file_without_a_head_is_tied(make, tmp_path, kind):
    model = make(kind, tied=True)
    found = imported(write_gguf(tmp_path / "model.gguf", model))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_heads_of_any_size_are_found(make, tmp_path, kind):
    changes = {"query_pre_attn_scalar": 32} if kind == "gemma3_text" else {}
    model = make(kind, head_dim=32, **changes)
    torch.testing.assert_close(logits(imported(write_gguf(tmp_path / "m.gguf", model))), logits(model))


def test_biases_of_attention_and_feed_forward_are_found(make, tmp_path):
    model = make("llama", attention_bias=True, mlp_bias=True)
    torch.testing.assert_close(logits(imported(write_gguf(tmp_path / "m.gguf", model))), logits(model))


def add_factors(tensors: dict[str, np.ndarray]) -> None:
    """llama.cpp's `rope_freqs.weight` for the rule of `LLAMA3`, as its converter computes it."""
    factors = []
    for frequency in 1 / LLAMA3["rope_theta"] ** (np.arange(0, 16, 2) / 16):
        wavelength, original = 2 * np.pi / frequency, LLAMA3["original_max_position_embeddings"]
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(LLAMA3["factor"])
        else:
            smooth = (original / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / LLAMA3["factor"] + smooth))
    tensors["rope_freqs.weight"] = np.array(factors, np.float32)


def test_the_rule_behind_llama_3_s_rotary_factors_is_found(make, tmp_path):
    model = make("llama", rope_parameters=dict(LLAMA3))
    path = write_gguf(tmp_path / "model.gguf", model, change=add_factors)
    assert open_source(path).config.rope_parameters == LLAMA3
    torch.testing.assert_close(logits(imported(path)), logits(model))


def test_rotary_factors_without_a_known_rule_are_refused(make, tmp_path):
    def odd(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32)

    with pytest.raises(UsageError, match=r"rope_freqs\.weight.* no known rule .* Hugging Face directory"):
        open_source(write_gguf(tmp_path / "model.gguf", make("llama"), change=odd))


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


@pytest.mark.parametrize(
    ("kind", "fields", "scaling"),
    [
        ("llama", linear, {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("gemma3_text", linear, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_scaled_rotary_positions_are_found(make, tmp_path, kind, fields, scaling):
    whole = {"rope_theta": 50000.0, **scaling}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    rope = {"full_attention": whole, "sliding_attention": local} if kind == "gemma3_text" else whole
    model = make(kind, rope_parameters=rope)
    found = imported(write_gguf(tmp_path / "model.gguf", model, fields=fields))
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-4)
    plain = make(kind, rope_parameters={**rope, **({} if kind == "gemma3_text" else {"rope_type": "default"})})
    assert kind == "gemma3_text" or not torch.allclose(logits(plain), logits(model), atol=1e-3)


def test_scaling_that_is_not_known_is_refused(make, tmp_path):
    def longrope(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    with pytest.raises(UsageError, match=r"rotary scaling 'longrope' .* Hugging Face directory"):
        open_source(write_gguf(tmp_path / "model.gguf", make("llama"), fields=longrope))


def test_rows_are_those_of_the_tensor(make, tmp_path):
    source = open_source(write_gguf(tmp_path / "model.gguf", make("mixtral"), "Q4_0"))
    for name in source.names():
        whole = source.tensor(name)
        assert tuple(whole.shape) == source.shape(name)
        assert torch.equal(source.rows(name, 3, 17), whole[3:17]), name


def test_a_mixture_with_a_tensor_per_expert_is_read(make, tmp_path):
    model = make("mixtral")

    def apart(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if "_exps." in name]:
            for number, matrix in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps.", f".{number}.")] = matrix

    torch.testing.assert_close(logits(imported(write_gguf(tmp_path / "m.gguf", model, change=apart))), logits(model))


def split(path, parts: int):
    """The file in several, as llama-gguf-split makes them."""
    reader = gguf.GGUFReader(path)
    written = []
    for number in range(parts):
        written.append(path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf"))
        writer = gguf.GGUFWriter(written[-1], "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith(("GGUF.", "general.architecture")):
                    continue
                item = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], item)
        else:
            writer.kv_data[0].pop("general.architecture")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return written


def test_a_model_in_several_files_is_one_whichever_is_named(make, tmp_path):
    model = make("llama", tied=True)
    files = split(write_gguf(tmp_path / "model.gguf", model), 3)
    for path in (files[1], tmp_path):
        assert torch.equal(logits(imported(path)), logits(model))
    before = open_source(files[0]).fingerprint()
    assert before == open_source(files[2]).fingerprint()
    files[2].unlink()
    with pytest.raises(CorruptFile, match=r"model-00003-of-00003\.gguf: missing, one of 3 parts"):
        open_source(files[0])
    files[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CorruptFile, match="one of several parts"):
        open_source(tmp_path / "alone.gguf")


def test_the_tokenizer_and_its_chat_template_are_kept(make, tmp_path):
    from transformers import AutoTokenizer

    source = open_source(write_gguf(tmp_path / "model.gguf", make("qwen2")))
    source.copy_tokenizer(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "all the things, 7 of them"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("the").input_ids == [94, ord("e") - 32]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"


def test_a_file_without_a_tokenizer_is_read_and_says_so_when_one_is_wanted(make, tmp_path):
    source = open_source(write_gguf(tmp_path / "model.gguf", make("qwen2"), tokenizer=False))
    assert source.names()
    with pytest.raises(UsageError, match="no usable tokenizer"):
        source.tokenizer()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_tokenizer_beside_the_file_is_not_taken_for_its_own(make, add_tokenizer, tmp_path, kind):
    source = open_source(write_gguf(tmp_path / "model.gguf", make(kind)))
    before = source.tokenizer()
    add_tokenizer(tmp_path)
    after = source.tokenizer()
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template
    assert after.chat_template == before.chat_template
    assert after.eos_token == "<|end|>"


class Panic(BaseException):
    """What a library in Rust raises where it gives up."""


@pytest.mark.parametrize("error", [Exception("no such merge"), Panic("no such merge")])
def test_whatever_a_library_makes_of_a_vocabulary_is_named(make, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    source = open_source(write_gguf(tmp_path / "model.gguf", make("qwen2")))
    monkeypatch.setattr("fewbit.checkpoint.gguf_source.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UsageError, match=r"no usable tokenizer \(no such merge\)"):
        source.tokenizer()


def test_a_file_without_a_tokenizer_is_rounded_to_nearest(make, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", make("qwen2"), tokenizer=False)
    quantize(file, tmp_path / "out", QuantizeOptions(rounding="nearest"))
    assert not any(problem for _, problem in Artifact.open(tmp_path / "out").verify(open_source(file)))
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def ends_of_turns(writer: gguf.GGUFWriter) -> None:
    writer.add_eot_token_id(90)
    writer.add_eom_token_id(91)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2", "gemma3_text"])
def test_ends_of_turns_and_of_messages_end_an_answer(make, tmp_path, kind):
    from fewbit.runtime.decoder import ending_tokens

    source = open_source(write_gguf(tmp_path / "model.gguf", make(kind), fields=ends_of_turns))
    assert source.config.eos_token_id == [95, 90, 91]
    source.copy_tokenizer(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [95, 90, 91]
    assert ending_tokens(tmp_path / "out", source.config) == (95, 90, 91)


def test_an_end_that_is_there_already_or_outside_the_vocabulary_is_not_added(make, tmp_path):
    def odd_ends(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(95)
        writer.add_eom_token_id(96)

    assert open_source(write_gguf(tmp_path / "model.gguf", make("qwen2"), fields=odd_ends)).config.eos_token_id == 95


def test_a_file_that_is_called_mistral_gets_no_window(make, tmp_path):
    model = make("llama")
    path = write_gguf(tmp_path / "model.gguf", model, fields=lambda writer: writer.add_name("mistral"))
    assert getattr(open_source(path).config, "sliding_window", None) is None
    torch.testing.assert_close(logits(imported(path)), logits(model))


def test_a_file_cut_off_anywhere_is_named(make, tmp_path):
    data = write_gguf(tmp_path / "model.gguf", make("llama"), "Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 20, 300, 3000, len(data) // 2, len(data) - 100):
        cut.write_bytes(data[:length])
        with pytest.raises(CorruptFile, match=r"cut\.gguf") as caught:
            open_source(cut)
        assert "\n" not in str(caught.value)


def resized(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-32].copy()


def fewer_experts(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"][:-1].copy()


def incomplete(tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.attn_k.weight"]


def without_table(tensors: dict[str, np.ndarray]) -> None:
    del tensors["token_embd.weight"]


def more(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.attn_sinks.weight"] = np.zeros(4, np.float32)


def integers(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].astype(np.int32)


@pytest.mark.parametrize(
    ("kind", "change", "error", "words"),
    [
        ("llama", resized, CorruptFile, r"blk\.1\.ffn_up\.weight is \[96, 64\], the configuration says \[128, 64\]"),
        ("mixtral", fewer_experts, CorruptFile, r"blk\.1\.ffn_up_exps\.weight has no expert 3"),
        ("qwen3", incomplete, CorruptFile, r"has no tensor blk\.1\.attn_k\.weight"),
        ("qwen3", without_table, CorruptFile, r"has no tensor token_embd\.weight"),
        ("llama", more, UsageError, r"blk\.0\.attn_sinks\.weight has no place in LlamaForCausalLM"),
        ("llama", integers, UsageError, r"blk\.1\.ffn_up\.weight has type I32, which cannot be read: known are F32"),
    ],
)
def test_tensors_that_do_not_make_the_model_are_named(make, tmp_path, kind, change, error, words):
    with pytest.raises(error, match=words):
        open_source(write_gguf(tmp_path / "model.gguf", make(kind), change=change))


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (31, UsageError, r"blk\.1\.ffn_up\.weight' has type number 31, which cannot be read: known are F32"),
        (36, UsageError, "has type number 36, .* give a file of another type"),
        (0x40000000, CorruptFile, "unknown type 1073741824 of blocks; the file is cut off or damaged"),
    ],
)
def test_blocks_that_the_package_does_not_know_are_no_damage(make, tmp_path, kind, error, words):
    path = write_gguf(tmp_path / "model.gguf", make("llama"))
    data, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and two of them
    data[place : place + 4] = struct.pack("<I", kind)
    path.write_bytes(data)
    with pytest.raises(error, match=words):
        open_source(path)


@pytest.mark.parametrize(
    ("version", "error", "words"),
    [
        (struct.pack("<I", 1), UsageError, "GGUF version 1, allowed are 2 and 3; take a file of such a version"),
        (struct.pack("<I", 4), UsageError, "GGUF version 4"),
        (struct.pack(">I", 3), UsageError, "big-endian order, which is not read; .* convert"),
        (b"\xff\x12\x34\x56", CorruptFile, "download it again"),
    ],
)
def test_versions_and_byte_orders_that_are_not_read_are_no_damage(make, tmp_path, version, error, words):
    path = write_gguf(tmp_path / "model.gguf", make("llama"))
    path.write_bytes(b"GGUF" + version + path.read_bytes()[8:])
    with pytest.raises(error, match=words):
        open_source(path)


def test_an_unknown_architecture_and_metadata_that_lack_a_key_are_refused(tmp_path):
    for arch, error, words in (
        ("falcon", UsageError, "architecture 'falcon' is not read: known are gemma3, llama, qwen2, qwen3, qwen3moe"),
        ("llama", FewbitError, "no usable configuration"),
    ):
        writer = gguf.GGUFWriter(tmp_path / f"{arch}.gguf", arch)
        writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(error, match=words):
            open_source(tmp_path / f"{arch}.gguf")
