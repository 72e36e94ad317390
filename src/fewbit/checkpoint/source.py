"""Opens a full-precision model for reading, one tensor at a time.

A model is a Hugging Face directory with safetensors, a GGUF file, or a hub id. Names are always those of
the transformers state dict and tensors always float32. Nothing is ever unpickled and no code that comes
with a model is run.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.checkpoint.damage import check_config, damage_named, indexed_files, read_object, shards, tried
from fewbit.checkpoint.tensors import SafetensorsFile, first_line
from fewbit.dtypes import FLOATS
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.models import Experts, Family, find_family
from fewbit.torch_later import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_COMPANION_FILES = (*_TOKENIZER_FILES, "chat_template*", "generation_config.json")
_HUB_FILES = [*_COMPANION_FILES, "config.json", SINGLE, INDEX]
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

        Covers name, size, header and 256 samples of 4 KiB spread over the contents (so that two trainings of one
        architecture differ) of every weight file and of the configuration.
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
    from fewbit.checkpoint.gguf_source import GgufSource, gguf_parts

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
    if files and files == gguf_parts(files[0]):
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
        self._where = _whole_names(self._where, family)
        check_config(self.config, self.weights(), self._where, directory / "config.json")
        for stored in self._where.values():
            dtype = self._files[stored.file].tensors[stored.name][0]
            if dtype not in FLOATS:
                raise UsageError(
                    f"{directory / stored.file}: {stored.name} has dtype {dtype}; full-precision models have "
                    f"{', '.join(FLOATS)}: give the model from before its quantization"
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
        file = self._files[stored.file]
        numbers = torch.from_numpy(file.read(stored.name, first, count))
        return (numbers.view(torch.bfloat16) if file.tensors[stored.name][0] == "BF16" else numbers).float()

    def fingerprint(self) -> str:
        return fingerprint_files([self.path / "config.json", *(self.path / file for file in sorted(self._files))])

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def copy_tokenizer(self, out_dir: str | Path) -> None:
        copy_companions(self.path, Path(out_dir))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Hugging Face directory; raises `UsageError` where it has none."""
    if not any(True for pattern in _TOKENIZER_FILES for _ in directory.glob(pattern)):
        raise UsageError(f"{directory}: has no tokenizer files; copy them from the original model")
    from transformers import AutoTokenizer

    with damage_named(directory, "copy the tokenizer's files from the original model"):
        return tried(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))


def copy_companions(directory: Path, out_dir: Path) -> None:
    """Copy the files of tokenizer, chat template and generation configuration."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for item in sorted(directory.iterdir()):
        if item.is_file() and any(fnmatch.fnmatch(item.name, pattern) for pattern in _COMPANION_FILES):
            shutil.copyfile(item, out_dir / item.name)


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
    if len(shape) != 3 or shape[1] % (2 if leaf == "gate_up_proj" else 1):
        raise CorruptFile(f"{file}: {name} has the shape {list(shape)}, which experts have not; download it again")
    count, rows = shape[0], shape[1]
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    each = rows // len(parts)
    return {
        f"{parent}.{expert}.{part}.weight": _Stored(file, name, expert, number * each, each)
        for expert in range(count)
        for number, part in enumerate(parts)
    }


def _whole_names(found: dict[str, _Stored], family: Family | None) -> dict[str, _Stored]:
    """The names of the whole language model, where a file has those of the model inside it, without `model.`: so
    embedding models are released, and so `AutoModel` saves."""
    prefix = "" if family is None else family.embed.partition(".")[0] + "."
    if family is None or f"{family.embed.removeprefix(prefix)}.weight" not in found:
        return found
    return {name if name.startswith((prefix, f"{family.head}.")) else prefix + name: at for name, at in found.items()}


def fingerprint_files(files: list[Path]) -> str:
    """The digest that `Source.fingerprint` describes. Files alone: what a release of transformers makes of them may
    change."""
    digest = hashlib.sha256()
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
    """The same configuration without what says how weights are stored, since they are read as plain float32."""
    for key in ("quantization_config", "transformers_weights"):
        if hasattr(config, key):
            delattr(config, key)
    return config


def _load_config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory}: has no config.json; a Hugging Face directory holds one beside its weights")
    from transformers import AutoConfig

    read_object(directory / "config.json", "download the model again")
    with damage_named(directory / "config.json", "models that bring their own code are not run"):
        return strip_quantization(AutoConfig.from_pretrained(directory, trust_remote_code=False))


def _shard_files(directory: Path) -> dict[str, set[str]]:
    """File name to the tensors that the index promises in it (none for a single file, which goes before an index, as in
    transformers)."""
    return {SINGLE: set()} if (directory / SINGLE).is_file() else indexed_files(directory / INDEX)


def _download(name: str) -> Path:
    """A snapshot of a hub model, for a `name` that is no local path."""
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: no such file or directory; give a directory, a .gguf file or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        if (found / INDEX).is_file() and not (found / SINGLE).is_file():
            # Of the same commit, which the directory is named after. Some repositories hold the weights twice.
            snapshot_download(name, revision=found.name, allow_patterns=sorted(shards(found / INDEX)))
        return found
    except CorruptFile:
        raise
    # The hub client raises errors of several HTTP libraries; all of them mean the same to the user.
    except Exception as error:
        raise FewbitError(
            f"{name}: no local path, and the hub did not give it ({type(error).__name__}: {first_line(error)}); "
            "check the name and the network, or give a local directory"
        ) from error
