"""Activations on disk: a generation is complete or not there, and damage is seen."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import CorruptFile
from fewbit.pipeline.batches import BatchFiles


class Stopped(BaseException):
    pass


def stop_while_writing(files: BatchFiles, number: int) -> None:
    with files.writing(number) as write:
        write(0, {"hidden": torch.ones(1)})
        raise Stopped


def test_a_generation_is_there_once_it_is_complete(tmp_path):
    files = BatchFiles(tmp_path / "hidden")
    assert files.latest() is None
    with files.writing(0) as write:
        for number in range(3):
            write(number, {"hidden": torch.full((2, 2), float(number))})
        assert files.latest() is None
    assert files.latest() == 0
    assert files.holds(0, 2)
    assert not files.holds(0, 3)
    assert torch.equal(files.read(0, 1)["hidden"], torch.ones(2, 2))


def test_a_generation_that_is_not_finished_leaves_the_one_before(tmp_path):
    files = BatchFiles(tmp_path)
    with files.writing(9) as write:
        write(0, {"hidden": torch.zeros(1)})
    with pytest.raises(Stopped):
        stop_while_writing(files, 10)
    assert files.latest() == 9
    with files.writing(10) as write:
        write(1, {"hidden": torch.ones(1)})
    assert files.latest() == 10
    assert not files.holds(10, 0)


def test_a_generation_written_again_replaces_the_old_one(tmp_path):
    files = BatchFiles(tmp_path)
    for value in (1.0, 2.0):
        with files.writing(0) as write:
            write(0, {"hidden": torch.tensor([value])})
    assert files.read(0, 0)["hidden"].item() == 2.0
    files.discard(0)
    files.discard(0)
    assert files.latest() is None


def test_damaged_and_missing_batches_are_refused(tmp_path):
    files = BatchFiles(tmp_path)
    with files.writing(0) as write:
        write(0, {"hidden": torch.ones(100)})
    path = tmp_path / "0000" / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="damaged"):
        files.read(0, 0)
    path.unlink()
    with pytest.raises(CorruptFile, match="damaged"):
        files.read(0, 0)
