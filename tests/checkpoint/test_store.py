"""Files of a run: what they hold, that they are whole or not there, and what a full disk says."""

from __future__ import annotations

import errno
import os
import tracemalloc

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewbit.checkpoint.damage import read_json
from fewbit.checkpoint.store import ShardedWriter, read_tensors, tensors_hash, write_json, write_tensors
from fewbit.dtypes import NAMES, torch_dtype
from fewbit.errors import CorruptFile, FewbitError

DTYPES = tuple(torch_dtype(name) for name in NAMES)


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, dtype in enumerate((*DTYPES, *DTYPES)):
        values = torch.randint(0, 100, (number % 5 + 1, 3), generator=generator)
        found[f"t{19 - number:02d}.ü" if number % 3 else f"a.{number}"] = values.to(dtype)
    found["scalar"] = torch.tensor(2.5)
    found["empty"] = torch.zeros(0, 4, dtype=torch.float16)
    found["transposed"] = torch.arange(6.0).view(2, 3).t()
    return found


def test_one_shard_is_the_file_that_the_safetensors_library_writes(tmp_path):
    tensors = tensors_of_every_dtype()
    writer = ShardedWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "x").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "x"]


def test_several_shards_stay_below_the_limit_and_hold_everything_once(tmp_path):
    tensors = tensors_of_every_dtype()
    tensors["large"] = torch.arange(1000)
    writer = ShardedWriter(tmp_path, limit=200)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    found = {}
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        sizes = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        assert sizes <= 200 or set(held) == {"large"}
        found |= held
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_writer_takes_nothing_over_from_one_that_was_killed(tmp_path):
    ShardedWriter(tmp_path).add("old", torch.ones(100))
    writer = ShardedWriter(tmp_path)
    writer.add("new", torch.zeros(3))
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["new"], torch.zeros(3))


def test_the_writer_holds_one_tensor_at_a_time(tmp_path):
    writer = ShardedWriter(tmp_path)
    tensor = torch.zeros(1 << 20)
    tracemalloc.start()
    for number in range(16):
        writer.add(f"t{number}", tensor)
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # one copy buffer of 16 MB, and none of the 64 MB of tensors


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(FewbitError, match="free some space"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")[0]["a"], torch.ones(2))


def test_a_failed_write_names_the_file_and_what_to_do(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FewbitError, match=r"report\.json: No space left on device; free some space"):
        write_json(tmp_path / "report.json", {})


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_file_cut_off_is_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(20)}, {"plan": "p"})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match="damaged"):
        read_tensors(path)


def test_hashes_tell_names_shapes_dtypes_and_bytes_apart():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1) * 2},
    ]
    assert tensors_hash(base) == tensors_hash(dict(reversed(base.items())))
    assert len({tensors_hash(tensors) for tensors in (base, *others)}) == 5
