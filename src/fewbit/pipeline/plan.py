"""Decides how every tensor of a checkpoint is stored, before anything runs.

The plan lists each tensor exactly once with its format, its bytes and, for whatever stays unquantized,
the reason; its totals count every weight, embeddings and head included.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewbit import __version__
from fewbit.checkpoint.damage import is_size, read_json, shortened
from fewbit.checkpoint.equivalent import EquivalentSource, Transform, loose_norm
from fewbit.checkpoint.plain import check_fits
from fewbit.checkpoint.source import Source
from fewbit.errors import CorruptFile, FewbitError, UnsupportedShape
from fewbit.formats import TensorSpec, get_format
from fewbit.models import Family, get_family
from fewbit.pipeline.options import HEADS, QuantizeOptions

PLAN_VERSION = 3


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source checkpoint.

    `kind` is "body" (a decoder layer's linear), "embed", "head" or "plain". `spec` is None for what is
    kept, with `reason` saying why and `dtype` how it is stored. `shared_input` names the group of
    linears that read the same activations: the layer, the place in the family's inputs and, for an expert of a
    mixture, its number.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    bytes: int
    spec: TensorSpec | None = None
    shared_input: str = ""
    dtype: str = ""
    reason: str = ""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def signs_seed(self) -> int:
        """A seed that depends on the shared input alone, so that q/k/v get the same signs, and all experts too."""
        return int.from_bytes(hashlib.sha256(self.unit.encode()).digest()[:6], "little")

    @property
    def layer(self) -> int:
        """The decoder layer of a tensor of the body."""
        return int(self.shared_input.partition(".")[0])

    @property
    def input_number(self) -> int:
        """Which of `Family.inputs` a tensor of the body reads."""
        return int(self.shared_input.split(".")[1])

    @property
    def unit(self) -> str:
        """What gets one number of bits together: the linears of one input in a layer, the head, the embeddings."""
        return ".".join(self.shared_input.split(".")[:2])

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Plan:
    """The whole decision: options, source and one entry per tensor."""

    source: str
    model_type: str
    fingerprint: str
    options: dict[str, Any]
    tensors: tuple[PlannedTensor, ...]

    @functools.cached_property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.spec is not None)

    @functools.cached_property
    def identity(self) -> str:
        """A hash of everything that decides the output's bytes; shards of another plan are not reused."""
        return hashlib.sha256(json.dumps(self._decisions(), sort_keys=True).encode()).hexdigest()

    def bits_per_weight(self, kind: str | None = None) -> float:
        chosen = [tensor for tensor in self.tensors if kind in (None, tensor.kind)]
        weights = sum(tensor.weights for tensor in chosen)
        return 8 * sum(tensor.bytes for tensor in chosen) / weights if weights else 0.0

    def totals(self) -> dict[str, Any]:
        return {
            "weights": sum(tensor.weights for tensor in self.tensors),
            "bytes": sum(tensor.bytes for tensor in self.tensors),
            "bits_per_weight": {"body": self.bits_per_weight("body"), "total": self.bits_per_weight()},
            "unquantized_matrices": [
                tensor.name for tensor in self.tensors if tensor.spec is None and len(tensor.shape) > 1
            ],
        }

    def _decisions(self) -> dict[str, Any]:
        return {
            "plan_version": PLAN_VERSION,
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "options": self.options,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **self._decisions(),
            "source": self.source,
            "fewbit_version": __version__,
            "identity": self.identity,
            "totals": self.totals(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        try:
            tensors = []
            for entry in data["tensors"]:
                spec = TensorSpec.from_json(entry["spec"]) if entry["spec"] else None
                tensors.append(PlannedTensor(**{**entry, "spec": spec, "shape": tuple(entry["shape"])}))
                _check_planned(tensors[-1])
            for field in ("source", "model_type", "fingerprint"):
                if not isinstance(data[field], str):
                    raise TypeError(f"{field} cannot be {shortened(data[field])}")
            if not isinstance(data["options"], dict):
                raise TypeError("the options are no table")
            return cls(data["source"], data["model_type"], data["fingerprint"], data["options"], tuple(tensors))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptFile(f"the plan does not hold what a plan holds ({error}); remove it with --fresh") from error

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        return cls.from_json(read_json(path, "remove it with --fresh"))


def _check_planned(tensor: PlannedTensor) -> None:
    """Raises `ValueError` for a tensor that no plan has: files are named after it, and memory is taken for it."""
    texts = (tensor.name, tensor.kind, tensor.shared_input, tensor.dtype, tensor.reason)
    if not all(isinstance(text, str) for text in texts) or type(tensor.bytes) is not int:
        raise ValueError(f"{shortened(tensor.name)} has fields of another type")
    if not all(is_size(size, 0) for size in tensor.shape):
        raise ValueError(f"{tensor.name} has no such shape")
    spec = tensor.spec
    if spec is None:
        return
    if not re.fullmatch(r"[\w.-]{1,200}", tensor.name, re.ASCII) or tensor.name.startswith("."):
        raise ValueError(f"{shortened(tensor.name)} is no name of a matrix")
    if tensor.shape != (spec.rows, spec.cols) or not _accepted(spec):
        raise ValueError(f"{tensor.name} cannot be stored as {spec!r}")


def _accepted(spec: TensorSpec) -> bool:
    try:
        return get_format(spec.format).accepts(spec)
    except FewbitError:
        return False


def make_plan(
    source: Source, options: QuantizeOptions, calibration: str = "", bits: dict[str, int] | None = None
) -> Plan:
    """Plan every tensor of `source`.

    `calibration` is the hash of the calibration tokens, if any; `bits` the chosen bits of units that do not take
    those of the options. Raises `CorruptFile` or `UsageError` where the source is not the model that its configuration
    describes.
    """
    family = get_family(source.config.model_type)
    check_fits(source)
    _check_layers(source, family)
    stored = source
    if options.learn and loose_norm(source) is None:
        # A turn of the residual stream may add a tensor; which one it is does not matter here.
        width = source.shape(f"{family.embed}.weight")[1]
        stored = EquivalentSource(source, Transform(torch.eye(width)))
    tensors = tuple(
        _plan_tensor(stored, family, name, options, bits or {}) for name in sorted(stored.names(), key=_natural)
    )
    choices = {**options.to_json(), "calibration": calibration}
    # Workers on other machines, and later runs, may start in another directory.
    return Plan(str(source.path.absolute()), source.config.model_type, source.fingerprint(), choices, tensors)


def _check_layers(source: Source, family: Family) -> None:
    """Refuse layers that the configuration does not count: no model would load what is made of them."""
    layers = source.config.num_hidden_layers
    for name in source.names():
        place = family.place(name.removesuffix(".weight"))
        if place is not None and place.layer >= layers:
            raise CorruptFile(
                f"{source.path}: holds {name}, and the configuration describes {layers} layers; copy config.json from "
                "the model"
            )


def _plan_tensor(
    source: Source, family: Family, name: str, options: QuantizeOptions, chosen: dict[str, int]
) -> PlannedTensor:
    shape = tuple(source.shape(name))
    kind, shared_input = classify(family, name)
    if kind == "plain":
        reason = "one-dimensional" if len(shape) == 1 else "no linear of this family"
        return _kept(name, shape, kind, reason)
    if len(shape) != 2:
        raise CorruptFile(f"{source.path}: {name} has the shape {list(shape)}, no matrix; download the model again")
    body = kind == "body"
    format_name, bits = (options.format_name, options.whole_bits) if body else HEADS[options.head]
    bits = chosen.get(".".join(shared_input.split(".")[:2]), bits)
    if format_name == "bf16":
        return _kept(name, shape, kind, "--head bf16", shared_input)
    weight_format = get_format(format_name)
    try:
        spec = weight_format.spec(shape[0], shape[1], bits, **(options.spec_choices if body else {}))
    except UnsupportedShape as error:
        return _kept(name, shape, kind, str(error), shared_input)
    if not options.rotate:
        spec = replace(spec, block=1)
    size = weight_format.storage_bytes(spec) + (-(-shape[1] // 8) if spec.block > 1 else 0)
    return PlannedTensor(name, shape, kind, size, spec, shared_input)


def _kept(name: str, shape: tuple[int, ...], kind: str, reason: str, shared_input: str = "") -> PlannedTensor:
    # Vectors are few and steer whole channels, so they keep 32 bits; matrices keep the usual 16.
    dtype, width = ("float32", 4) if len(shape) == 1 else ("bfloat16", 2)
    return PlannedTensor(name, shape, kind, width * math.prod(shape), None, shared_input, dtype, reason)


def classify(family: Family, name: str) -> tuple[str, str]:
    """The kind of a tensor and the shared input it reads."""
    module = name.removesuffix(".weight")
    if name == f"{family.embed}.weight":
        return "embed", "embed"
    if name == f"{family.head}.weight":
        return "head", "head"
    place = family.place(module)
    if place and name.endswith(".weight"):
        for index, shared in enumerate(family.inputs):
            if place.name in shared.linears:
                return "body", ".".join([str(place.layer), str(index), *([place.expert] if place.expert else [])])
    return "plain", ""


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
