"""Reading models: every packaging gives the tensors that transformers gives, and damage is named."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.gguf_source import check_header, unpermute_rotary
from fewbit.checkpoint.plain import load_plain, write_plain
from fewbit.checkpoint.source import INDEX, SINGLE, open_source
from fewbit.checkpoint.tensors import MAX_HEADER
from fewbit.errors import CorruptFile, FewbitError, UsageError


@pytest.fixture
def llama(tiny_llama_dir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "llama")


@pytest.fixture
def qwen2(tiny_qwen2_dir, tmp_path):
    return shutil.copytree(tiny_qwen2_dir, tmp_path / "qwen2")


def assert_same_as_transformers(source, **where):
    expected = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where).state_dict()
    if source.tied_embeddings:
        del expected["lm_head.weight"]
    assert set(source.names()) == set(expected)
    for name in source.names():
        tensor = source.tensor(name)
        assert tensor.dtype == torch.float32
        assert tuple(tensor.shape) == source.shape(name)
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_every_tensor_of_a_real_gguf_file_equals_transformers(smollm2_dir, smollm2_source):
    source = smollm2_source
    assert source.tied_embeddings
    assert source.config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(source.config, "quantization_config")
    assert_same_as_transformers(source, pretrained_model_name_or_path=smollm2_dir, gguf_file=source.path.name)


def test_a_single_file_directory_equals_transformers(tiny_llama_dir):
    assert_same_as_transformers(open_source(tiny_llama_dir), pretrained_model_name_or_path=tiny_llama_dir)


def test_a_sharded_directory_equals_transformers(tiny_qwen2_dir):
    assert len(list(tiny_qwen2_dir.glob("*.safetensors"))) > 1
    source = open_source(tiny_qwen2_dir)
    assert not source.tied_embeddings
    assert any(name.endswith("q_proj.bias") for name in source.names())
    assert_same_as_transformers(source, pretrained_model_name_or_path=tiny_qwen2_dir)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_as_float32(llama, dtype):
    weights = load_file(llama / SINGLE)
    save_file({name: value.to(dtype) for name, value in weights.items()}, llama / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(open_source(llama).tensor(name), weights[name].to(dtype).float())


def test_tensors_are_copies_that_do_not_share_the_mapped_file(llama):
    source = open_source(llama)
    source.tensor("model.norm.weight").zero_()
    assert source.tensor("model.norm.weight").abs().sum() > 0


def test_a_file_that_is_cut_off_while_it_is_open_is_named(llama):
    source = open_source(llama)
    with (llama / SINGLE).open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CorruptFile, match=r"model\.safetensors: .* ends too early; the file is cut off"):
        source.tensor("model.norm.weight")
    (llama / SINGLE).unlink()
    with pytest.raises(CorruptFile, match=r"model\.safetensors: .*No such file"):
        source.rows("model.embed_tokens.weight", 3, 5)


def test_rows_are_those_of_the_tensor_and_end_with_it(tiny_llama_dir):
    source = open_source(tiny_llama_dir)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        whole = source.tensor(name)
        assert torch.equal(source.rows(name, 3, 17), whole[3:17])
        assert torch.equal(source.rows(name, len(whole) - 2, len(whole) + 9), whole[-2:])


def test_a_stored_copy_of_a_tied_head_is_not_listed(llama):
    weights = load_file(llama / SINGLE)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, llama / SINGLE)
    assert "lm_head.weight" not in open_source(llama).names()


def test_quantized_weights_are_refused(llama):
    weights = load_file(llama / SINGLE)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4, dtype=torch.int8)
    save_file(weights, llama / SINGLE)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has dtype I8"):
        open_source(llama)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a\\b.safetensors", "x.bin", 3])
def test_an_index_that_leaves_the_directory_is_refused(qwen2, name):
    index = json.loads((qwen2 / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (qwen2 / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match="not a plain"):
        open_source(qwen2)


def test_an_index_that_is_no_index_is_refused(qwen2):
    (qwen2 / INDEX).write_text("{}")
    with pytest.raises(CorruptFile, match="not an index"):
        open_source(qwen2)


def test_a_missing_shard_and_a_missing_tensor_are_named(qwen2):
    index = json.loads((qwen2 / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    (qwen2 / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match=r"model\.extra\.weight"):
        open_source(qwen2)
    shard = qwen2 / index["weight_map"]["model.norm.weight"]
    shard.unlink()
    with pytest.raises(CorruptFile, match=f"{shard.name}: missing"):
        open_source(qwen2)


def test_a_truncated_safetensors_file_is_named(llama):
    data = (llama / SINGLE).read_bytes()
    for length in (4, 100, len(data) - 1):
        (llama / SINGLE).write_bytes(data[:length])
        with pytest.raises(CorruptFile, match=SINGLE) as caught:
            open_source(llama)
        assert "\n" not in str(caught.value)


def test_a_huge_header_is_refused(llama):
    (llama / SINGLE).write_bytes(struct.pack("<Q", MAX_HEADER + 1) + b"{}")
    with pytest.raises(CorruptFile, match="header"):
        open_source(llama)


def test_what_is_no_model_is_a_usage_error(tmp_path, llama):
    with pytest.raises(UsageError, match="no such file"):
        open_source(tmp_path / "nothing" / "here" / "at" / "all")
    with pytest.raises(UsageError, match="neither"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match="not a model"):
        open_source(tmp_path / "notes.txt")
    (llama / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json"):
        open_source(llama)


def test_a_hub_that_cannot_be_reached_gives_one_line_with_a_remedy(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FewbitError, match="no route to host") as caught:
        open_source("someone/some-model")
    assert "\n" not in str(caught.value)
    assert "local directory" in str(caught.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The function `hub(repository)`: it has a hub hold this directory and returns the list of files fetched of it."""
    from huggingface_hub.utils import filter_repo_objects

    def hold(repository):
        fetched, snapshot = [], tmp_path / "snapshots" / "commit"

        def snapshot_download(name, allow_patterns, revision=None):
            assert revision in (None, "commit")
            files = [path.relative_to(repository) for path in sorted(repository.rglob("*")) if path.is_file()]
            for file in filter_repo_objects(map(str, files), allow_patterns=allow_patterns):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(repository / file, snapshot / file)
                fetched.append(file)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return fetched

    return hold


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_weights_that_a_repository_holds_twice_are_fetched_once(hub, request, name):
    repository = request.getfixturevalue(name)
    weights = sorted(path.name for path in repository.glob("*.safetensors"))
    (repository / "original").mkdir()
    for other in ("consolidated.safetensors", "original/model-00001-of-00001.safetensors"):
        shutil.copyfile(repository / weights[0], repository / other)
    fetched = hub(repository)
    source = open_source("someone/some-model")
    assert sorted(file for file in fetched if file.endswith(".safetensors")) == weights
    assert source.names() == open_source(repository).names()


def test_an_index_of_the_hub_that_is_none_is_named(hub, qwen2):
    (qwen2 / INDEX).write_text("{}")
    hub(qwen2)
    with pytest.raises(CorruptFile, match="not an index of shards"):
        open_source("someone/some-model")


def test_a_single_file_goes_before_an_index_that_was_left(llama, qwen2):
    shutil.copyfile(qwen2 / INDEX, llama / INDEX)
    assert_same_as_transformers(open_source(llama), pretrained_model_name_or_path=llama)


def test_a_missing_tokenizer_is_a_usage_error(tiny_llama_dir):
    with pytest.raises(UsageError, match="tokenizer"):
        open_source(tiny_llama_dir).tokenizer()


def test_the_fingerprint_tells_models_apart_and_not_places(llama, tiny_llama_dir):
    before = open_source(tiny_llama_dir).fingerprint()
    assert open_source(llama).fingerprint() == before
    weights = load_file(llama / SINGLE)
    for value in weights.values():
        value += 1e-3
    save_file(weights, llama / SINGLE, metadata={"format": "pt"})
    assert open_source(llama).fingerprint() != before


def test_the_fingerprint_is_the_same_with_every_release_of_transformers(llama, monkeypatch):
    before = open_source(llama).fingerprint()
    monkeypatch.setattr("transformers.__version__", "99.0.0")
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")
    assert open_source(llama).fingerprint() == before


@pytest.mark.slow
def test_the_tokenizer_of_a_gguf_file_is_saved_and_loads_again(smollm2_source, smollm2_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    smollm2_source.copy_tokenizer(tmp_path)
    text = "The printing press, c. 1440 – naïve?"
    copied = AutoTokenizer.from_pretrained(tmp_path)
    assert copied(text)["input_ids"] == smollm2_tokenizer(text)["input_ids"]
    assert copied.chat_template == smollm2_tokenizer.chat_template
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_a_truncated_gguf_file_is_named(smollm2_dir, tmp_path):
    data = next(smollm2_dir.glob("*.gguf")).read_bytes()
    for length in (3, 20, 1000, 1_000_000, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CorruptFile, match=r"cut\.gguf"):
            open_source(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    "tail",
    [
        struct.pack("<QQ", 1 << 60, 0),
        struct.pack("<QQQ", 0, 1, 1 << 50),
        struct.pack("<QQQ4sIIQ", 0, 1, 4, b"name", 9, 4, 1 << 60),
        struct.pack("<QQQ4sIIQ", 0, 1, 4, b"name", 9, 8, 1 << 60),
        struct.pack("<QQQ4sIIQ", 0, 1, 4, b"name", 9, 9, 1 << 60),
        struct.pack("<QQQ4sI", 0, 1, 4, b"name", 77),
    ],
    ids=["tensors", "key length", "array", "strings", "nested array", "kind"],
)
def test_absurd_counts_in_a_gguf_header_are_refused_at_once(tmp_path, tail):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail + bytes(64))
    with pytest.raises(CorruptFile, match=r"bad\.gguf"):
        check_header(path)


def test_several_gguf_files_in_a_directory_must_be_chosen_from(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"2 \.gguf files"):
        open_source(tmp_path)


def test_unpermute_rotary_undoes_the_interleaving():
    half_split = torch.arange(2 * 8 * 3).view(16, 3)
    interleaved = half_split.view(2, 2, 4, 3).transpose(1, 2).reshape(16, 3)
    assert torch.equal(unpermute_rotary(interleaved, heads=2), half_split)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_plain_directory_written_in_shards_gives_the_same_model(make_tiny, tmp_path, kind):
    model = make_tiny(kind)
    write_plain(tmp_path, model.config, model.state_dict().items(), torch.float32, shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-0000*-of-0000*.safetensors"))) > 1
    ids = torch.arange(20)[None]
    for loaded in (load_plain(open_source(tmp_path), torch.float32), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_single_shard_has_the_plain_name_and_a_full_directory_is_not_overwritten(make_tiny, tmp_path):
    model = make_tiny("llama", tied=True)
    tensors = [(name, value) for name, value in model.state_dict().items() if name != "lm_head.weight"]
    write_plain(tmp_path, model.config, tensors)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [SINGLE]
    loaded = load_plain(open_source(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="holds weights already"):
        write_plain(tmp_path, model.config, tensors)


def test_loading_a_model_with_a_missing_tensor_is_an_error(llama):
    weights = load_file(llama / SINGLE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / SINGLE)
    with pytest.raises(CorruptFile, match="up_proj"):
        load_plain(open_source(llama))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_model_saved_without_its_head_has_the_names_of_the_whole_model(make_tiny, tmp_path, kind):
    model = make_tiny(kind, tied=True)
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / SINGLE)
    source = open_source(tmp_path)
    assert_same_as_transformers(source, pretrained_model_name_or_path=tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(load_plain(source, torch.float32)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_of_a_model_saved_without_its_head_are_found(make_mixture, tmp_path, kind):
    model = make_mixture(kind)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(load_plain(open_source(tmp_path), torch.float32)(ids).logits, model(ids).logits)


def test_a_model_that_lost_a_head_of_its_own_generates_no_text(make_tiny, tmp_path):
    make_tiny("llama").model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"has no output head \(lm_head\.weight\).* give the whole language model"):
        load_plain(open_source(tmp_path))


def test_a_model_that_is_no_causal_one_is_named(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'t5' is no causal language model"):
        load_plain(open_source(tmp_path))
