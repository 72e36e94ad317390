"""Activations between layers, kept on disk: one file per batch of windows, one directory per layer.

Memory then holds one batch whatever the token budget is, and a killed run finds the last complete layer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fewbit.checkpoint.store import read_tensors, write_tensors

Write = Callable[[int, dict[str, torch.Tensor]], None]


class BatchFiles:
    """Numbered generations of batches, each a dictionary of tensors."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _generation(self, number: int) -> Path:
        return self.directory / f"{number:04d}"

    def latest(self) -> int | None:
        """The number of the newest complete generation."""
        numbers = [int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit()]
        return max(numbers, default=None)

    @contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """Gives a function of a batch's number and tensors; the generation exists once the block is left in peace."""
        partial = self._generation(number).with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield lambda batch, tensors: write_tensors(partial / f"{batch:06d}.safetensors", tensors)
        shutil.rmtree(self._generation(number), ignore_errors=True)
        os.replace(partial, self._generation(number))

    def holds(self, number: int, batch: int) -> bool:
        return (self._generation(number) / f"{batch:06d}.safetensors").exists()

    def read(self, number: int, batch: int) -> dict[str, torch.Tensor]:
        """The tensors of one batch; raises `CorruptFile` where the file is damaged or gone."""
        # One batch cannot be made again alone, but all of them can.
        remedy = f"delete {self.directory} and run again"
        return read_tensors(self._generation(number) / f"{batch:06d}.safetensors", remedy)[0]

    def discard(self, number: int) -> None:
        """Free a generation's space."""
        shutil.rmtree(self._generation(number), ignore_errors=True)
