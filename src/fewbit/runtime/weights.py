"""The weights of a checkpoint as native code takes them, read one tensor at a time.

Nothing here builds a transformers model: that takes longer than reading the weights does. Files are read, not mapped,
so that a weight is in memory once, where and how this machine multiplies with it fastest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fewbit.checkpoint.artifact import Artifact, QuantizedModule, is_artifact
from fewbit.checkpoint.source import SafetensorsFile, Source, open_source
from fewbit.checkpoint.store import read_json
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.formats import TensorSpec
from fewbit.formats.twinquant import both_spec, down_spec
from fewbit.ops.cpu import native_matrix
from fewbit.ops.layouts import place

PANEL = 32  # rows of a dense matrix that stand side by side


class CannotLower(FewbitError):
    """A model that programs do not know; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """How inputs are quantized for packed matrices: the rotation, the scale group, the width and a shift."""

    block: int
    group: int
    act_bits: int
    signs: torch.Tensor | None
    shift: torch.Tensor | None

    def same(self, other: Inputs) -> bool:
        """Whether the same quantized inputs serve both."""
        numbers = (self.block, self.group, self.act_bits) == (other.block, other.group, other.act_bits)
        return numbers and _equal(self.signs, other.signs) and _equal(self.shift, other.shift)


@dataclass(frozen=True)
class Packed:
    """A packed matrix `[rows, cols]` as a native object, with the low-rank component's if it has one."""

    rows: int
    cols: int
    inputs: Inputs
    matrix: Any
    down: Any = None


@dataclass(frozen=True)
class Dense:
    """A bfloat16 matrix `[rows, cols]` in panels of 32 rows that stand side by side, as its bits uint16
    `[ceil(rows / 32), cols, 32]`, with a bias float32 `[rows]` or None."""

    rows: int
    cols: int
    panels: torch.Tensor
    bias: torch.Tensor | None


Linear = Packed | Dense


class Weights(ABC):
    """Read access to a model's weights by the names of its modules."""

    config: Any

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        self._loaded: dict[str, Linear] = {}

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a plain tensor of that full name."""

    @abstractmethod
    def vector(self, name: str) -> torch.Tensor:
        """A plain tensor, float32."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where it has none."""

    @abstractmethod
    def _load(self, module: str) -> Linear: ...

    def maybe_vector(self, name: str) -> torch.Tensor | None:
        return self.vector(name) if self.has(name) else None

    def linear(self, module: str) -> Linear:
        """A linear or a table. The same module twice is one object."""
        if module not in self._loaded:
            self._loaded[module] = self._load(module)
        return self._loaded[module]

    def has_linear(self, module: str) -> bool:
        return self.has(f"{module}.weight")

    def huge(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor in huge pages, where the system has them."""
        size = tensor.numel() * tensor.element_size()
        memory = self.native.huge_bytes(size)
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        self.native.place(flat.view(1, -1), memory.view(1, -1), 4, 1)
        return memory.view(tensor.dtype).view(tensor.shape)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
        """A matrix of any float dtype, kept in bfloat16."""
        rows, cols = weight.shape
        count = -(-rows // PANEL)
        memory = self.native.huge_bytes(2 * count * PANEL * cols).view(torch.bfloat16).view(count, cols, PANEL)
        whole = rows // PANEL
        memory[:whole] = weight[: whole * PANEL].view(whole, PANEL, cols).transpose(1, 2)
        if whole < count:
            memory[whole] = 0
            memory[whole, :, : rows % PANEL] = weight[whole * PANEL :].T
        return Dense(rows, cols, memory.view(torch.uint16), bias)


class PlainWeights(Weights):
    """A full-precision model, kept in bfloat16."""

    def __init__(self, native: ModuleType, source: Source) -> None:
        super().__init__(native)
        self.source, self.config = source, source.config
        self._names = set(source.names())

    def has(self, name: str) -> bool:
        return name in self._names

    def vector(self, name: str) -> torch.Tensor:
        # As `load_plain` rounds all parameters.
        return self.source.tensor(name).to(torch.bfloat16).float()

    def tokenizer(self) -> Any:
        try:
            return self.source.tokenizer()
        except UsageError:
            return None

    def _load(self, module: str) -> Linear:
        return self.dense(self.source.tensor(f"{module}.weight"), self.maybe_vector(f"{module}.bias"))


class PackedWeights(Weights):
    """A fewbit checkpoint."""

    def __init__(self, native: ModuleType, artifact: Artifact) -> None:
        super().__init__(native)
        self.artifact = artifact
        self.config = _configuration(artifact)
        self._files = {name: SafetensorsFile(artifact.path / name) for name in sorted(set(artifact.files.values()))}

    def has(self, name: str) -> bool:
        return name in self.artifact.files

    def has_linear(self, module: str) -> bool:
        return module in self.artifact.modules or super().has_linear(module)

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.artifact.files:
            raise CorruptFile(f"{self.artifact.path} lacks the tensor {name}; copy the checkpoint again")
        file = self._files[self.artifact.files[name]]
        if name not in file.tensors:
            raise CorruptFile(f"{file.path} lacks the tensor {name}, which the index promises; copy it again")
        shape = file.tensors[name][1]
        return file.read(name, 0, math.prod(shape)).view(shape)

    def vector(self, name: str) -> torch.Tensor:
        return self._read(name).float()

    def tokenizer(self) -> Any:
        return _tokenizer(self.artifact.path)

    def _load(self, module: str) -> Linear:
        bias = self.maybe_vector(f"{module}.bias")
        description = self.artifact.modules.get(module)
        if description is None:
            return self.dense(self._read(f"{module}.weight"), bias)
        spec = description.spec
        if spec.format not in ("trellis", "twinquant") or (spec.format == "trellis" and spec.block == 1):
            raise CannotLower(f"{module}: weights of {spec} have no native step")
        if spec.act_bits == 16:
            raise CannotLower(f"{module}: inputs of 16 bits have no native step")
        parts = self._parts(description)
        if spec.format == "trellis":
            return self._trellis(spec, parts, bias)
        return self._twin(spec, parts, bias)

    def _parts(self, module: QuantizedModule) -> dict[str, torch.Tensor]:
        """The stored parts of a module, checked against its layout."""
        parts = {}
        for part, (shape, dtype) in module.layout().items():
            tensor = parts[part] = self._read(f"{module.name}.{part}")
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise CorruptFile(
                    f"{module.name}.{part}: {tensor.dtype} {tuple(tensor.shape)} where the format has "
                    f"{dtype} {tuple(shape)}; copy the checkpoint again"
                )
        return parts

    def _trellis(self, spec: TensorSpec, parts: dict[str, torch.Tensor], bias: torch.Tensor | None) -> Packed:
        codes, code = place(parts["codes"], spec.bits, spec.group, "trellis")
        matrix = native_matrix(
            self.native, spec.cols, codes, parts["scales"], parts["scale"], parts["tables"], bias, spec.bits, code
        )
        return Packed(spec.rows, spec.cols, Inputs(spec.block, spec.group, 8, parts["signs"], None), matrix)

    def _twin(self, spec: TensorSpec, parts: dict[str, torch.Tensor], bias: torch.Tensor | None) -> Packed:
        offset = parts["offset"] if bias is None else parts["offset"] + bias
        signs = parts["signs"] if spec.block > 1 else None
        inputs = Inputs(spec.block, spec.group, spec.act_bits, signs, parts["shift"].float())
        both = self._nibbles(both_spec(spec), parts, "", offset)
        down = self._nibbles(down_spec(spec), parts, "down_", None) if spec.rank else None
        return Packed(spec.rows, spec.cols, inputs, both, down)

    def _nibbles(self, spec: TensorSpec, parts: dict[str, torch.Tensor], prefix: str, bias: torch.Tensor | None) -> Any:
        codes, scales, scale = (parts[f"{prefix}{name}"] for name in ("codes", "scales", "scale"))
        return native_matrix(self.native, spec.cols, self.huge(codes), scales, scale, None, bias, 4, "nibbles")


def open_weights(native: ModuleType, path: str | Path) -> Weights:
    """The weights of a fewbit checkpoint, a Hugging Face directory, a `.gguf` file or a hub id.

    Raises `UsageError` where there is no model and `CorruptFile` where its files contradict themselves.
    """
    if is_artifact(Path(path)):
        return PackedWeights(native, Artifact.open(path))
    return PlainWeights(native, open_source(path))


def _configuration(artifact: Artifact) -> Any:
    """The model's configuration; as plain fields where these say it all.

    transformers needs more than a second to import what it makes a configuration with. A checkpoint holds every field,
    defaults included, and only scaled rotary positions take transformers' own arithmetic.
    """
    fields = dict(artifact.config)
    rotary = fields.get("rope_parameters")
    if isinstance(rotary, dict):
        kinds = [rotary] if "rope_type" in rotary else list(rotary.values())
        if all(isinstance(kind, dict) and kind.get("rope_type") == "default" for kind in kinds):
            return SimpleNamespace(**fields)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(artifact.path, trust_remote_code=False)


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a directory, None where there is none; without looking for its class where that is known."""
    settings = path / "tokenizer_config.json"
    if not any(path.glob("tokenizer*")):
        return None
    complete = settings.is_file() and (path / "tokenizer.json").is_file()
    if complete and read_json(settings).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
