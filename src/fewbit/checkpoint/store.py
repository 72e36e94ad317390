"""Writes and reads the files of a run: shards during it, the finished checkpoint at its end.

Everything is safetensors and JSON, and a file appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fewbit.dtypes import NAMES, name_of
from fewbit.errors import CorruptFile, FewbitError
from fewbit.torch_later import torch

FORMAT_VERSION = 1
RECORD = "fewbit.json"
IMPORT_FIRST = "import-fewbit-first.safetensors"
"""A file of weights that no checkpoint has: what its configuration names for transformers without fewbit, which would
otherwise start the model with random weights."""
SHARD_LIMIT = 4 << 30
_COPY_BYTES = 1 << 24


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error a user understands."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space or write to another disk; the same command then goes on or starts again",
            errno.EACCES: "choose a directory you may write to",
            errno.EROFS: "choose a directory that is not read-only",
        }
        remedy = remedies.get(error.errno or 0, "check the path")
        where = error.filename or path
        raise FewbitError(f"cannot write {where}: {error.strerror or error}; {remedy}") from error
    except SafetensorError as error:
        # safetensors wraps the operating system's error into text.
        raise FewbitError(f"cannot write {path}: {error}; free some space or write to another disk") from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        partial.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename."""
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
            # safetensors makes files that only their owner can read, unlike every other file here.
            partial.chmod(0o644)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_tensors(path: Path, remedy: str = "delete it and run again") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a file and its metadata; raises `CorruptFile` with the remedy where it is damaged or gone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is damaged ({error}); {remedy}") from error


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


class ShardedWriter:
    """Writes tensors into `model*.safetensors` files of bounded size, with the usual index when several.

    A tensor's bytes go to disk when it is added, so memory never holds more than one; the header, which has to
    stand in front of them, is known when a file is full, and the bytes are then copied behind it. The files are
    those that the safetensors library would write.
    """

    def __init__(self, directory: Path, limit: int = SHARD_LIMIT) -> None:
        self._directory = directory
        self._limit = limit
        self._entries: list[tuple[str, str, tuple[int, ...], int, int]] = []
        self._data = directory / "tensors.partial"
        self._size = 0
        self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._entries and self._size + size > self._limit:
            self._flush()
        # The first tensor replaces what a process that was killed may have left.
        with disk_errors(self._data), self._data.open("ab" if self._entries else "wb") as file:
            if size:
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._entries.append((name, name_of(tensor.dtype), tuple(tensor.shape), self._size, size))
        self._size += size
        self._total += size

    def _part(self, index: int) -> Path:
        return self._directory / f"part-{index:05d}.safetensors"

    def _flush(self) -> None:
        # The library's order: widest types first, so that every tensor is aligned, then names.
        ordered = sorted(self._entries, key=lambda entry: (NAMES.index(entry[1]), entry[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape, _, size in ordered:
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        target = self._part(len(self._files))
        with disk_errors(target), target.open("wb") as out, self._data.open("rb") as file:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, _, _, start, size in ordered:
                file.seek(start)
                for done in range(0, size, _COPY_BYTES):
                    out.write(file.read(min(_COPY_BYTES, size - done)))
        self._data.unlink()
        self._files.append(sorted(entry[0] for entry in self._entries))
        self._entries = []
        self._size = 0

    def close(self) -> None:
        """Write what is left, give the files their final names and write the index."""
        if self._entries:
            self._flush()
        count = len(self._files)
        if count == 1:
            os.replace(self._part(0), self._directory / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._files):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._part(index), self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index_data = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self._directory / "model.safetensors.index.json", index_data)
