"""Reads a GGUF file as a full-precision model.

Blocks are dequantized by the `gguf` package, the tokenizer comes through transformers. Only architectures that a
family in `fewbit.models` names are read, and any tensor that has no place in the transformers model is an error.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fewbit.checkpoint.damage import check_config, damage_named, shortened, tried
from fewbit.checkpoint.gguf_config import ROPE_FREQS, Metadata, read_config
from fewbit.checkpoint.source import Source, fingerprint_files
from fewbit.checkpoint.tensors import MAX_HEADER, first_line
from fewbit.errors import CorruptFile, UsageError
from fewbit.experts import separate_experts
from fewbit.models import families, get_family

MAX_ITEMS = 2_000_000
"""Values that the lists of a GGUF header may hold together: a vocabulary has some four lists of up to 300 000. The
`gguf` package makes objects of each value, slowly."""
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_KNOWN_TYPES = frozenset(int(kind) for kind in gguf.GGMLQuantizationType)
_MOST_TYPES = 1024  # more ids of block types than llama.cpp and its forks have given
_MOST_VERSIONS = 16  # above, a version is no number of one
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file, or the part of it that is one expert's."""

    entry: Any
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(self.entry.shape[::-1].tolist())
        return whole if self.expert is None else whole[1:]

    def rows(self, rows: slice) -> torch.Tensor:
        data = self.entry.data if self.expert is None else self.entry.data[self.expert]
        return torch.tensor(gguf.dequantize(data[rows], self.entry.tensor_type), dtype=torch.float32)


class GgufSource(Source):
    """One GGUF file, or the first of the parts that llama.cpp splits a large one into.

    The head is tied exactly when the file holds no `output.weight`. A file that stores the table twice,
    at two precisions, is taken at its word: embedding and head are then two tensors.
    """

    def __init__(self, file: Path) -> None:
        self._files = gguf_parts(file)
        self.path = self._files[0]
        readers = [_open(part) for part in self._files]
        metadata = _metadata(self.path, readers[0])
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        promised = int(metadata.whole("split.tensors.count", len(tensors)))
        if int(metadata.whole("split.count", 0)) > len(self._files) or promised > len(tensors):
            raise CorruptFile(f"{self.path}: one of several parts, and the others are not beside it; download them all")
        for name, tensor in tensors.items():
            if tensor.tensor_type not in readable_types():
                raise _unreadable(self.path, name, tensor.tensor_type.name)
        if "token_embd.weight" not in tensors:
            raise CorruptFile(f"{self.path}: has no tensor token_embd.weight; download the file again")
        rope = tensors.pop(ROPE_FREQS, None)
        shapes = {name: _Stored(tensor).shape for name, tensor in tensors.items()}
        self.config = read_config(metadata, shapes, None if rope is None else rope.data)
        self._family = get_family(self.config.model_type)
        self._tensors = self._by_state_name(metadata.architecture, {name: _Stored(t) for name, t in tensors.items()})

    def _by_state_name(self, architecture: str, tensors: dict[str, _Stored]) -> dict[str, _Stored]:
        """Tensors of the file under the names of the transformers state dict, in its order, experts one by one."""
        weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
        check_config(self.config, weights, tensors, self.path)
        with torch.device("meta"), damage_named(self.path, "download it again"):
            model = AutoModelForCausalLM.from_config(self.config)
            separate_experts(model, self._family)
        # Configurations that come out of GGUF name no class; other hosts want one.
        self.config.architectures = [type(model).__name__]
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
        name_map = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        found, used = {}, set()
        for name, parameter in model.state_dict().items():
            if self.tied_embeddings and name == "lm_head.weight":
                continue
            stored, found[name] = self._stored(name, name_map, tensors)
            used.add(stored)
            if found[name].shape != tuple(parameter.shape):
                raise CorruptFile(
                    f"{self.path}: {stored} is {list(found[name].shape)}, the configuration says "
                    f"{list(parameter.shape)}; download the file again"
                )
        if lost := tensors.keys() - used:
            raise UsageError(f"{self.path}: {min(lost)} has no place in {type(model).__name__}; it would be lost")
        return found

    def _stored(self, name: str, name_map: Any, tensors: dict[str, _Stored]) -> tuple[str, _Stored]:
        """Where a tensor of the state dict lies, and its name there."""
        module, _, suffix = name.rpartition(".")
        experts = self._family.experts
        within = experts and re.fullmatch(rf"(.*\.{re.escape(experts.module)})\.(\d+)\.(\w+)", module)
        if not within:
            stored = f"{name_map.get_name(module)}.{suffix}"
            if stored in tensors:
                return stored, tensors[stored]
            raise CorruptFile(f"{self.path}: has no tensor {stored} ({name}); download the file again")
        joined, number = f"{name_map.get_name(f'{within[1]}.{within[3]}')}.{suffix}", int(within[2])
        if joined in tensors and len(tensors[joined].entry.shape) == 3 and number < tensors[joined].shape[0]:
            return joined, _Stored(tensors[joined].entry, number)
        # The first files with mixtures had a tensor per expert.
        apart = joined.replace("_exps.", f".{number}.")
        if apart in tensors:
            return apart, tensors[apart]
        raise CorruptFile(f"{self.path}: {joined} has no expert {number} ({name}); download the file again")

    def names(self) -> list[str]:
        return list(self._tensors)

    def _entry(self, name: str) -> _Stored:
        if name not in self._tensors:
            raise CorruptFile(f"{self.path}: has no tensor {name}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        weight = self._entry(name).rows(slice(None))
        for part, heads in (
            (".self_attn.q_proj.", self.config.num_attention_heads),
            (".self_attn.k_proj.", self.config.num_key_value_heads),
        ):
            if self._family.gguf_permuted and part in name:
                weight = unpermute_rotary(weight, heads)
        return weight - 1 if self._family.gguf_norms_plus_one and name.endswith("norm.weight") else weight

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        entry = self._entry(name)
        permuted = self._family.gguf_permuted and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name)
        if permuted or len(entry.shape) == 1:
            return self.tensor(name)[start:stop]
        return entry.rows(slice(start, stop))

    def fingerprint(self) -> str:
        return fingerprint_files(self._files)

    def tokenizer(self) -> Any:
        try:
            return _load_tokenizer(self.path)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        # A file without a vocabulary ends in whatever transformers looks for first, a vocabulary that contradicts
        # itself in what the library in Rust makes of it, panics too.
        except BaseException as error:
            raise UsageError(
                f"{self.path}: no usable tokenizer ({first_line(error)}); take a file that holds one, or give the "
                "model's Hugging Face directory"
            ) from error

    def copy_tokenizer(self, out_dir: str | Path) -> None:
        GenerationConfig.from_model_config(self.config).save_pretrained(out_dir)
        self.tokenizer().save_pretrained(out_dir)


def _load_tokenizer(file: Path) -> Any:
    """The tokenizer of a file. transformers prefers a `tokenizer.json` in the directory that it is told, so it is told
    one that never holds any."""
    found = AutoTokenizer.from_pretrained(Path(__file__).parent, gguf_file=str(file.resolve()), trust_remote_code=False)
    found.name_or_path = str(file)
    return tried(found)


def gguf_parts(file: Path) -> list[Path]:
    """All parts of a model, in order, of which `file` is one; raises `CorruptFile` for a part that is missing."""
    part = _PART.fullmatch(file.name)
    if part is None:
        return [file]
    files = [file.with_name(f"{part[1]}-{number:05d}-of-{part[3]}.gguf") for number in range(1, int(part[3]) + 1)]
    for other in (file, *files):
        if not other.is_file():
            raise CorruptFile(f"{other}: missing, one of {int(part[3])} parts of a model; download it too")
    return files


@functools.cache
def readable_types() -> tuple[gguf.GGMLQuantizationType, ...]:
    """The types of blocks that the installed `gguf` package decodes."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return tuple(found)


def _unreadable(file: Path, name: str, kind: str) -> UsageError:
    known = ", ".join(known.name for known in readable_types())
    return UsageError(
        f"{file}: {name} has type {kind}, which cannot be read: known are {known}; give a file of another type or the "
        "Hugging Face directory"
    )


def _open(file: Path) -> gguf.GGUFReader:
    check_header(file)
    with damage_named(file, "the file is damaged, download it again"):
        return gguf.GGUFReader(file)


def _metadata(file: Path, reader: gguf.GGUFReader) -> Metadata:
    with damage_named(file, "the file is damaged, download it again"):
        metadata = Metadata(file, reader.fields)
    known = sorted({name for family in families() for name in family.gguf_arch})
    if metadata.architecture not in known:
        raise UsageError(
            f"{file}: GGUF architecture '{metadata.architecture}' is not read: known are {', '.join(known)}; give a "
            "Hugging Face directory"
        )
    return metadata


def unpermute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection `[heads * dim, ...]` from interleaved to half-split rotary order."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def check_header(path: Path) -> int:
    """Walk a GGUF header and return its length in bytes.

    Raises `CorruptFile` unless every count and length stays within `MAX_HEADER` and the file. The `gguf`
    package trusts them, and would loop over an absurd count for hours. Raises `UsageError` for a version, a byte order
    or a type of blocks that it does not read.
    """
    if not path.is_file():
        raise CorruptFile(f"{path}: missing, or no plain file; download it again")
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.take(4) != b"GGUF":
            raise header.damaged("does not start with GGUF")
        header.check_version()
        tensors, fields = header.number(8), header.number(8)
        for _ in range(fields):
            header.skip(header.number(8))
            header.value(header.number(4))
        for _ in range(tensors):
            name = header.take(header.number(8))
            header.skip(8 * header.number(4))
            header.check_type(name)
            header.skip(8)
    return header.at


class _Header:
    """Bounded reading of a GGUF header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.at, self.items = path, 0, 0
        self._data = file.read(MAX_HEADER + 1)

    def damaged(self, why: str) -> CorruptFile:
        return CorruptFile(f"{self.path}: {why}; the file is cut off or damaged, download it again")

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > MAX_HEADER:
            raise self.damaged(f"the header is longer than {MAX_HEADER} bytes")
        if self.at > len(self._data):
            raise self.damaged("the file ends inside its header")

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self._data[self.at - count : self.at]

    def number(self, width: int) -> int:
        return int(struct.unpack("<I" if width == 4 else "<Q", self.take(width))[0])

    def check_version(self) -> None:
        version = self.take(4)
        number, swapped = int.from_bytes(version, "little"), int.from_bytes(version, "big")
        if number in (2, 3):
            return
        if 0 < swapped < _MOST_VERSIONS:
            raise UsageError(
                f"{self.path}: GGUF in big-endian order, which is not read; take a little-endian file, or convert this "
                "one with gguf-convert-endian of the package gguf"
            )
        if 0 < number < _MOST_VERSIONS:
            raise UsageError(
                f"{self.path}: GGUF version {number}, allowed are 2 and 3; take a file of such a version, or give the "
                "model's Hugging Face directory"
            )
        raise self.damaged(f"GGUF version {number}, allowed are 2 and 3")

    def check_type(self, name: bytes) -> None:
        """The type of a tensor's blocks, of which the `gguf` package knows what was there when it was released."""
        kind = self.number(4)
        if kind in _KNOWN_TYPES:
            return
        if kind >= _MOST_TYPES:
            raise self.damaged(f"unknown type {kind} of blocks")
        raise _unreadable(self.path, shortened(name.decode(errors="replace")), f"number {kind}")

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number(8))
        elif kind == _ARRAY:
            item, count = self.number(4), self.number(8)
            self.items += count
            if self.items > MAX_ITEMS:
                raise self.damaged(f"its lists hold more than {MAX_ITEMS} values")
            if item in _SCALAR_BYTES:
                self.skip(_SCALAR_BYTES[item] * count)
            elif item == _STRING:
                # Every string takes eight bytes at least, which bounds the loop.
                for _ in range(count):
                    self.skip(self.number(8))
            else:
                raise self.damaged(f"an array of values of kind {item}")
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        else:
            raise self.damaged(f"unknown kind of value {kind}")
