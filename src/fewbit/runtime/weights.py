"""The weights of a fewbit checkpoint as native code takes them, read one tensor at a time.

Nothing here builds a transformers model: that takes longer than reading the weights does. Files are read, not mapped,
and straight to where and how this machine multiplies with a weight fastest, so that it is in memory once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from fewbit.checkpoint.artifact import Artifact, QuantizedModule, is_artifact
from fewbit.checkpoint.damage import damage_named
from fewbit.checkpoint.tensors import SafetensorsFile
from fewbit.dtypes import to_bfloat16, to_float32
from fewbit.errors import CannotLower, CorruptFile
from fewbit.formats import TensorSpec
from fewbit.formats.twinquant import both_spec, down_spec
from fewbit.ops.layouts import PIECE_BYTES, read_placed
from fewbit.runtime.rotary import FREQUENCIES
from fewbit.runtime.tokenizer import open_tokenizer

PANEL = 32  # rows of a dense matrix that stand side by side


@dataclass(frozen=True)
class Inputs:
    """How inputs are quantized for packed matrices: the rotation, the scale group, the width and a shift."""

    block: int
    group: int
    act_bits: int
    signs: np.ndarray | None
    shift: np.ndarray | None

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
    panels: np.ndarray
    bias: np.ndarray | None


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
    def shape(self, module: str) -> tuple[int, ...]:
        """The shape `[rows, cols]` of a linear or a table, without reading it."""

    @abstractmethod
    def vector(self, name: str) -> np.ndarray:
        """A plain tensor, float32."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where it has none."""

    @abstractmethod
    def _load(self, module: str) -> Linear: ...

    def maybe_vector(self, name: str) -> np.ndarray | None:
        return self.vector(name) if self.has(name) else None

    def linear(self, module: str) -> Linear:
        """A linear or a table. The same module twice is one object."""
        if module not in self._loaded:
            self._loaded[module] = self._load(module)
        return self._loaded[module]

    def has_linear(self, module: str) -> bool:
        return self.has(f"{module}.weight")

    def panels(self, rows: int, cols: int) -> np.ndarray:
        """Memory for a dense matrix, uint16 `[ceil(rows / 32), cols, 32]`; rows that there are not are zeros."""
        count = -(-rows // PANEL)
        memory: np.ndarray = self.native.huge_bytes(2 * count * PANEL * cols).view(np.uint16)
        found = memory.reshape(count, cols, PANEL)
        if rows % PANEL:
            found[-1] = 0
        return found

    def dense(self, bits: np.ndarray, bias: np.ndarray | None) -> Dense:
        """A bfloat16 matrix as its bits uint16 `[rows, cols]`."""
        rows, cols = bits.shape
        panels = self.panels(rows, cols)
        fill_panels(panels, 0, bits)
        return Dense(rows, cols, panels, bias)


def fill_panels(panels: np.ndarray, first: int, bits: np.ndarray) -> None:
    """Put rows uint16 `[n, cols]` of a dense matrix into its panels from the row `first` on, a multiple of 32."""
    whole, rest = divmod(len(bits), PANEL)
    at = first // PANEL
    panels[at : at + whole] = bits[: whole * PANEL].reshape(whole, PANEL, bits.shape[1]).transpose(0, 2, 1)
    if rest:
        panels[at + whole, :, :rest] = bits[whole * PANEL :].T


class PackedWeights(Weights):
    """A fewbit checkpoint."""

    def __init__(self, native: ModuleType, artifact: Artifact) -> None:
        super().__init__(native)
        self.artifact = artifact
        artifact.check_config()
        self.config = _configuration(artifact)
        self._files = {name: SafetensorsFile(artifact.path / name) for name in sorted(set(artifact.files.values()))}

    def has(self, name: str) -> bool:
        return name in self.artifact.files

    def has_linear(self, module: str) -> bool:
        return module in self.artifact.modules or super().has_linear(module)

    def _file(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        if name not in self.artifact.files:
            raise CorruptFile(f"{self.artifact.path} lacks the tensor {name}; copy the checkpoint again")
        file = self._files[self.artifact.files[name]]
        if name not in file.tensors:
            raise CorruptFile(f"{file.path} lacks the tensor {name}, which the index promises; copy it again")
        return file

    def shape(self, module: str) -> tuple[int, ...]:
        description = self.artifact.modules.get(module)
        if description is None:
            name = f"{module}.weight"
            return self._file(name).tensors[name][1]
        self._check(description)
        return description.spec.rows, description.spec.cols

    def vector(self, name: str) -> np.ndarray:
        file = self._file(name)
        return to_float32(file.read(name), file.tensors[name][0])

    def tokenizer(self) -> Any:
        return open_tokenizer(self.artifact.path, self.config.model_type)

    def _load(self, module: str) -> Linear:
        bias = self.maybe_vector(f"{module}.bias")
        description = self.artifact.modules.get(module)
        if description is None:
            return self._plain(f"{module}.weight", bias)
        spec = description.spec
        if spec.format not in ("trellis", "twinquant") or (spec.format == "trellis" and spec.block == 1):
            raise CannotLower(f"{module}: weights of {spec} have no native step")
        if spec.act_bits == 16:
            raise CannotLower(f"{module}: inputs of 16 bits have no native step")
        self._check(description)
        return self._trellis(module, spec, bias) if spec.format == "trellis" else self._twin(module, spec, bias)

    def _plain(self, name: str, bias: np.ndarray | None) -> Dense:
        file = self._file(name)
        dtype, (rows, cols), _ = file.tensors[name]
        panels = self.panels(rows, cols)
        for start, stop in _pieces(rows, 4 * cols):
            numbers = file.read(name, start * cols, (stop - start) * cols)
            fill_panels(panels, start, to_bfloat16(numbers, dtype).reshape(-1, cols))
        return Dense(rows, cols, panels, bias)

    def _check(self, module: QuantizedModule) -> None:
        """Raises `CorruptFile` where the stored parts of a module are not those of its layout."""
        for part, (shape, dtype) in module.layout().items():
            name = f"{module.name}.{part}"
            found, stored, _ = self._file(name).tensors[name]
            if stored != tuple(shape) or found != dtype:
                raise CorruptFile(
                    f"{name}: {found} {stored} where the format has {dtype} {tuple(shape)}; copy the checkpoint again"
                )

    def _part(self, module: str, part: str) -> np.ndarray:
        name = f"{module}.{part}"
        return self._file(name).read(name)

    def _trellis(self, module: str, spec: TensorSpec, bias: np.ndarray | None) -> Packed:
        name = f"{module}.codes"
        file = self._file(name)
        rows, size = file.tensors[name][1]
        codes, code = read_placed(
            self.native, lambda piece, first: file.read_into(piece, name, first), (rows, size), spec.bits, spec.group
        )
        matrix = self._matrix(module, "", codes, spec.cols, bias, spec.bits, code, self._part(module, "tables"))
        inputs = Inputs(spec.block, spec.group, 8, self._part(module, "signs"), None)
        return Packed(spec.rows, spec.cols, inputs, matrix)

    def _twin(self, module: str, spec: TensorSpec, bias: np.ndarray | None) -> Packed:
        part = partial(self._part, module)
        offset = part("offset") if bias is None else part("offset") + bias
        signs = part("signs") if spec.block > 1 else None
        inputs = Inputs(spec.block, spec.group, spec.act_bits, signs, to_float32(part("shift"), "F16"))
        both = self._nibbles(module, "", both_spec(spec), offset)
        down = self._nibbles(module, "down_", down_spec(spec), None) if spec.rank else None
        return Packed(spec.rows, spec.cols, inputs, both, down)

    def _nibbles(self, module: str, prefix: str, spec: TensorSpec, bias: np.ndarray | None) -> Any:
        name = f"{module}.{prefix}codes"
        file = self._file(name)
        rows, size = file.tensors[name][1]
        codes = self.native.huge_bytes(rows * size).reshape(rows, size)
        file.read_into(codes, name)
        return self._matrix(module, prefix, codes, spec.cols, bias, 4, "nibbles", None)

    def _matrix(
        self,
        module: str,
        prefix: str,
        codes: np.ndarray,
        cols: int,
        bias: np.ndarray | None,
        bits: int,
        code: str,
        tables: np.ndarray | None,
    ) -> Any:
        scales = self._part(module, f"{prefix}scales").view(np.uint16)
        scale = float(self._part(module, f"{prefix}scale")[0])
        return self.native.Matrix(codes, scales, scale, tables, bias, cols, bits, code)


def _pieces(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit a processor's cache, all but the last a multiple of 32."""
    step = PANEL * max(1, PIECE_BYTES // (PANEL * row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def open_weights(native: ModuleType, path: str | Path) -> Weights:
    """The weights of a fewbit checkpoint, a Hugging Face directory, a `.gguf` file or a hub id.

    Raises `UsageError` where there is no model and `CorruptFile` where its files contradict themselves.
    """
    if is_artifact(Path(path)):
        return PackedWeights(native, Artifact.open(path))
    from fewbit.checkpoint.source import open_source
    from fewbit.runtime.plain_weights import PlainWeights

    return PlainWeights(native, open_source(path))


def _configuration(artifact: Artifact) -> Any:
    """The model's configuration; as plain fields where these say it all.

    transformers needs more than a second to import what it makes a configuration with. A checkpoint holds every field,
    defaults included, and only rare kinds of rotary positions take transformers' own arithmetic.
    """
    fields = dict(artifact.config)
    rotary = fields.get("rope_parameters")
    if isinstance(rotary, dict):
        kinds = [rotary] if "rope_type" in rotary else list(rotary.values())
        if all(isinstance(kind, dict) and kind.get("rope_type") in FREQUENCIES for kind in kinds):
            return SimpleNamespace(**fields)
    from transformers import AutoConfig

    with damage_named(artifact.path, "copy the checkpoint again"):
        return AutoConfig.from_pretrained(artifact.path, trust_remote_code=False)


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
