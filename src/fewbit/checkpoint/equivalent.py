"""A model on other axes that computes the same: what a format wants folded into the weights before it rounds them.

Four changes cancel out exactly in a pre-norm decoder. The residual stream may be turned by an orthogonal matrix, a
norm's outputs may be scaled channel by channel (by its gain), the inputs of a down projection too (by the rows of the
up projection), and each head's values may be multiplied with any invertible matrix, which the output projection undoes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.damage import shortened
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import read_tensors, tensors_hash, write_tensors
from fewbit.errors import CorruptFile, UsageError
from fewbit.models import OUTPUT_ROTATION, Family, Place, SharedInput, get_family

TRANSFORM = "transform.safetensors"
RESIDUAL = "residual"
PER_MODULE = ("gains", "scales", "values")


@dataclass(frozen=True)
class Transform:
    """What changes; everything that is not named stays as it is.

    `residual` is orthogonal `[H, H]`: hidden states `x` become `x residual`. `gains` are the new gains `[H]` of norms,
    by the norm's name: in front of them the norm's output is on the new axes and has gain 1. `scales` are positive
    factors `[K]` of the inputs of a linear that another one scales, and `values` matrices `[heads, D, D]` that the
    values of each key/value head are multiplied with (row vectors), both by the name of the linear that reads them.
    Float tensors of any width.
    """

    residual: torch.Tensor | None = None
    gains: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {} if self.residual is None else {RESIDUAL: self.residual}
        for kind in PER_MODULE:
            found |= {f"{kind}.{name}": tensor for name, tensor in getattr(self, kind).items()}
        return found

    def save(self, path: Path) -> None:
        write_tensors(path, self.tensors())

    @classmethod
    def load(cls, path: Path, remedy: str = "delete it and run again") -> Transform:
        """Raises `CorruptFile` with the remedy where the file is damaged."""
        tensors = read_tensors(path, remedy)[0]
        residual = tensors.pop(RESIDUAL, None)
        parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in PER_MODULE}
        for name, tensor in tensors.items():
            kind, _, module = name.partition(".")
            if kind not in parts:
                raise CorruptFile(f"{path} holds {shortened(name)}, which is no part of a transform; {remedy}")
            parts[kind][module] = tensor
        return cls(residual, **parts)


class EquivalentSource(Source):
    """`source` under a transform. Products run in float64, unless `dtype` says otherwise; tensors come out in float32.

    The transform's tensors may be ones that gradients flow through; `columns`, `outputs` and `gain` let them pass.

    A turned residual stream leaves the final norm's gain on axes that the head does not have. An untied head takes it
    in; a tied one reads the same table as the embedding, so the final norm gets a further parameter,
    `rotation [H, H]`, which its output is multiplied with.
    """

    def __init__(self, source: Source, transform: Transform, dtype: torch.dtype = torch.float64) -> None:
        """Raises `UsageError` where the family has a norm on the residual stream that feeds no linear, which a turn
        of the stream does not commute with."""
        self.source = source
        self.transform = transform
        self.path = source.path
        self.config = source.config
        self.family: Family = get_family(source.config.model_type)
        self._dtype = dtype
        self._residual = None if transform.residual is None else transform.residual.to(dtype)
        self._rotated_tie = self._residual is not None and source.tied_embeddings
        if self._residual is not None and (norm := loose_norm(source)):
            raise UsageError(f"{norm}: a gain that feeds no linear does not commute with a turn of the stream")

    @property
    def rotated_tie(self) -> bool:
        """Whether the final norm has a `rotation`."""
        return self._rotated_tie

    def names(self) -> list[str]:
        names = self.source.names()
        return [*names, f"{self.family.final_norm}.{OUTPUT_ROTATION}"] if self._rotated_tie else names

    def shape(self, name: str) -> tuple[int, ...]:
        if name == f"{self.family.final_norm}.{OUTPUT_ROTATION}":
            return tuple(self._require_residual().shape)
        return self.source.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self.source.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        family = self.family
        if module == family.final_norm:
            return self._final(kind)[start:stop]
        if name == f"{family.embed}.weight":
            return self._turned(self.source.rows(name, start, stop))
        if name == f"{family.head}.weight":
            rows = self.source.rows(name, start, stop)
            if self._residual is None:
                return rows
            return self._turned(rows * self.source.tensor(f"{family.final_norm}.weight"))
        place = family.place(module)
        if place is None:
            return self.source.rows(name, start, stop)
        if kind == "weight" and any(shared.norm == place.name for shared in family.inputs):
            return self.gain(module)[start:stop]
        return self._linear(name, module, place, start, stop)

    def _require_residual(self) -> torch.Tensor:
        assert self._residual is not None
        return self._residual

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._residual is None else (rows.to(self._dtype) @ self._residual).float()

    def _final(self, kind: str) -> torch.Tensor:
        """The final norm's gain, which is 1 where the head or the rotation has taken it in, or that rotation."""
        gain = self.source.tensor(f"{self.family.final_norm}.weight")
        if self._residual is None:
            return gain
        if kind == OUTPUT_ROTATION:
            return ((self._residual.T * gain.to(self._dtype)) @ self._residual).float()
        return torch.ones_like(gain)

    def gain(self, norm: str) -> torch.Tensor:
        """The new gain of a norm of a layer, float32 `[H]`."""
        old = self.source.tensor(f"{norm}.weight")
        if norm in self.transform.gains:
            return self.transform.gains[norm].float()
        return old if self._residual is None else torch.ones_like(old)

    def _linear(self, name: str, module: str, place: Place, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight or entries of a bias of a layer."""
        values = next((s for s in self.family.inputs if s.values == place.name), None)
        # What mixes rows needs all of them.
        whole = self._writes(place) or (values is not None and place.beside(values.linears[0]) in self.transform.values)
        first, last = (0, self.source.shape(name)[0]) if whole else (start, stop)
        weight = self.source.rows(name, first, last).to(self._dtype)
        if weight.ndim == 2:
            weight = self.columns(weight, module)
        return self._outputs(weight, place, first)[start - first : stop - first].float()

    def _reading(self, place: Place) -> SharedInput | None:
        shared = self.family.inputs
        return next((s for s in shared if place.name in s.linears or place.name in s.routers), None)

    def _writes(self, place: Place) -> bool:
        """Whether a linear's outputs go to a residual stream that is turned."""
        reads = self._reading(place)
        return self._residual is not None and reads is not None and reads.writes_residual

    def columns(self, matrix: torch.Tensor, module: str) -> torch.Tensor:
        """A matrix `[n, K]` that multiplies the inputs of a linear, for those inputs on their new axes."""
        place = self.family.place(module)
        reads = None if place is None else self._reading(place)
        if place is None or reads is None:
            return matrix
        if reads.norm is not None:
            norm = f"{place.prefix}.{reads.norm}"
            if self._residual is None and norm not in self.transform.gains:
                return matrix
            matrix = matrix * self.source.tensor(f"{norm}.weight").to(self._dtype)
            if self._residual is not None:
                matrix = matrix @ self._residual
            return matrix / self.gain(norm).to(self._dtype)
        if module in self.transform.scales:
            return matrix / self.transform.scales[module].to(self._dtype)
        if module in self.transform.values:
            heads = self.transform.values[module].to(self._dtype)
            undo = torch.linalg.inv(heads).transpose(1, 2)
            each = matrix.view(matrix.shape[0], -1, undo.shape[1])
            repeats = each.shape[1] // undo.shape[0]
            return torch.einsum("nhi,hij->nhj", each, undo.repeat_interleave(repeats, 0)).reshape(matrix.shape)
        return matrix

    def outputs(self, matrix: torch.Tensor, module: str) -> torch.Tensor:
        """A matrix `[N, ...]` or a bias `[N]` that gives a linear's outputs, for those outputs on their new axes."""
        place = self.family.place(module)
        return matrix if place is None else self._outputs(matrix, place, 0)

    def _outputs(self, matrix: torch.Tensor, place: Place, first: int) -> torch.Tensor:
        """The same for rows from `first` on, of which only a plain scaling may miss some."""
        if self._residual is not None and self._writes(place):
            return self._residual.T @ matrix
        for shared in self.family.inputs:
            reader = place.beside(shared.linears[0])
            if shared.scaled_by == place.name and reader in self.transform.scales:
                scale = self.transform.scales[reader][first : first + matrix.shape[0]].to(self._dtype)
                return matrix * (scale[:, None] if matrix.ndim == 2 else scale)
            if shared.values == place.name and reader in self.transform.values:
                heads = self.transform.values[reader].to(self._dtype)
                each = matrix.view(heads.shape[0], heads.shape[1], -1)
                return (heads.transpose(1, 2) @ each).view(matrix.shape)
        return matrix

    def fingerprint(self) -> str:
        known = self.source.fingerprint() + tensors_hash(self.transform.tensors())
        return hashlib.sha256(known.encode()).hexdigest()

    def tokenizer(self) -> Any:
        return self.source.tokenizer()

    def copy_tokenizer(self, out_dir: str | Path) -> None:
        self.source.copy_tokenizer(out_dir)


def loose_norm(source: Source) -> str | None:
    """The first norm on the residual stream that feeds no linear, which keeps the stream from being turned; None where
    there is none."""
    family: Family = get_family(source.config.model_type)
    width = source.shape(f"{family.embed}.weight")[1]
    names = [name for name in source.names() if name.endswith("norm.weight") and source.shape(name) == (width,)]
    for name in names:
        module = name.removesuffix(".weight")
        place = family.place(module)
        known = place is not None and any(shared.norm == place.name for shared in family.inputs)
        if not known and module != family.final_norm:
            return name
    return None


def equivalent(source: Source, directory: Path, remedy: str = "delete it and run again") -> Source:
    """`source` under the transform that lies in `directory`, or itself where there is none; the remedy is for a damaged
    one, by default that of a work directory."""
    path = directory / TRANSFORM
    return EquivalentSource(source, Transform.load(path, remedy)) if path.exists() else source


def rotate_output(norm: Any) -> None:
    """Give the final norm of a model the parameter `rotation [H, H]` that its output is multiplied with, in place."""
    kind = type(norm)

    class Rotated(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) @ self.rotation

    size = norm.weight.shape[0]
    rotation = torch.empty(size, size, dtype=norm.weight.dtype, device=norm.weight.device)
    norm.__class__ = Rotated
    norm.rotation = torch.nn.Parameter(rotation, requires_grad=False)
