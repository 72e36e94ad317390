"""A finished fewbit checkpoint on disk: opening it, checking it, describing it.

A checkpoint is a Hugging Face directory whose `config.json` carries a `quantization_config` with one
entry per quantized module, and whose `fewbit.json` records hashes and errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from fewbit.checkpoint.damage import check_config, indexed_files, is_size, parse_json, read_object, shortened
from fewbit.checkpoint.store import FORMAT_VERSION, RECORD, tensors_hash
from fewbit.dtypes import name_of
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.formats import TensorSpec, get_format
from fewbit.formats.base import Layout
from fewbit.math.hadamard import unpack_signs
from fewbit.math.rounding import decoded_error
from fewbit.torch_later import torch

if TYPE_CHECKING:
    from fewbit.checkpoint.source import Source, SourceRows

MAX_HEADER_BYTES = 100 << 20
ERROR_TOLERANCE = 1e-3  # of a recorded error; sums of another machine round differently
TINY = 1e-12


@dataclass(frozen=True)
class QuantizedModule:
    """One quantized module as `config.json` describes it."""

    name: str
    spec: TensorSpec
    kind: str

    def layout(self) -> Layout:
        """Stored parts with shapes and dtypes, the packed signs of a rotated tensor included."""
        layout = dict(get_format(self.spec.format).layout(self.spec))
        if self.spec.block > 1:
            layout["signs"] = ((-(-self.spec.cols // 8),), "U8")
        return layout


def modules_to_json(modules: list[QuantizedModule]) -> dict[str, Any]:
    return {module.name: {"kind": module.kind, **module.spec.to_json()} for module in modules}


def modules_from_json(data: dict[str, Any]) -> dict[str, QuantizedModule]:
    """Parse and validate the `modules` table of a quantization config; raises `CorruptFile`."""
    if not isinstance(data, dict):
        raise CorruptFile("the modules of quantization_config are no table; copy the checkpoint again")
    modules = {}
    for name, entry in data.items():
        try:
            fields = dict(entry)
            kind = fields.pop("kind")
            spec = TensorSpec.from_json(fields)
            accepted = get_format(spec.format).accepts(spec)
        except (TypeError, KeyError, ValueError, FewbitError) as error:
            raise CorruptFile(f"{name}: its entry in quantization_config is not valid ({error})") from error
        if not accepted:
            raise CorruptFile(f"{name}: {spec!r} disagrees with what the format {spec.format} prescribes")
        modules[name] = QuantizedModule(name, spec, kind)
    return modules


def check_version(quantization_config: dict[str, Any]) -> None:
    """Refuse checkpoints of a format version this release does not know."""
    if not isinstance(quantization_config, dict):
        raise CorruptFile("the quantization_config of the checkpoint is no table; copy the checkpoint again")
    version = quantization_config.get("format_version")
    if version != FORMAT_VERSION:
        raise FewbitError(
            f"the checkpoint has format version {version}, this release reads version {FORMAT_VERSION}; "
            "install the fewbit release that wrote it"
        )


class Artifact:
    """Read access to a finished checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_object(path / "config.json")
        self.quantization = self.config.get("quantization_config") or {}
        check_version(self.quantization)
        self.modules = modules_from_json(self.quantization.get("modules", {}))
        record = read_record(path)
        if record is None:
            raise CorruptFile(f"{path} lacks {RECORD}; copy the checkpoint again")
        self.record: dict[str, Any] = record

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Open a checkpoint directory; raises `CorruptFile` for a damaged one and `UsageError` for anything else."""
        path = Path(path)
        if not path.exists():
            raise UsageError(f"{path} does not exist")
        if not is_artifact(path) and not (path / RECORD).is_file():
            raise UsageError(f"{path} is not a fewbit checkpoint; make one with: fewbit quantize {path} OUT")
        return cls(path)

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name to file name, from the single file if there is one, as in transformers, and else from the index;
        paths must stay inside."""
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(_safe_keys(single), single.name)
        if not index.exists():
            raise CorruptFile(f"{self.path} holds no model.safetensors; copy the checkpoint again")
        return {name: file for file, names in indexed_files(index).items() for name in names}

    def check_config(self) -> None:
        """Raises `CorruptFile` for a configuration or a record with sizes that no checkpoint of these files has."""
        # No format stores a weight in less than a bit.
        most = 8 * sum((self.path / file).stat().st_size for file in set(self.files.values()))
        check_config(SimpleNamespace(**self.config), most, self.files, self.path / "config.json")
        for entry in self.record["tensors"]:
            if not math.prod(entry["shape"]) == entry["weights"] <= most:
                raise CorruptFile(
                    f"{self.path}: {entry['name']} has {entry['weights']} weights by its record, and the shape "
                    f"{shortened(entry['shape'])}; copy the checkpoint again"
                )

    def tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read some tensors by their full names."""
        found = {}
        for file in sorted({self.files[name] for name in names if name in self.files}):
            with _open(self.path / file) as handle:
                for name in names:
                    if self.files.get(name) == file:
                        found[name] = _get(handle, name, self.path / file)
        missing = [name for name in names if name not in found]
        if missing:
            raise CorruptFile(f"{self.path} lacks the tensor {missing[0]}; copy the checkpoint again")
        return found

    def parts(self, module: QuantizedModule) -> dict[str, torch.Tensor]:
        """The stored parts of a module, checked against its layout."""
        layout = module.layout()
        tensors = self.tensors([f"{module.name}.{part}" for part in layout])
        parts = {name.removeprefix(f"{module.name}."): tensor for name, tensor in tensors.items()}
        for part, (shape, dtype) in layout.items():
            tensor = parts[part]
            if tuple(tensor.shape) != tuple(shape) or name_of(tensor.dtype) != dtype:
                raise CorruptFile(
                    f"{module.name}.{part}: {name_of(tensor.dtype)} {tuple(tensor.shape)} where the format has "
                    f"{dtype} {tuple(shape)}; copy the checkpoint again"
                )
        return parts

    def _transformed(self) -> bool:
        """Whether its weights are the source's on other axes, by its options."""
        options = self.record["options"]
        measured = options.get("format") == "twinquant" and options.get("rounding") == "ldlq"
        return measured and bool(options.get("smooth") or options.get("learn"))

    def inspect(self) -> dict[str, Any]:
        """What the checkpoint holds, as `fewbit inspect --json` prints it."""
        tensors = self.record["tensors"]
        sizes: dict[str, list[int]] = {}
        for entry in tensors:
            for kind in {entry["kind"], "total"}:
                total = sizes.setdefault(kind, [0, 0])
                total[0] += entry["bytes"]
                total[1] += entry["weights"]
        ratio = {kind: 8 * size / weights for kind, (size, weights) in sizes.items()}
        return {
            "path": str(self.path),
            "model_type": self.config.get("model_type"),
            "bits_per_weight": {"body": ratio.get("body", 0.0), "total": ratio["total"]},
            "bytes": sizes["total"][0],
            "weights": sizes["total"][1],
            "options": self.record["options"],
            "tensors": tensors,
        }

    def verify(self, source: Source | None = None) -> Iterator[tuple[str, str]]:
        """Check every tensor; yields (tensor, problem) with an empty problem where all is well.

        A tensor has to be there, have the shape of its format, hold the bytes that were recorded and decode to
        finite numbers; given the `source` it was made from, also have the error that was recorded. Raises `UsageError`
        for another source, and where what was folded into it is not known.
        """
        from fewbit.checkpoint.equivalent import TRANSFORM, equivalent
        from fewbit.checkpoint.source import SourceRows

        if source is not None and source.fingerprint() != self.record["source_fingerprint"]:
            raise UsageError(f"{source.path} is not the model that {self.path} was made from; give that one")
        if source is not None:
            if self._transformed() and not (self.path / TRANSFORM).exists():
                raise UsageError(
                    f"{self.path} has no {TRANSFORM}, without which its weights cannot be compared with a source; copy "
                    "that file from the checkpoint that this one was saved from"
                )
            source = equivalent(source, self.path, "copy the checkpoint again")
        recorded = {entry["name"]: entry for entry in self.record["tensors"]}
        for name, entry in recorded.items():
            module = self.modules.get(name.removesuffix(".weight")) if entry["format"] else None
            try:
                tensors = self.parts(module) if module else self.tensors([name])
                problem = "" if tensors_hash(tensors) == entry["sha256"] else "its bytes differ from those written"
                if module and not problem:
                    rows = SourceRows(source, name) if source else None
                    problem = _decode_problem(module, tensors, rows, entry["relative_error"])
            except CorruptFile as error:
                problem = str(error)
            yield name, problem


def _decode_problem(
    module: QuantizedModule, parts: dict[str, torch.Tensor], source: SourceRows | None, recorded: float
) -> str:
    """What is wrong with the decoded tensor; the error is |W - W^|^2 / |W|^2."""
    signs = unpack_signs(parts["signs"], module.spec.cols) if module.spec.block > 1 else None
    stored = {name: part for name, part in parts.items() if name != "signs"}
    lost, energy = decoded_error(get_format(module.spec.format), stored, module.spec, source, signs)
    if not math.isfinite(lost):
        return "it decodes to NaN or infinity"
    if source is None or abs(lost - recorded * energy) <= ERROR_TOLERANCE * recorded * energy + TINY:
        return ""
    return f"it decodes with an error of {lost / max(energy, TINY):.6g}, recorded are {recorded:.6g}"


def is_artifact(path: Path) -> bool:
    """Whether a directory is a fewbit checkpoint by its configuration; what else it holds may be damaged."""
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        method = read_object(config).get("quantization_config", {}).get("quant_method")
    except (CorruptFile, AttributeError):
        return False
    return bool(method == "fewbit")


def read_record(directory: Path) -> dict[str, Any] | None:
    """What `fewbit.json` says, or, where transformers saved the model again, the header of the first file of weights.

    None where neither says anything; raises `CorruptFile` where one of them is damaged.
    """
    beside = directory / RECORD
    if beside.is_file():
        return checked_record(read_object(beside), beside)
    weights = min(directory.glob("model*.safetensors"), default=None)
    if weights is None:
        return None
    with _open(weights, "numpy") as handle:
        text = (handle.metadata() or {}).get(RECORD)
    return None if text is None else checked_record(parse_json(text, weights, "save it again"), weights)


def checked_record(record: Any, path: Path) -> dict[str, Any]:
    """A record as it is; raises `CorruptFile` for one that does not describe tensors."""
    for entry in record["tensors"] if _is_record(record) else [None]:
        if not (isinstance(entry, dict) and _is_entry(entry)):
            raise CorruptFile(f"{path} does not describe the checkpoint's tensors; copy the checkpoint again")
    return dict(record)


def _is_record(record: Any) -> bool:
    """Whether it has the fields that the record of a checkpoint has, its tensors left aside."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("tensors"), list)
        and len(record["tensors"]) > 0
        and isinstance(record.get("options"), dict)
        and isinstance(record.get("source_fingerprint"), str)
    )


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether it is what a record says of one tensor."""
    shape, error = entry.get("shape"), entry.get("relative_error", 0.0)
    counts = (entry.get("bytes"), entry.get("weights"))
    return (
        all(isinstance(entry.get(field), str) for field in ("name", "kind", "sha256"))
        and all(type(count) is int and count > 0 for count in counts)
        and isinstance(shape, list)
        and all(is_size(size, 0) for size in shape)
        and isinstance(entry.get("format"), str)
        and isinstance(entry.get("bits"), int)
        and isinstance(entry.get("dtype", "" if entry["format"] else None), str)
        and ("relative_error" in entry or not entry["format"])
        and type(error) in (int, float)
        and math.isfinite(error)
    )


def check_header(path: Path) -> None:
    """Refuse safetensors files whose header is larger than any honest one."""
    if not path.is_file():
        raise CorruptFile(f"{path} is missing, or no plain file; copy the checkpoint again")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise CorruptFile(f"{path}: a header of {size} bytes exceeds the limit of {MAX_HEADER_BYTES}")


def _open(path: Path, framework: str = "pt") -> Any:
    check_header(path)
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is damaged ({error}); copy the checkpoint again") from error


def _get(handle: Any, name: str, path: Path) -> torch.Tensor:
    try:
        return handle.get_tensor(name)
    except SafetensorError as error:
        raise CorruptFile(f"{path}: tensor {name} cannot be read ({error})") from error


def _safe_keys(path: Path) -> list[str]:
    with _open(path, "numpy") as handle:
        return list(handle.keys())
