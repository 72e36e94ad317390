"""Reads a GGUF file as a full-precision model.

Blocks are dequantized by the `gguf` package, configuration and tokenizer come through transformers. Only
architectures that a family in `fewbit.models` names are read, and any tensor that has no place in the
transformers model is an error.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fewbit.checkpoint.source import Source, fingerprint_files, strip_quantization
from fewbit.checkpoint.tensors import MAX_HEADER, first_line
from fewbit.errors import CorruptFile, UsageError
from fewbit.models import Family, families

_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class GgufSource(Source):
    """One GGUF file.

    The head is tied exactly when the file holds no `output.weight`. A file that stores the table twice,
    at two precisions, is taken at its word: embedding and head are then two tensors.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        check_header(file)
        try:
            reader = gguf.GGUFReader(file)
            architecture = str(reader.fields["general.architecture"].contents())
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise CorruptFile(f"{file}: {first_line(error)}; the file is damaged, download it again") from error
        self._family = _family(file, architecture)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if "rope_freqs.weight" in tensors:
            raise UsageError(
                f"{file}: scaled rotary frequencies (rope_freqs.weight) are stored as numbers, and the rule "
                "behind them is not; give the model's Hugging Face directory"
            )
        if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
            raise UsageError(f"{file}: one of several parts of a model; join them with llama-gguf-split --merge")
        try:
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CorruptFile(f"{file}: no usable configuration ({first_line(error)}); download it again") from error
        self.config = strip_quantization(config)
        self._tensors = self._by_state_name(architecture, tensors)

    def _by_state_name(self, architecture: str, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors of the file under the names of the transformers state dict, in its order."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        # Configurations that come out of GGUF name no class; other hosts want one.
        self.config.architectures = [type(model).__name__]
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
        name_map = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        found = {}
        for name, parameter in model.state_dict().items():
            if self.tied_embeddings and name == "lm_head.weight":
                continue
            module, _, suffix = name.rpartition(".")
            stored = f"{name_map.get_name(module)}.{suffix}"
            if stored not in tensors:
                raise CorruptFile(f"{self.path}: has no tensor {stored} ({name}); download the file again")
            found[name] = tensors.pop(stored)
            if tuple(found[name].shape[::-1].tolist()) != tuple(parameter.shape):
                raise CorruptFile(
                    f"{self.path}: {stored} is {found[name].shape[::-1].tolist()}, the configuration says "
                    f"{list(parameter.shape)}; download the file again"
                )
        if tensors:
            raise UsageError(f"{self.path}: {min(tensors)} has no place in {type(model).__name__}; it would be lost")
        return found

    def names(self) -> list[str]:
        return list(self._tensors)

    def _entry(self, name: str) -> Any:
        if name not in self._tensors:
            raise CorruptFile(f"{self.path}: has no tensor {name}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape[::-1].tolist())

    def _dequantize(self, name: str, rows: slice) -> torch.Tensor:
        entry = self._entry(name)
        try:
            values = gguf.dequantize(entry.data[rows], entry.tensor_type)
        except NotImplementedError as error:
            raise UsageError(f"{self.path}: {name} has type {entry.tensor_type.name}, which cannot be read") from error
        return torch.tensor(values, dtype=torch.float32)

    def tensor(self, name: str) -> torch.Tensor:
        weight = self._dequantize(name, slice(None))
        for part, heads in (
            (".self_attn.q_proj.", self.config.num_attention_heads),
            (".self_attn.k_proj.", self.config.num_key_value_heads),
        ):
            if self._family.gguf_permuted and part in name:
                weight = unpermute_rotary(weight, heads)
        return weight

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self._family.gguf_permuted and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name):
            return self.tensor(name)[start:stop]
        return self._dequantize(name, slice(start, stop))

    def fingerprint(self) -> str:
        return fingerprint_files([self.path], self.config)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)

    def copy_tokenizer(self, out_dir: str | Path) -> None:
        self.tokenizer().save_pretrained(out_dir)
        GenerationConfig.from_model_config(self.config).save_pretrained(out_dir)


def unpermute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection `[heads * dim, ...]` from interleaved to half-split rotary order."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _family(file: Path, architecture: str) -> Family:
    for family in families():
        if architecture in family.gguf_arch:
            return family
    known = ", ".join(sorted(name for family in families() for name in family.gguf_arch))
    raise UsageError(
        f"{file}: GGUF architecture '{architecture}' is not read: known are {known}; give a Hugging Face directory"
    )


def check_header(path: Path) -> int:
    """Walk a GGUF header and return its length in bytes.

    Raises `CorruptFile` unless every count and length stays within `MAX_HEADER` and the file. The `gguf`
    package trusts them, and would loop over an absurd count for hours.
    """
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.take(4) != b"GGUF":
            raise header.damaged("does not start with GGUF")
        version = header.number(4)
        if version not in (2, 3):
            raise header.damaged(f"GGUF version {version}, allowed are 2 and 3 in little-endian order")
        tensors, fields = header.number(8), header.number(8)
        for _ in range(fields):
            header.skip(header.number(8))
            header.value(header.number(4))
        for _ in range(tensors):
            header.skip(header.number(8))
            header.skip(8 * header.number(4) + 12)
    return header.at


class _Header:
    """Bounded reading of a GGUF header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.at = path, 0
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

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number(8))
        elif kind == _ARRAY:
            item, count = self.number(4), self.number(8)
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
