"""Runs a plan: layer by layer, linear by linear, into shards, and the shards into a checkpoint.

Files are the only state. A shard that is there and belongs to the same plan is not made again, and the
hidden states between layers are on disk, so a killed run continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.equivalent import TRANSFORM, equivalent
from fewbit.checkpoint.source import Source, open_source
from fewbit.checkpoint.store import disk_errors
from fewbit.errors import UsageError
from fewbit.pipeline.allocate import Choice, allocate, check_budget
from fewbit.pipeline.descent import descent_windows
from fewbit.pipeline.executors import Executor, check_executor, choose_executor, make_executor
from fewbit.pipeline.finish import finish
from fewbit.pipeline.learn import Learner
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import Plan, make_plan
from fewbit.pipeline.predict import predict
from fewbit.pipeline.progress import Logged, Progress, Silent
from fewbit.pipeline.sensitivity import Sensitivities
from fewbit.pipeline.shards import ShardMaker
from fewbit.pipeline.smooth import measure_scales
from fewbit.pipeline.texts import CalibrationText, calibration_windows, tokens_hash
from fewbit.pipeline.tune import Tuner, tuning_result
from fewbit.pipeline.workdir import (
    check_apart,
    check_output,
    check_space,
    check_work,
    default_work,
    earlier_plan,
    locked,
    open_work,
    remove_work,
)
from fewbit.resident import peak_resident_bytes


@dataclass(frozen=True)
class QuantizeResult:
    """What a run produced, as `fewbit quantize --json` prints it.

    `mean_relative_error` is the mean over tensors of |W - W^|^2 / |W|^2; `unseen` names the tensors that no
    calibration token reached (experts that were never chosen), which were rounded under a neutral prior; a `resumed`
    run went on with what an earlier process had begun, whose `seconds` are not counted; `peak_memory_bytes` counts
    workers on this machine;
    `tuning_gain` is the divergence on held-out calibration windows before and after tuning, in nats.
    """

    output: str
    seconds: float
    peak_memory_bytes: int
    executor: str
    bits_per_weight: dict[str, float]
    bytes: int
    mean_relative_error: float
    resumed: bool
    resumed_tensors: int
    unseen: list[str]
    tuning_gain: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Placement:
    """Where and how a run works; nothing here changes a byte of the result.

    `work` is the directory for what is not finished (None: beside the output), `executor` and `workers` say
    where tensors are rounded, `fresh` starts again and replaces an existing output. "auto" may start processes, so a
    script that asks for it, or for "process", needs the usual `if __name__ == "__main__":`.
    """

    work: Path | None = None
    executor: str = "serial"
    workers: int | None = None
    fresh: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        check_executor(self.executor, self.workers, self.ray_address)

    def make_executor(self, plan: Plan) -> Executor:
        """The executor for a plan."""
        return make_executor(*choose_executor(self.executor, self.workers, plan), self.ray_address)


@dataclass(frozen=True)
class Prepared:
    """A request, read and planned: the source, the resolved options, the calibration windows int64 `[n, window]`
    (None where the options need no calibration), those of tuning and learning (None without) and the plan."""

    source: Source
    options: QuantizeOptions
    windows: torch.Tensor | None
    tuning: torch.Tensor | None
    learning: torch.Tensor | None
    plan: Plan


def prepare(
    model: str | Path,
    options: QuantizeOptions,
    calibration: Sequence[CalibrationText | str | Path],
    placement: Placement | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Open the source, cut the calibration text and plan.

    Where the options leave the bits to measurement (a fractional number of bits, or a target size), sensitivities
    are measured in the directory `work` first, or found there; everything else writes nothing. What an unfinished
    run in `work` chose for "auto" options is kept.
    """
    placement = placement or Placement()
    earlier = earlier_plan(work) if work is not None and not placement.fresh else None
    source = open_source(model)
    options = options.resolved(source.weights(), earlier.options if earlier else None)
    windows = tuning = learning = None
    known = ""
    if options.rounding == "ldlq":
        texts = [text if isinstance(text, CalibrationText) else CalibrationText.parse(text) for text in calibration]
        if not texts:
            raise UsageError("error feedback needs calibration text; give --calib FILE, or use --rounding nearest")
        windows, _ = calibration_windows(source, texts, options.calib_tokens, options.calib_window)
        known = tokens_hash(windows)
        if options.tune:
            wanted = descent_windows(options.tune_steps) * options.calib_window
            tuning, _ = calibration_windows(source, texts, wanted, options.calib_window)
            known += tokens_hash(tuning)
        if options.learn:
            wanted = descent_windows(options.learn_steps) * options.calib_window
            learning, _ = calibration_windows(source, texts, wanted, options.calib_window)
            known += tokens_hash(learning)
    if not options.allocates:
        plan = make_plan(source, options, known)
        if options.spec_choices.get("rank") and not any(tensor.spec.rank for tensor in plan.quantized if tensor.spec):
            (progress or Silent()).note(
                f"no matrix here takes a branch of rank {options.rank}: ranks are whole groups of up to 128 inputs, "
                "and at most a quarter of the narrower side"
            )
        return Prepared(source, options, windows, tuning, learning, plan)
    assert windows is not None
    if work is None:
        raise UsageError("bits that follow from sensitivities need a work directory to measure them in")
    bits = choose_bits(source, options, windows, placement, work / "sensitivity", progress or Silent())
    return Prepared(source, options, windows, tuning, None, make_plan(source, options, known, bits))


def choose_bits(
    source: Source,
    options: QuantizeOptions,
    windows: torch.Tensor,
    placement: Placement,
    work: Path,
    progress: Progress,
) -> dict[str, int]:
    """Bits for every unit of the model, from its sensitivities and the budget that `options` give."""
    trial = options.trial()
    windows = windows[: max(1, trial.calib_tokens // trial.calib_window)]
    plan = make_plan(source, trial, tokens_hash(windows))
    plans = {bits: make_plan(source, options.trial(bits), "") for bits in options.offered_bits}
    sizes: dict[str, dict[int, int]] = {}
    for bits, candidate in plans.items():
        for tensor in candidate.quantized:
            of_unit = sizes.setdefault(tensor.unit, {})
            of_unit[bits] = of_unit.get(bits, 0) + tensor.bytes
    free = [unit for unit in sizes if options.head == "auto" or unit not in ("head", "embed")]
    chosen = {tensor.name for tensor in plan.quantized if tensor.unit in free}
    if options.target_bytes:
        budget = options.target_bytes - sum(tensor.bytes for tensor in plan.tensors if tensor.name not in chosen)
    else:
        budget = int(options.bits * sum(tensor.weights for tensor in plan.tensors if tensor.name in chosen) / 8)
    # What cannot fit is refused before minutes are spent on measuring.
    check_budget([sizes[unit] for unit in free], budget)
    earlier = None if placement.fresh else earlier_plan(work)
    open_work(work, plan, {}, placement.fresh or (earlier is not None and earlier.identity != plan.identity))
    executor = placement.make_executor(plan)
    logged = Logged(progress, work / "log.jsonl")
    try:
        with torch.no_grad(), disk_errors(work):
            maker = ShardMaker(source, plan, windows, work, executor, logged)
            maker.layers()
            maker.tables()
            found = Sensitivities(source, plan, windows, work, logged).measure()
    finally:
        executor.close()
    choices = [Choice(unit, sizes[unit], found[unit], trial.whole_bits) for unit in free]
    return allocate(choices, budget, options.format_name)


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
    options, placement, progress = options or QuantizeOptions(), placement or Placement(), progress or Silent()
    work = _checked_work(output, placement)
    with locked(work):
        return _quantize(model, Path(output), options, calibration, placement, work, progress)


def preview(
    model: str | Path,
    output: str | Path,
    options: QuantizeOptions,
    calibration: Sequence[CalibrationText | str | Path] = (),
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """What `quantize` would do with the same arguments, and the same errors where it would refuse the output.

    Nothing is written, except sensitivities in the work directory where the bits follow from them.
    """
    placement = placement or Placement()
    work = _checked_work(output, placement)
    with locked(work) if options.allocates else nullcontext():
        return prepare(model, options, calibration, placement, work, progress)


def _checked_work(output: str | Path, placement: Placement) -> Path:
    """The work directory of a run that may write `output`."""
    check_output(Path(output), placement.fresh)
    work = placement.work.resolve() if placement.work else default_work(Path(output))
    check_apart(work, Path(output))
    check_work(work)
    return work


def _quantize(
    model: str | Path,
    output: Path,
    options: QuantizeOptions,
    calibration: Sequence[CalibrationText | str | Path],
    placement: Placement,
    work: Path,
    progress: Progress,
) -> QuantizeResult:
    started = time.monotonic()
    resumed = not placement.fresh and earlier_plan(work) is not None
    found = prepare(model, options, calibration, placement, work, progress)
    source, plan, windows = found.source, found.plan, found.windows
    tokens = [
        0 if cut is None else cut.numel() for cut in (windows, found.learning if found.tuning is None else found.tuning)
    ]
    check_space(work, output, plan, *tokens)
    open_work(work, plan, {"prediction": predict(plan, windows)}, placement.fresh, ("sensitivity",))
    executor = placement.make_executor(plan)
    logged = Logged(progress, work / "log.jsonl")
    try:
        with torch.no_grad(), disk_errors(work):
            if found.options.smooths and windows is not None:
                scales = measure_scales(source, windows, getattr(torch, plan.options["calib_dtype"]), work, logged)
                if found.learning is None:
                    scales.save(work / TRANSFORM)
                else:
                    with torch.enable_grad():
                        Learner(source, plan, scales, found.learning, work, logged).run()
            maker = ShardMaker(equivalent(source, work), plan, windows, work, executor, logged)
            maker.layers()
            maker.tables()
            if found.tuning is not None:
                with torch.enable_grad():
                    Tuner(equivalent(source, work), plan, found.tuning, work, logged).run()
            report = tuning_result(work)[1]
            records = finish(source, plan, work, output, logged)
            remove_work(work)
    finally:
        executor.close()
    totals = plan.totals()
    errors = [record["relative_error"] for record in records if record["format"]]
    return QuantizeResult(
        output=str(output),
        seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=peak_resident_bytes() + executor.peak_bytes,
        executor=executor.name,
        bits_per_weight=totals["bits_per_weight"],
        bytes=totals["bytes"],
        mean_relative_error=sum(errors) / len(errors) if errors else 0.0,
        resumed=resumed,
        resumed_tensors=maker.resumed,
        unseen=[record["name"] for record in records if record.get("tokens") == 0],
        tuning_gain=(report["rounded"], min(look["held"] for look in report["history"])) if report else None,
    )
