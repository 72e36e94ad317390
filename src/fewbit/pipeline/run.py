"""Runs a plan: layer by layer, linear by linear, into shards, and the shards into a checkpoint.

Files are the only state. A shard that is there and belongs to the same plan is not made again, and the
hidden states between layers are on disk, so a killed run continues at the layer where it stopped.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.artifact import is_artifact
from fewbit.checkpoint.source import Source, open_source
from fewbit.checkpoint.store import disk_errors, read_tensors, write_json, write_tensors
from fewbit.errors import CorruptFile, FewbitError, NonFiniteWeights, UsageError
from fewbit.formats import get_format
from fewbit.math.hadamard import pack_signs, random_signs, rotate_hessian, unrotate
from fewbit.math.rounding import inverse_factor, quantize_matrix
from fewbit.models import Family, get_family
from fewbit.pipeline.calibrate import HessianCollector, LayerStream, calibration_windows, tokens_hash
from fewbit.pipeline.finish import finish
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import Plan, PlannedTensor, make_plan
from fewbit.pipeline.predict import predict
from fewbit.pipeline.progress import Logged, Progress, Silent


@dataclass(frozen=True)
class QuantizeResult:
    """What a run produced, as `fewbit quantize --json` prints it."""

    output: str
    seconds: float
    peak_memory_bytes: int
    bits_per_weight: dict[str, float]
    bytes: int
    mean_relative_error: float
    resumed_tensors: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prepare(
    model: str | Path, options: QuantizeOptions, calibration_files: Sequence[Path]
) -> tuple[Source, Plan, torch.Tensor | None]:
    """Open the source, cut the calibration text and plan; writes nothing.

    Returns the source, the plan and the calibration windows int64 `[n, window]` (None where the options
    need no calibration).
    """
    options = options.resolved()
    source = open_source(model)
    windows = None
    if options.rounding == "ldlq":
        if not calibration_files:
            raise UsageError("error feedback needs calibration text; give --calib FILE, or use --rounding nearest")
        windows = calibration_windows(source, calibration_files, options.calib_tokens, options.calib_window)
    return source, make_plan(source, options, tokens_hash(windows) if windows is not None else ""), windows


def quantize(
    model: str | Path,
    output: str | Path,
    options: QuantizeOptions | None = None,
    calibration_files: Sequence[str | Path] = (),
    fresh: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Compress `model` (a Hugging Face directory, a hub id or a `.gguf` file) into the directory `output`.

    Resumes an interrupted run by default; `fresh` starts again and replaces an existing output. Raises
    `UsageError` for wrong requests and other `FewbitError`s for damaged files or a full disk; the output
    directory appears only when everything in it is complete.
    """
    options = options or QuantizeOptions()
    output = Path(output)
    started = time.monotonic()
    _check_output(output, fresh)
    source, plan, windows = prepare(model, options, [Path(file) for file in calibration_files])
    work = output.resolve().with_name(f".{output.resolve().name}.work")
    _open_work(work, plan, windows, fresh)
    _check_space(work, plan, windows)
    run = _Run(source, plan, windows, work, Logged(progress or Silent(), work / "log.jsonl"))
    with torch.inference_mode(), disk_errors(work):
        run.layers()
        run.tables()
        finish(source, plan, work, output)
        shutil.rmtree(work)
    totals = plan.totals()
    return QuantizeResult(
        output=str(output),
        seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        bits_per_weight=totals["bits_per_weight"],
        bytes=totals["bytes"],
        mean_relative_error=run.mean_error(),
        resumed_tensors=run.resumed,
    )


def _check_output(output: Path, fresh: bool) -> None:
    """Refuse to write over what is there, and to replace anything but a checkpoint or an empty directory."""
    if not output.exists():
        return
    if not fresh:
        raise UsageError(f"{output} exists already; choose another output or replace it with --fresh")
    if not output.is_dir() or (any(output.iterdir()) and not is_artifact(output)):
        raise UsageError(f"{output} is not a fewbit checkpoint, so --fresh does not replace it; choose another output")


def _open_work(work: Path, plan: Plan, windows: torch.Tensor | None, fresh: bool) -> None:
    """Make the work directory, or check that the one there belongs to this plan."""
    with disk_errors(work):
        if fresh and work.exists():
            shutil.rmtree(work)
        (work / "shards").mkdir(parents=True, exist_ok=True)
    plan_file = work / "plan.json"
    if plan_file.exists():
        earlier = Plan.load(plan_file)
        if earlier.identity != plan.identity:
            raise UsageError(
                f"{work} holds an interrupted run with {_difference(earlier, plan)}; "
                "repeat that request to continue it, or start again with --fresh"
            )
        return
    write_json(plan_file, {**plan.to_json(), "prediction": predict(plan, windows)})


def _difference(earlier: Plan, plan: Plan) -> str:
    if earlier.fingerprint != plan.fingerprint:
        return "another source model"
    changed = [
        f"{key} {earlier.options.get(key)} instead of {value}"
        for key, value in plan.options.items()
        if earlier.options.get(key) != value
    ]
    return ", ".join(changed) or "another plan"


def _check_space(work: Path, plan: Plan, windows: torch.Tensor | None) -> None:
    # Shards and the finished files exist side by side for a moment, and so do two generations of hidden states.
    hidden = 0
    if windows is not None:
        hidden = 2 * 4 * windows.numel() * next(tensor.shape[1] for tensor in plan.tensors if tensor.kind == "embed")
    needed = sum(tensor.bytes for tensor in plan.quantized) + plan.totals()["bytes"] + hidden
    free = shutil.disk_usage(work).free
    if free < needed:
        raise FewbitError(
            f"the disk of {work.parent} has {free / 1e6:.0f} MB free and the run needs about {needed / 1e6:.0f} MB; "
            "free some space or write to another disk"
        )


class _Run:
    """The state of one run in this process; everything that must survive it is in files."""

    def __init__(
        self, source: Source, plan: Plan, windows: torch.Tensor | None, work: Path, progress: Progress
    ) -> None:
        self.source = source
        self.plan = plan
        self.family: Family = get_family(plan.model_type)
        self.windows = windows
        self.work = work
        self.progress = progress
        self.resumed = 0
        self.by_module = {tensor.module: tensor for tensor in plan.quantized}
        self._errors: list[float] = []
        self._hessian_cache: dict[str, torch.Tensor] = {}

    def mean_error(self) -> float:
        return sum(self._errors) / len(self._errors) if self._errors else 0.0

    def shard(self, tensor: PlannedTensor) -> Path:
        return self.work / "shards" / f"{tensor.module}.safetensors"

    def layers(self) -> None:
        """Quantize the decoder layers, in order."""
        if self.windows is None:
            body = [tensor for tensor in self.plan.quantized if tensor.kind == "body"]
            self.progress.stage("rounding the layers", len(body))
            for tensor in body:
                self._store(tensor, partial(self.source.tensor, tensor.name), None)
                self.progress.advance()
            return
        stream = LayerStream(self.source, self.family, getattr(torch, self.plan.options["calib_dtype"]))
        start, hidden = self._restore_hidden(stream)
        # Each window passes every layer twice: once to measure, once behind the rounded weights.
        self.progress.stage("calibrating and rounding the layers", 2 * len(self.windows) * (len(stream) - start))
        for index in range(start, len(stream)):
            self._layer(stream, index, hidden)
            self._save_hidden(index + 1, hidden)
        self._head_hessian(stream, hidden)

    def _layer(self, stream: LayerStream, index: int, hidden: torch.Tensor) -> None:
        """Measure and quantize one layer; `hidden` then holds what the rounded layer makes of it."""
        prefix = f"{self.family.layers}.{index}"
        stream.load(prefix)
        planned = {
            shared.linears: [
                f"{prefix}.{linear}" for linear in shared.linears if f"{prefix}.{linear}" in self.by_module
            ]
            for shared in self.family.inputs
        }
        watched = [(members[0], stream.model.get_submodule(members[0])) for members in planned.values() if members]
        with HessianCollector(watched) as collector:
            stream.run_layer(index, hidden, advance=self.progress.advance)
        for members in planned.values():
            for module in members:
                tensor = self.by_module[module]
                linear = stream.model.get_submodule(module)
                hessian = collector.mean(members[0])
                linear.weight.data = self._store(tensor, partial(getattr, linear.weight, "data"), hessian)
            self._hessian_cache.clear()
        stream.run_layer(index, hidden, hidden, self.progress.advance)
        stream.unload(prefix)

    def _hidden_file(self) -> Path:
        return self.work / "hidden.safetensors"

    def _save_hidden(self, next_layer: int, hidden: torch.Tensor) -> None:
        write_tensors(
            self._hidden_file(), {"hidden": hidden}, {"next_layer": str(next_layer), "plan": self.plan.identity}
        )

    def _restore_hidden(self, stream: LayerStream) -> tuple[int, torch.Tensor]:
        assert self.windows is not None
        if self._hidden_file().exists():
            tensors, metadata = read_tensors(self._hidden_file())
            if metadata.get("plan") == self.plan.identity:
                stream.prepare(self.windows)
                start = int(metadata["next_layer"])
                self._count_resumed(start)
                return start, tensors["hidden"]
        return 0, stream.embed(self.windows)

    def _count_resumed(self, start: int) -> None:
        for tensor in self.plan.quantized:
            if tensor.kind == "body" and int(tensor.shared_input.partition(".")[0]) < start:
                record = self._existing(tensor)
                if record is None:
                    raise CorruptFile(f"{self.shard(tensor)} is missing or damaged; start again with --fresh")
                self._errors.append(record[1])
                self.resumed += 1

    def _head_hessian(self, stream: LayerStream, hidden: torch.Tensor) -> None:
        norm = stream.load(self.family.final_norm)
        total = torch.zeros(hidden.shape[-1], hidden.shape[-1])
        for batch in hidden:
            x = norm(batch)
            total.addmm_(x.T, x)
        stream.unload(self.family.final_norm)
        write_tensors(self.work / "head-hessian.safetensors", {"hessian": total / hidden[..., 0].numel()})

    def tables(self) -> None:
        """Quantize the output head and the embeddings."""
        tables = [tensor for tensor in self.plan.quantized if tensor.kind in ("head", "embed")]
        if not tables:
            return
        self.progress.stage("rounding embeddings and head", len(tables))
        for tensor in tables:
            hessian = None
            # A tied table is read by the head as well, and the head's error is what reaches the logits.
            if self.windows is not None and (tensor.kind == "head" or self.source.tied_embeddings):
                hessian = read_tensors(self.work / "head-hessian.safetensors")[0]["hessian"]
            self._store(tensor, partial(self.source.tensor, tensor.name), hessian, need_values=False)
            self.progress.advance()

    def _existing(self, tensor: PlannedTensor) -> tuple[dict[str, torch.Tensor], float] | None:
        """The parts and the error of a shard made by this plan, or None."""
        path = self.shard(tensor)
        if not path.exists():
            return None
        try:
            parts, metadata = read_tensors(path)
        except CorruptFile:
            return None
        if metadata.get("plan") != self.plan.identity:
            return None
        return {name.removeprefix(f"{tensor.module}."): part for name, part in parts.items()}, float(metadata["error"])

    def _store(
        self,
        tensor: PlannedTensor,
        weight: Callable[[], torch.Tensor],
        hessian: torch.Tensor | None,
        need_values: bool = True,
    ) -> torch.Tensor:
        """Quantize one tensor into its shard unless that is there; returns what it decodes to, `[N, K]`."""
        spec = tensor.spec
        assert spec is not None
        signs = random_signs(spec.cols, tensor.signs_seed) if spec.block > 1 else None
        existing = self._existing(tensor)
        if existing is not None:
            self.resumed += 1
            self._errors.append(existing[1])
            values = get_format(spec.format).dequantize(existing[0], spec) if need_values else torch.empty(0)
        else:
            values = self._round(tensor, weight(), signs, hessian, need_values)
        if signs is None or not need_values:
            return values
        return unrotate(values, signs, spec.block)

    def _round(
        self,
        tensor: PlannedTensor,
        weight: torch.Tensor,
        signs: torch.Tensor | None,
        hessian: torch.Tensor | None,
        need_values: bool,
    ) -> torch.Tensor:
        spec = tensor.spec
        assert spec is not None
        started = time.monotonic()
        if not torch.isfinite(weight).all():
            raise NonFiniteWeights(f"{tensor.name} holds NaN or infinity; the source model is damaged")
        factor = self._factor(tensor, signs, hessian)
        quantized = quantize_matrix(get_format(spec.format), weight, spec, signs, factor, need_values)
        parts = {f"{tensor.module}.{name}": part for name, part in quantized.parts.items()}
        if signs is not None:
            parts[f"{tensor.module}.signs"] = pack_signs(signs)
        error = quantized.relative_error
        write_tensors(self.shard(tensor), parts, {"plan": self.plan.identity, "error": repr(error)})
        self._errors.append(error)
        self.progress.tensor(
            {
                "tensor": tensor.name,
                "format": spec.format,
                "bits_per_weight": round(tensor.bits_per_weight, 4),
                "relative_error": round(error, 6),
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        return quantized.values

    def _factor(
        self, tensor: PlannedTensor, signs: torch.Tensor | None, hessian: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The inverse Hessian's factor in the rotated domain, shared by all readers of one input."""
        if hessian is None:
            return None
        if tensor.shared_input not in self._hessian_cache:
            assert tensor.spec is not None
            if signs is not None:
                hessian = rotate_hessian(hessian, signs, tensor.spec.block)
            self._hessian_cache[tensor.shared_input] = inverse_factor(hessian, self.plan.options["damping"])
        return self._hessian_cache[tensor.shared_input]
