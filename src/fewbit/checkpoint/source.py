"""Opens a full-precision model for reading, one tensor at a time.

A model is a Hugging Face directory with safetensors, a GGUF file, or a hub id. Names are always those of
the transformers state dict and tensors always float32. Nothing is ever unpickled and no code that comes
with a model is run.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.models import Experts, find_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_HEADER = 100_000_000
"""Bytes that the header of a safetensors or GGUF file may take."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**_FLOAT_DTYPES, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_COMPANION_FILES = (*_TOKENIZER_FILES, "chat_template*", "generation_config.json")
_HUB_FILES = [*_COMPANION_FILES, "config.json", "*.safetensors", INDEX]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAMPLES, _SAMPLE_BYTES = 256, 4096


class Source(ABC):
    """A model that can be read.

    `path` is where it lies, `config` its transformers configuration without `quantization_config`.
    """

    path: Path
    config: PretrainedConfig

    @property
    def rotated_tie(self) -> bool:
        """Whether a tied head reads the final norm's outputs times a matrix, the norm's parameter `rotation`."""
        return False

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the embedding table; `names` then holds no `lm_head.weight`."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, as in the transformers state dict, in file order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A fresh float32 tensor; raises `CorruptFile` when the file has none of that name."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, fresh and float32, where possible without reading the others."""

    def weights(self) -> int:
        """The number of weights of the whole model."""
        return sum(math.prod(self.shape(name)) for name in self.names())

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex sha256 that changes when the model does; takes milliseconds.

        Covers every weight file's name, size, header and 256 samples of 4 KiB spread over its contents
        (so that two trainings of one architecture differ), and the configuration.
        """

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer; raises `UsageError` when it has none."""

    @abstractmethod
    def copy_tokenizer(self, out_dir: str | Path) -> None:
        """Put the tokenizer's and the generation configuration's files into `out_dir`."""


class SourceRows:
    """A matrix of a source that is read in slices of rows, as `fewbit.math.rounding` takes it."""

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape(self._name)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._source.rows(self._name, rows.start, rows.stop)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: a file, its name there, and the part of a tensor of all experts that it is."""

    file: str
    name: str
    expert: int | None = None
    first_row: int = 0
    rows: int = 0


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face directory, a `.gguf` file (or a directory that holds exactly one), or a hub id.

    Raises `UsageError` when there is no such model, `CorruptFile` when its files contradict themselves.
    """
    from fewbit.checkpoint.gguf_source import GgufSource

    local = Path(path)
    if not local.exists():
        local = _download(str(path))
    if local.is_file():
        if local.suffix == ".gguf":
            return GgufSource(local)
        raise UsageError(f"{local}: not a model; give a Hugging Face directory, a .gguf file or a hub id")
    if (local / INDEX).is_file() or (local / SINGLE).is_file():
        return SafetensorsSource(local)
    files = sorted(local.glob("*.gguf"))
    if len(files) == 1:
        return GgufSource(files[0])
    if files:
        raise UsageError(f"{local}: holds {len(files)} .gguf files; name one, for example {files[0]}")
    raise UsageError(f"{local}: holds neither {SINGLE} nor {INDEX} nor a .gguf file; pickled .bin weights are not read")


class SafetensorsSource(Source):
    """A Hugging Face directory with one safetensors file, or several and an index."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.config = _load_config(directory)
        files = _shard_files(directory)
        self._files: dict[str, SafetensorsFile] = {}
        self._where: dict[str, _Stored] = {}
        family = find_family(self.config.model_type)
        experts = family.experts if family else None
        for file, promised in files.items():
            self._files[file] = held = SafetensorsFile(directory / file)
            for name in promised - set(held.tensors):
                raise CorruptFile(f"{directory / file}: holds no {name}, which {INDEX} promises; download it again")
            for name, (_, shape, _) in held.tensors.items():
                if self._is_weight(name):
                    self._where |= _entries(file, name, shape, experts)
        for stored in self._where.values():
            dtype = self._files[stored.file].tensors[stored.name][0]
            if dtype not in _FLOAT_DTYPES:
                raise UsageError(
                    f"{directory / stored.file}: {stored.name} has dtype {dtype}; full-precision models have "
                    f"{', '.join(_FLOAT_DTYPES)}: give the model from before its quantization"
                )

    def _is_weight(self, name: str) -> bool:
        # Old checkpoints store rotary frequencies, and a tied head is the embedding a second time.
        return not name.endswith("rotary_emb.inv_freq") and not (self.tied_embeddings and name == "lm_head.weight")

    def names(self) -> list[str]:
        return list(self._where)

    def _stored(self, name: str) -> tuple[_Stored, tuple[int, ...]]:
        """Where the tensor lies, and the shape of what is stored there."""
        if name not in self._where:
            raise CorruptFile(f"{self.path}: has no tensor {name}; download the model again")
        stored = self._where[name]
        return stored, self._files[stored.file].tensors[stored.name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        stored, shape = self._stored(name)
        return shape if stored.expert is None else (stored.rows, *shape[2:])

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self._read(name, 0, 1).view(())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = self.shape(name)
        width = math.prod(shape[1:])
        stop = min(stop, shape[0])
        return self._read(name, start * width, (stop - start) * width).view(stop - start, *shape[1:])

    def _read(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` numbers of a tensor from the number `first` on, float32."""
        stored, shape = self._stored(name)
        if stored.expert is not None:
            first += (stored.expert * shape[1] + stored.first_row) * math.prod(shape[2:])
        return self._files[stored.file].read(stored.name, first, count).float()

    def fingerprint(self) -> str:
        return fingerprint_files([self.path / file for file in sorted(self._files)], self.config)

    def tokenizer(self) -> Any:
        if not any(True for pattern in _TOKENIZER_FILES for _ in self.path.glob(pattern)):
            raise UsageError(f"{self.path}: has no tokenizer files; copy them from the original model")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    def copy_tokenizer(self, out_dir: str | Path) -> None:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        for item in sorted(self.path.iterdir()):
            if item.is_file() and any(fnmatch.fnmatch(item.name, pattern) for pattern in _COMPANION_FILES):
                shutil.copyfile(item, Path(out_dir) / item.name)


def _entries(file: str, name: str, shape: tuple[int, ...], experts: Experts | None) -> dict[str, _Stored]:
    """The tensors that one stored tensor holds, under the names this project gives them."""
    if experts is None:
        return {name: _Stored(file, name)}
    known = name
    for old, new in experts.renames:
        known = known.replace(old, new)
    parent, _, leaf = known.rpartition(".")
    if not parent.endswith(f".{experts.module}") or leaf not in ("gate_up_proj", "down_proj"):
        return {known: _Stored(file, name)}
    count, rows = shape[0], shape[1]
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    each = rows // len(parts)
    return {
        f"{parent}.{expert}.{part}.weight": _Stored(file, name, expert, number * each, each)
        for expert in range(count)
        for number, part in enumerate(parts)
    }


def fingerprint_files(files: list[Path], config: PretrainedConfig) -> str:
    """The digest that `Source.fingerprint` describes."""
    digest = hashlib.sha256(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            # The first sample takes in a header's start; tensors' offsets are in it, so headers of
            # different models differ early, and the other samples are of weights.
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def strip_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration without `quantization_config`, since weights are read as plain float32."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _load_config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory}: has no config.json; a Hugging Face directory holds one beside its weights")
    from transformers import AutoConfig

    try:
        return strip_quantization(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    except (ValueError, OSError, KeyError) as error:
        raise CorruptFile(
            f"{directory / 'config.json'}: {first_line(error)}; models that bring their own code are not run"
        ) from error


def _shard_files(directory: Path) -> dict[str, set[str]]:
    """File name to the tensors that the index promises in it (none for a single file)."""
    index = directory / INDEX
    if not index.is_file():
        return {SINGLE: set()}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{index}: not an index of shards ({first_line(error)}); download the model again") from error
    for file in files:
        # Plain names only: links inside the directory are fine (the hub's cache is made of them).
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CorruptFile(f"{index}: shard {file!r} is not a plain .safetensors name in this directory")
        if not (directory / file).is_file():
            raise CorruptFile(f"{directory / file}: missing, though the index names it; download the model again")
    return files


class SafetensorsFile:
    """Reads pieces of a safetensors file.

    The library would map it; pages of a mapped file count as this process's memory, the whole model in the end, and
    one that is cut off while it is mapped ends the process without a word.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise CorruptFile(f"{path}: header of {size} bytes, allowed are {MAX_HEADER}; the file is damaged")
            try:
                # The library checks that the header and the file fit together.
                with safe_open(path, framework="pt", device="cpu"):
                    header = json.loads(file.read(size))
            except (SafetensorError, OSError, ValueError) as error:
                raise self._damaged(error) from error
        header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: (entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        """Dtype, shape and place in the file."""

    def _damaged(self, error: Exception) -> CorruptFile:
        return CorruptFile(f"{self.path}: {first_line(error)}; the file is cut off or damaged, download it again")

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` numbers of a tensor from the number `first` on."""
        dtype = self.tensors[name][0]
        numbers = torch.empty(count, dtype=_DTYPES[dtype])
        self.read_into(numbers, name, first)
        return numbers

    def read_into(self, numbers: torch.Tensor, name: str, first: int = 0) -> None:
        """Fill a contiguous tensor of the stored dtype with a tensor's numbers from the number `first` on."""
        left = numbers.view(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.tensors[name][2] + first * numbers.element_size())
                while left:
                    done = file.readinto(left)
                    if not done:
                        raise OSError(f"{name} ends too early")
                    left = left[done:]
        except OSError as error:
            raise self._damaged(error) from error


def _download(name: str) -> Path:
    """A snapshot of a hub model, for a `name` that is no local path."""
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: no such file or directory; give a directory, a .gguf file or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    # The hub client raises errors of several HTTP libraries; all of them mean the same to the user.
    except Exception as error:
        raise FewbitError(
            f"{name}: no local path, and the hub did not give it ({type(error).__name__}: {first_line(error)}); "
            "check the name and the network, or give a local directory"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
