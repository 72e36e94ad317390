"""What every weight format provides, and the table of formats.

A format is one file: how many bytes a tensor takes, how one group of columns is encoded, and how stored
parts become weights again. Formats work on float32 weights that are already rotated where the format
asks for it; they read and write no files and know nothing about models. How a matrix is stored (`spec`, `layout`) is
said without torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewbit.dtypes import numpy_dtype
from fewbit.errors import UnsupportedShape, UsageError
from fewbit.math.hadamard import MIN_BLOCK, rotation_block, scale_group
from fewbit.math.rounding import Quantized, Rows, inverse_factor, quantize_matrix
from fewbit.torch_later import torch


@dataclass(frozen=True)
class TensorSpec:
    """How one weight matrix `[rows, cols]` is stored.

    `block` is the rotation block along the inputs (1: not rotated) and `group` the number of inputs
    that share one scale. `rank` is that of a low-rank branch (0: none), and `act_bits` the width that the format
    quantizes inputs to (0: the format leaves that open).
    """

    format: str
    bits: int
    rows: int
    cols: int
    block: int
    group: int
    rank: int = 0
    act_bits: int = 0

    @property
    def groups(self) -> int:
        return self.cols // self.group

    def __str__(self) -> str:
        branch = f", rank {self.rank}" if self.rank else ""
        inputs = f", inputs in {self.act_bits} bits" if self.act_bits else ""
        return f"{self.format}, {self.bits} bits{branch}{inputs}"

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TensorSpec:
        """The inverse of `to_json`; raises `TypeError` for fields that are not there or of another type."""
        spec = cls(**fields)
        for name, value in asdict(spec).items():
            if type(value) is not (str if name == "format" else int):
                raise TypeError(f"{name} cannot be {value!r}")
        return spec

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's configuration says of it; fields that say nothing are left out."""
        optional = ("rank", "act_bits")
        return {name: value for name, value in asdict(self).items() if value or name not in optional}


@dataclass
class EncodedGroup:
    """One group of columns, encoded.

    `parts` are the stored fields of this group; `values` the weights they decode to, float32
    `[rows, group]`; `error` the feedback `E [rows, group]` with `E U = (weights - values)` that error
    feedback carries to the columns still to come (None without a factor `U`).
    """

    parts: dict[str, torch.Tensor]
    values: torch.Tensor
    error: torch.Tensor | None


HELD_TOKENS = 512  # inputs that calibration keeps as they are, at most


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw of one input, on its rotated axes and as the format quantizes it.

    `hessian` is the second moment float32 `[K, K]` over `tokens` tokens, and `held [n, K]` some of those inputs, at
    most `HELD_TOKENS`. A format that quantizes inputs has them shifted by `shift`, float32 `[K]` on the inputs' own
    axes; `mean [K]`, on the same axes, is the mean of the inputs without shift, and `mean_quantized [K]`, on the
    rotated ones, that of the quantized inputs.
    """

    hessian: torch.Tensor
    tokens: int
    held: torch.Tensor
    shift: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    mean_quantized: torch.Tensor | None = None


Layout = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of stored parts, the dtype by its name in `fewbit.dtypes`."""


class Format(ABC):
    """One way to store a weight matrix. `single_threaded` says that `quantize` uses one thread, whatever there are."""

    name: str
    bits: tuple[int, ...]
    rotated: bool = True
    group_limit: int = 256
    single_threaded: bool = False

    def spec(self, rows: int, cols: int, bits: int, **choices: int) -> TensorSpec:
        """The storage of a `[rows, cols]` matrix; raises `UnsupportedShape` where it does not fit.

        A format may take `choices` of its own; this one takes none.
        """
        if choices:
            raise UsageError(f"format {self.name} has no {', '.join(choices)} to choose")
        if bits not in self.bits:
            raise UsageError(f"format {self.name} stores {self.bits} bits, not {bits}")
        if rows < 1 or cols < 1:
            raise UsageError(f"a matrix of {rows} x {cols} cannot be stored")
        block = rotation_block(cols)
        if block < MIN_BLOCK:
            raise UnsupportedShape(
                f"{cols} inputs are not a multiple of {MIN_BLOCK}, the smallest rotation block; kept in 16 bits"
            )
        group = scale_group(cols, block, self.group_limit)
        return TensorSpec(self.name, bits, rows, cols, block if self.rotated else 1, group)

    def accepts(self, spec: TensorSpec) -> bool:
        """Whether a matrix can be stored like that."""
        expected = self.spec(spec.rows, spec.cols, spec.bits)
        # Block 1 is a matrix that was not rotated.
        return spec in (expected, replace(expected, block=1))

    @abstractmethod
    def layout(self, spec: TensorSpec) -> Layout:
        """Shape and dtype of every stored part."""

    @abstractmethod
    def calibration(self, inputs: InputStatistics, damping: float) -> dict[str, torch.Tensor]:
        """What `quantize` wants to know of a linear's inputs, as tensors that go through a file; `damping` is relative
        to the mean of the Hessian's diagonal."""

    def calibration_bytes(self, spec: TensorSpec) -> int:
        """What `calibration` gives takes at most; by default, one matrix of all pairs of inputs."""
        return 4 * spec.cols**2

    @abstractmethod
    def quantize(
        self, weight: Rows, spec: TensorSpec, signs: torch.Tensor | None, calibration: dict[str, torch.Tensor]
    ) -> Quantized:
        """Round a matrix that is given by rows `[rows, cols]` on the inputs' own axes.

        `signs` is float32 `[cols]` where the format rotates, and `calibration` what the method of that name made, or
        empty for plain rounding. The result's `values` may be empty: its parts decode. Raises `NonFiniteWeights`.
        """

    @abstractmethod
    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """Stored parts to float32 weights `[rows, cols]`, still rotated where the format rotates."""

    def dequantize_rows(self, parts: dict[str, torch.Tensor], spec: TensorSpec, rows: torch.Tensor) -> torch.Tensor:
        """Some rows (int64 `[n]`) as float32 `[n, cols]`, still rotated; the default decodes everything."""
        return self.dequantize(parts, spec)[rows]

    def rescale(
        self, parts: dict[str, torch.Tensor], spec: TensorSpec, gains: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The same codes with some of the stored numbers times gains of their shapes, by the parts' names; those of
        "scales" are float32 `[rows, groups]`, and of every (row, group) the decoded weights are multiplied."""
        found = dict(parts)
        for name, gain in gains.items():
            scaled = parts[name].float() * gain.clamp(min=0)
            most = torch.finfo(parts[name].dtype).max
            found[name] = scaled.clamp(-most, most).to(parts[name].dtype)
        return found

    def slice_rows(
        self, parts: dict[str, torch.Tensor], spec: TensorSpec, start: int, stop: int
    ) -> tuple[dict[str, torch.Tensor], TensorSpec]:
        """The stored parts of rows `start` (a multiple of 16) to `stop`, as those of a matrix of its own."""
        part_spec = replace(spec, rows=stop - start)
        if part_spec == spec:
            return parts, spec
        whole, before, own = self.layout(spec), self.layout(replace(spec, rows=start)), self.layout(part_spec)
        cut = {}
        for name, (shape, _) in whole.items():
            first, count = before[name][0][0] if start else 0, own[name][0][0]
            # A part that does not grow with the rows belongs to the whole matrix.
            cut[name] = parts[name] if shape == own[name][0] else parts[name][first : first + count]
        return cut, part_spec

    def storage_bytes(self, spec: TensorSpec) -> int:
        total = 0
        for shape, dtype in self.layout(spec).values():
            total += math.prod(shape) * numpy_dtype(dtype).itemsize
        return total


class GroupFormat(Format):
    """A format that encodes groups of columns one after the other, with error feedback between them."""

    def tensor_scale(self, weight: torch.Tensor, spec: TensorSpec) -> float:
        """The factor that all scales of this tensor share (1 where the format stores none)."""
        return 1.0

    @abstractmethod
    def encode_group(
        self, weight: torch.Tensor, spec: TensorSpec, tensor_scale: float, factor: torch.Tensor | None
    ) -> EncodedGroup:
        """Encode one group of columns.

        `weight` is float32 `[rows, group]`; `factor` is the upper triangular `U [group, group]` of the
        inverse Hessian's Cholesky factor restricted to these columns, or None for plain rounding.
        """

    @abstractmethod
    def assemble(self, groups: list[EncodedGroup], spec: TensorSpec, tensor_scale: float) -> dict[str, torch.Tensor]:
        """Join the groups, in order along the inputs, into the parts that `layout` names."""

    def calibration(self, inputs: InputStatistics, damping: float) -> dict[str, torch.Tensor]:
        return {"factor": inverse_factor(inputs.hessian, damping)}

    def quantize(
        self, weight: Rows, spec: TensorSpec, signs: torch.Tensor | None, calibration: dict[str, torch.Tensor]
    ) -> Quantized:
        return quantize_matrix(self, weight, spec, signs, calibration.get("factor"))


_FORMATS: dict[str, Format] = {}


def register(format_class: type[Format]) -> type[Format]:
    """Class decorator: enter a format into the table under its name."""
    _FORMATS[format_class.name] = format_class()
    return format_class


def get_format(name: str) -> Format:
    """The format of that name; raises `UsageError` with the known names."""
    if name not in _FORMATS:
        raise UsageError(f"unknown format '{name}': known are {', '.join(sorted(_FORMATS))}")
    return _FORMATS[name]


def group_format(name: str) -> GroupFormat:
    """The same for formats that encode groups of columns."""
    found = get_format(name)
    if not isinstance(found, GroupFormat):
        raise UsageError(f"format {name} does not encode groups of columns")
    return found
