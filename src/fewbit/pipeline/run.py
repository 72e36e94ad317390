"""Runs a plan: layer by layer, linear by linear, into shards, and the shards into a checkpoint.

Files are the only state. A shard that is there and belongs to the same plan is not made again, and the
hidden states between layers are on disk, so a killed run continues where it stopped.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.source import Source, open_source
from fewbit.checkpoint.store import disk_errors, write_tensors
from fewbit.errors import UsageError
from fewbit.math.hadamard import rotate_hessian
from fewbit.math.rounding import inverse_factor
from fewbit.models import get_family
from fewbit.pipeline.body import Body
from fewbit.pipeline.calibrate import LayerStream
from fewbit.pipeline.damping import CANDIDATES
from fewbit.pipeline.executors import Executor, make_executor
from fewbit.pipeline.finish import finish
from fewbit.pipeline.jobs import RoundJob, read_shard, tensor_signs
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import Plan, PlannedTensor, make_plan
from fewbit.pipeline.predict import predict
from fewbit.pipeline.progress import Logged, Progress, Silent
from fewbit.pipeline.texts import CalibrationText, calibration_windows, tokens_hash
from fewbit.pipeline.tune import Tuner
from fewbit.pipeline.workdir import check_output, check_space, default_work, earlier_plan, open_work


@dataclass(frozen=True)
class QuantizeResult:
    """What a run produced, as `fewbit quantize --json` prints it.

    `mean_relative_error` is the mean over tensors of |W - W^|^2 / |W|^2; `unseen` names the tensors that no
    calibration token reached (experts that were never chosen), which were rounded under a neutral prior.
    """

    output: str
    seconds: float
    peak_memory_bytes: int
    bits_per_weight: dict[str, float]
    bytes: int
    mean_relative_error: float
    resumed_tensors: int
    unseen: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Placement:
    """Where and how a run works; nothing here changes a byte of the result.

    `work` is the directory for what is not finished (None: beside the output), `executor` and `workers` say
    where tensors are rounded, `fresh` starts again and replaces an existing output.
    """

    work: Path | None = None
    executor: str = "serial"
    workers: int | None = None
    fresh: bool = False


def prepare(
    model: str | Path,
    options: QuantizeOptions,
    calibration: Sequence[CalibrationText | str | Path],
    earlier: Plan | None = None,
) -> tuple[Source, Plan, torch.Tensor | None]:
    """Open the source, cut the calibration text and plan; writes nothing.

    Returns the source, the plan and the calibration windows int64 `[n, window]` (None where the options
    need no calibration). What `earlier` chose for "auto" options is kept.
    """
    source = open_source(model)
    options = options.resolved(source.weights(), earlier.options if earlier else None)
    windows = None
    if options.rounding == "ldlq":
        texts = [text if isinstance(text, CalibrationText) else CalibrationText.parse(text) for text in calibration]
        if not texts:
            raise UsageError("error feedback needs calibration text; give --calib FILE, or use --rounding nearest")
        windows, _ = calibration_windows(source, texts, options.calib_tokens, options.calib_window)
    return source, make_plan(source, options, tokens_hash(windows) if windows is not None else ""), windows


def quantize(
    model: str | Path,
    output: str | Path,
    options: QuantizeOptions | None = None,
    calibration: Sequence[CalibrationText | str | Path] = (),
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Compress `model` (a Hugging Face directory, a hub id or a `.gguf` file) into the directory `output`.

    `calibration` are texts, or paths as `--calib` takes them. Resumes an interrupted run by default. Raises
    `UsageError` for wrong requests and other `FewbitError`s for damaged files or a full disk; the output
    directory appears only when everything in it is complete.
    """
    options, placement = options or QuantizeOptions(), placement or Placement()
    output = Path(output)
    started = time.monotonic()
    check_output(output, placement.fresh)
    executor = make_executor(placement.executor, placement.workers)
    work = placement.work.resolve() if placement.work else default_work(output)
    earlier = None if placement.fresh else earlier_plan(work)
    source, plan, windows = prepare(model, options, calibration, earlier)
    check_space(work, output, plan, windows.numel() if windows is not None else 0)
    open_work(work, plan, {} if earlier else {"prediction": predict(plan, windows)}, placement.fresh)
    run = _Run(source, plan, windows, work, executor, Logged(progress or Silent(), work / "log.jsonl"))
    try:
        with torch.no_grad(), disk_errors(work):
            run.layers()
            run.tables()
            run.tune()
            records = finish(source, plan, work, output, run.progress)
            shutil.rmtree(work)
    finally:
        executor.close()
    totals = plan.totals()
    errors = [record["relative_error"] for record in records if record["format"]]
    return QuantizeResult(
        output=str(output),
        seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        bits_per_weight=totals["bits_per_weight"],
        bytes=totals["bytes"],
        mean_relative_error=sum(errors) / len(errors) if errors else 0.0,
        resumed_tensors=run.resumed,
        unseen=[record["name"] for record in records if record.get("tokens") == 0],
    )


class _Run:
    """The state of one run in this process; everything that must survive it is in files."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        windows: torch.Tensor | None,
        work: Path,
        executor: Executor,
        progress: Progress,
    ) -> None:
        self.source = source
        self.plan = plan
        self.work = work
        self.executor = executor
        self.progress = progress
        self.resumed = 0
        self._windows = windows
        self._body: Body | None = None
        if windows is not None:
            dtype = getattr(torch, plan.options["calib_dtype"])
            stream = LayerStream(source, get_family(plan.model_type), windows, dtype)
            self._body = Body(stream, plan, work, executor, progress)

    def layers(self) -> None:
        """Quantize the decoder layers, in order."""
        if self._body is None:
            body = [tensor for tensor in self.plan.quantized if tensor.kind == "body"]
            self._round_all("rounding the layers", body, "")
            return
        self._body.run()
        self.resumed += self._body.resumed

    def tables(self) -> None:
        """Quantize the output head and the embeddings."""
        tables = [tensor for tensor in self.plan.quantized if tensor.kind in ("head", "embed")]
        # A tied table is read by the head as well, and the head's error is what reaches the logits.
        fed_back = [tensor for tensor in tables if tensor.kind == "head" or self.source.tied_embeddings]
        if self._body is not None and fed_back:
            missing = [tensor for tensor in fed_back if read_shard(self.work, self.plan, tensor) is None]
            factor = self._head_factor(self._body, missing[0]) if missing else ""
            self._round_all("rounding the output head", fed_back, factor)
            tables = [tensor for tensor in tables if tensor not in fed_back]
        if tables:
            self._round_all("rounding the embeddings", tables, "")

    def _head_factor(self, body: Body, tensor: PlannedTensor) -> str:
        assert tensor.spec is not None
        hessian, signs = body.head_hessian(), tensor_signs(tensor)
        if signs is not None:
            hessian = rotate_hessian(hessian, signs, tensor.spec.block)
        damping = self.plan.options["damping"]
        name = "factor-head.safetensors"
        factor = inverse_factor(hessian, CANDIDATES[1] if damping == "auto" else damping)
        write_tensors(self.work / name, {"factor": factor})
        return name

    def tune(self) -> None:
        """Adjust scales, norms and biases, where that was asked for."""
        if self._windows is not None and self.plan.options["tune"]:
            self._body = None
            with torch.enable_grad():
                Tuner(self.source, self.plan, self._windows, self.work, self.progress).run()

    def _round_all(self, title: str, tensors: list[PlannedTensor], factor: str) -> None:
        """Round tensors that do not wait for one another."""
        self.progress.stage(title, len(tensors))
        missing = [tensor for tensor in tensors if read_shard(self.work, self.plan, tensor) is None]
        self.resumed += len(tensors) - len(missing)
        self.progress.advance(len(tensors) - len(missing))
        jobs = [RoundJob(str(self.work), tensor.name, factor) for tensor in missing]
        for record in self.executor.run(jobs):
            self.progress.tensor(record)
            self.progress.advance()
