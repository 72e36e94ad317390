"""Finished checkpoints: what verify finds, and what opening refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.source import open_source
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.formats import get_format
from fewbit.loading import load, load_any
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize


@pytest.fixture(scope="module")
def checkpoint(tiny_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "out"
    quantize(tiny_models["biased"], out, QuantizeOptions(rounding="nearest"))
    return out


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit_config(path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_fresh_checkpoint_verifies(checkpoint):
    assert [problem for _, problem in Artifact.open(checkpoint).verify() if problem] == []


def test_one_flipped_bit_is_found_and_named(copy):
    def flip(tensors):
        tensors["model.layers.1.mlp.up_proj.codes"][0, 5] ^= 1

    edit_tensors(copy, flip)
    problems = {name: problem for name, problem in Artifact.open(copy).verify() if problem}
    assert list(problems) == ["model.layers.1.mlp.up_proj.weight"]


def test_a_missing_tensor_is_found_by_verify_and_refused_by_load(copy):
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
    assert any("scales" in problem for _, problem in Artifact.open(copy).verify())
    with pytest.raises(CorruptFile, match=r"model.layers.1.mlp.up_proj.scales"):
        load(copy)


def test_tables_that_no_kernel_multiplies_with_are_refused(copy):
    edit_tensors(copy, lambda tensors: tensors["model.layers.1.mlp.up_proj.tables"].fill_(100))
    damaged = Artifact.open(copy)
    with pytest.raises(CorruptFile, match="sums of the tables"):
        get_format("trellis").dequantize(
            damaged.parts(damaged.modules["model.layers.1.mlp.up_proj"]),
            damaged.modules["model.layers.1.mlp.up_proj"].spec,
        )
    with pytest.raises(CorruptFile, match="sums of the tables"):
        load(copy)


def test_a_missing_plain_tensor_is_refused_by_load_and_not_made_up(copy):
    edit_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CorruptFile, match=r"lacks the tensor model\.norm\.weight"):
        load(copy)


@pytest.mark.parametrize(
    "change",
    [{"weights": 0}, {"weights": 1 << 40}, {"shape": [1 << 30, 1 << 30]}, {"shape": "x"}, {"bytes": None}, {"name": 3},
     {"relative_error": float("nan")}, {"sha256": []}, {"format": None}],
)  # fmt: skip
def test_a_record_that_describes_no_tensors_of_the_files_is_refused(copy, change):
    record = json.loads((copy / "fewbit.json").read_text())
    entry = next(entry for entry in record["tensors"] if entry["format"])
    entry.update(change)
    (copy / "fewbit.json").write_text(json.dumps(record))
    with pytest.raises(CorruptFile, match=r"does not describe|by its record"):
        Artifact.open(copy).check_config()


def test_a_part_of_another_dtype_is_refused(copy):
    def widen(tensors):
        tensors["model.layers.1.mlp.up_proj.scales"] = tensors["model.layers.1.mlp.up_proj.scales"].float()

    edit_tensors(copy, widen)
    artifact = Artifact.open(copy)
    with pytest.raises(CorruptFile, match="F32"):
        artifact.parts(artifact.modules["model.layers.1.mlp.up_proj"])


def test_an_unknown_version_is_refused_with_the_remedy(copy):
    edit_config(copy, lambda quantization: quantization.update(format_version=2))
    with pytest.raises(FewbitError, match="format version 2"):
        Artifact.open(copy)


@pytest.mark.parametrize(
    "change",
    [{"group": 128}, {"bits": 9}, {"format": "magic"}, {"rows": -1}, {"cols": "64"}, {"extra": 1}, {"block": 3}],
)
def test_an_entry_that_no_format_prescribes_is_refused(copy, change):
    edit_config(copy, lambda quantization: quantization["modules"]["model.layers.0.mlp.up_proj"].update(change))
    with pytest.raises(CorruptFile, match=r"model.layers.0.mlp.up_proj"):
        Artifact.open(copy)


def test_shard_paths_may_not_leave_the_directory(copy):
    index = {"weight_map": {"lm_head.codes": "../elsewhere.safetensors"}}
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match="not a plain"):
        _ = Artifact.open(copy).files


def test_a_single_file_goes_before_an_index_that_was_left(copy):
    before = Artifact.open(copy).files
    index = {"weight_map": {"lm_head.codes": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Artifact.open(copy).files == before


def test_a_checkpoint_without_its_record_or_with_a_damaged_configuration_is_named_as_one(copy):
    (copy / "fewbit.json").rename(copy / "kept")
    for read in (Artifact.open, load_any):
        with pytest.raises(CorruptFile, match=r"lacks fewbit\.json; copy the checkpoint again"):
            read(copy)
    (copy / "kept").rename(copy / "fewbit.json")
    (copy / "config.json").write_text("{")
    for read in (Artifact.open, load_any):
        with pytest.raises(CorruptFile, match=r"config\.json is not JSON"):
            read(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CorruptFile, match=r"config\.json is missing"):
        Artifact.open(copy)


@pytest.fixture(scope="module")
def scaled(tiny_models, calibration_text, tmp_path_factory):
    """A checkpoint whose weights are on other axes than the source's."""
    out = tmp_path_factory.mktemp("checkpoints") / "scaled"
    options = QuantizeOptions(format="twinquant", calib_tokens=512, calib_window=64, tune=False, learn=False)
    quantize(tiny_models["tied"], out, options, [calibration_text])
    return out


def test_a_copy_without_its_transform_says_that_it_cannot_be_compared(scaled, tiny_models, tmp_path):
    source = open_source(tiny_models["tied"])
    assert not any(problem for _, problem in Artifact.open(scaled).verify(source))
    copy = shutil.copytree(scaled, tmp_path / "copy")
    (copy / "transform.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no transform\.safetensors, .* copy that file from the checkpoint"):
        list(Artifact.open(copy).verify(source))
    assert not any(problem for _, problem in Artifact.open(copy).verify())


def test_a_damaged_transform_is_to_be_copied_again(scaled, tiny_models, tmp_path):
    source = open_source(tiny_models["tied"])
    path = shutil.copytree(scaled, tmp_path / "copy") / "transform.safetensors"
    save_file({"turns.model.layers.0": torch.ones(3)}, path)
    with pytest.raises(CorruptFile, match=r"holds 'turns\..*', which is no part .*; copy the checkpoint again"):
        list(Artifact.open(path.parent).verify(source))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CorruptFile, match=r"transform\.safetensors is damaged .*; copy the checkpoint again"):
        list(Artifact.open(path.parent).verify(source))


def test_a_header_larger_than_any_honest_one_is_refused(copy):
    (copy / "model.safetensors").write_bytes((200 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptFile, match="exceeds the limit"):
        _ = Artifact.open(copy).files


def test_a_truncated_file_is_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFile, match="damaged"):
        _ = Artifact.open(copy).files


def test_other_directories_are_refused_with_the_remedy(tiny_models, tmp_path):
    with pytest.raises(UsageError, match="fewbit quantize"):
        Artifact.open(tiny_models["tied"])
    with pytest.raises(UsageError, match="does not exist"):
        Artifact.open(tmp_path / "nothing")


def test_several_shards_load_like_one(tiny_models, tmp_path, monkeypatch):
    from fewbit.pipeline import finish

    options = QuantizeOptions(rounding="nearest")
    quantize(tiny_models["tied"], tmp_path / "one", options)
    writer = finish.ShardedWriter
    monkeypatch.setattr(finish, "ShardedWriter", lambda directory: writer(directory, limit=20_000))
    quantize(tiny_models["tied"], tmp_path / "many", options)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    ids = torch.arange(20)[None] + 5
    logits = [load(tmp_path / name, torch.float32)[0](ids).logits for name in ("one", "many")]
    assert torch.equal(*logits)
