"""The directory of a run that is not finished: whether it belongs to the request, and whether it fits the disk."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewbit.checkpoint.artifact import is_artifact
from fewbit.checkpoint.damage import read_json
from fewbit.checkpoint.store import SHARD_LIMIT, disk_errors, write_json
from fewbit.errors import FewbitError, UsageError
from fewbit.formats import get_format
from fewbit.pipeline.jobs import PLAN_FILE
from fewbit.pipeline.plan import Plan

UNPLANNED = f"{PLAN_FILE}.partial"
"""What the plan is called while it is written, and while the directory is emptied: its other files then count for
nothing."""


def check_output(output: Path, fresh: bool) -> None:
    """Refuse to write over what is there, and to replace anything but a checkpoint or an empty directory."""
    if not output.exists():
        return
    if not fresh:
        raise UsageError(f"{output} exists already; choose another output or replace it with --fresh")
    if not output.is_dir() or (any(output.iterdir()) and not is_artifact(output)):
        raise UsageError(f"{output} is not a fewbit checkpoint, so --fresh does not replace it; choose another output")


def check_apart(work: Path, output: Path) -> None:
    """Refuse a work directory that holds the output or lies in it: it is removed at the end with all that is in it."""
    output = output.resolve()
    if work == output or work in output.parents or output in work.parents:
        raise UsageError(
            f"the work directory {work} and the output {output} must not contain one another: the work directory is "
            "removed at the end; choose another --work-dir"
        )


def default_work(output: Path) -> Path:
    """Beside the output, so that the finished directory is one rename away."""
    return output.resolve().with_name(f".{output.resolve().name}.work")


def check_work(work: Path) -> None:
    """Refuse a work directory with files that are not a run's: they would go when the run begins, and at its end."""
    if not work.exists():
        return
    if not work.is_dir():
        raise UsageError(f"{work} is no directory; choose another --work-dir")
    if any(work.iterdir()) and not _is_work(work):
        raise UsageError(f"{work} is not empty and holds no run of fewbit; choose another --work-dir")


def earlier_plan(work: Path) -> Plan | None:
    """The plan of the run that `work` holds, if any; raises `CorruptFile` where it cannot be read."""
    return Plan.load(work / PLAN_FILE) if (work / PLAN_FILE).exists() else None


def open_work(work: Path, plan: Plan, facts: dict[str, Any], fresh: bool, keep: tuple[str, ...] = ()) -> None:
    """Make the work directory, or check that the one there belongs to this plan; `facts` are written beside it.

    Where `fresh` is asked for, or a run died without a plan, everything but the entries named in `keep` goes first.
    The source is taken from where it is now; a run may go on after its model was moved.
    """
    earlier = None if fresh else earlier_plan(work)
    if earlier is None:
        check_work(work)
    else:
        if earlier.identity != plan.identity:
            raise UsageError(
                f"{work} holds an interrupted run with {difference(earlier, plan)}; "
                "repeat that request to continue it, or start again with --fresh"
            )
        if earlier.source != plan.source:
            write_json(work / PLAN_FILE, {**read_json(work / PLAN_FILE), "source": plan.source})
        return
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        _empty(work, keep)
    write_json(work / PLAN_FILE, {**plan.to_json(), **facts})


@contextmanager
def locked(work: Path, otherwise: str = "choose another --work-dir") -> Iterator[None]:
    """Inside, no other process works in `work`; the system gives the lock back when this one ends, however it ends.

    Raises `UsageError` where another process has it; `otherwise` is what to do instead of waiting.
    """
    # Beside the directory, which is emptied and removed while it is locked.
    path = work.with_name(f"{work.name}.lock")
    with disk_errors(path):
        work.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process works in {work}; wait for it, or {otherwise}") from error
        try:
            yield
        finally:
            # A lock file that stays is nobody's lock, and no reason to hide what went wrong inside.
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


def remove_work(work: Path) -> None:
    """Remove the directory of a run that is finished."""
    _empty(work, ())
    shutil.rmtree(work)


def _empty(work: Path, keep: tuple[str, ...]) -> None:
    """Remove a run's files; a process that is killed in here leaves nothing that a later one takes for a run."""
    if (work / PLAN_FILE).exists():
        os.replace(work / PLAN_FILE, work / UNPLANNED)
    for entry in sorted(work.iterdir()):
        if entry.name not in (*keep, UNPLANNED):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_work(work: Path) -> bool:
    places = (work, work / "sensitivity")
    return any((place / name).exists() for place in places for name in (PLAN_FILE, UNPLANNED))


def difference(earlier: Plan, plan: Plan) -> str:
    """What another plan has that this one has not, in words."""
    if earlier.fingerprint != plan.fingerprint:
        if earlier.source == plan.source:
            return f"another content of {plan.source}: the model's files have changed since"
        return f"another source model, {earlier.source}"
    changed = [
        "other calibration tokens: the texts or their weights have changed"
        if key == "calibration"
        else f"{key} {earlier.options.get(key)} instead of {value}"
        for key, value in plan.options.items()
        if earlier.options.get(key) != value
    ]
    return ", ".join(changed) or "another plan: it was made by another release of fewbit"


def check_space(work: Path, output: Path, plan: Plan, calibration_tokens: int, tuning_tokens: int = 0) -> None:
    """Refuse to begin what the disk has no room for."""
    spill = 0
    if calibration_tokens:
        widest = max((tensor.shape[1] for tensor in plan.quantized if tensor.kind == "body"), default=0)
        width = next(tensor.shape[1] for tensor in plan.tensors if tensor.kind == "embed")
        # Two generations of hidden states, the stream and the inputs of a layer's last linear, and the factors of one
        # unit, of which a mixture of experts has many.
        spill = calibration_tokens * (3 * 4 * width + 2 * widest) + _calibration_bytes(plan)
        # The last generation stays while tuning has two of its own.
        spill = max(spill, 4 * width * (calibration_tokens + 2 * tuning_tokens))
    shards = sum(tensor.bytes for tensor in plan.quantized)
    if plan.options["tune"]:
        shards += sum(tensor.bytes for tensor in plan.quantized if tensor.kind == "body")
    present = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    # The finished files are copied once while their headers are made.
    finished = plan.totals()["bytes"] + min(plan.totals()["bytes"], SHARD_LIMIT)
    needed = ((work, max(0, shards + spill - present)), (output.resolve().parent, finished))
    disks = [_existing(path) for path, _ in needed]
    same = disks[0].stat().st_dev == disks[1].stat().st_dev
    for (path, size), disk in zip(needed, disks, strict=True):
        want = sum(size for _, size in needed) if same else size
        free = shutil.disk_usage(disk).free
        if free < want:
            raise FewbitError(
                f"the disk of {path} has {free / 1e6:.0f} MB free and the run needs about {want / 1e6:.0f} MB; "
                "free some space or write to another disk"
            )


def _calibration_bytes(plan: Plan) -> int:
    """The most that the files take together that calibration makes for one unit."""
    units: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for tensor in plan.quantized:
        assert tensor.spec is not None
        size = get_format(tensor.spec.format).calibration_bytes(tensor.spec)
        units[tensor.unit][tensor.shared_input] = size
    return max((sum(inputs.values()) for inputs in units.values()), default=0)


def _existing(path: Path) -> Path:
    """The nearest directory that is there, of those that `path` is in."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
