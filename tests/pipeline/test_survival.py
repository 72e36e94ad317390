"""A run that is killed, at whatever moment, and repeated ends with the bytes of a run that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fewbit.pipeline.run as run_module
from fewbit.errors import UsageError
from fewbit.pipeline.jobs import PLAN_FILE
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import Placement, quantize

CALIBRATED = {"calib_tokens": 1024, "calib_window": 128, "calib_dtype": "float32", "tune": False}
KINDS = {
    "calibrated": QuantizeOptions(**CALIBRATED),
    "independent": QuantizeOptions(**CALIBRATED, sequential=False),
    "nearest": QuantizeOptions(rounding="nearest"),
    "tuned": QuantizeOptions(**{**CALIBRATED, "tune": True}, tune_steps=20),
    "allocated": QuantizeOptions(**CALIBRATED, bits=3.2),
}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Killed(BaseException):
    """As sudden as a signal: nothing in the package catches it."""


@contextmanager
def effects(before: Callable[[str, Path], None]) -> Iterator[None]:
    """Inside, `before(kind, path)` is called before every effect on the disk that more than one file hangs on:
    a file or directory gets its name ("replace"), a directory goes ("rmtree"), a file goes ("unlink")."""
    replace, rmtree, unlink = os.replace, shutil.rmtree, Path.unlink

    def seen_replace(source, target):
        before("replace", Path(target))
        replace(source, target)

    def seen_rmtree(path, ignore_errors=False):
        if Path(path).exists():
            before("rmtree", Path(path))
        rmtree(path, ignore_errors)

    def seen_unlink(self, missing_ok=False):
        if self.exists():
            before("unlink", self)
        unlink(self, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", seen_replace)
        patch.setattr(shutil, "rmtree", seen_rmtree)
        patch.setattr(Path, "unlink", seen_unlink)
        yield


def half_gone(path: Path) -> None:
    """What a process leaves that is killed while it removes a directory."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files[: (len(files) + 1) // 2]:
        os.unlink(file)  # Path.unlink is watched


@pytest.fixture
def unpredicted(monkeypatch):
    """Predictions measure this machine's speed, which takes most of a small run's time."""
    monkeypatch.setattr(run_module, "predict", lambda plan, windows: {})


def moments(model: Path, text: Path, options: QuantizeOptions, root: Path) -> tuple[Path, list[Path]]:
    """An undisturbed run's output, and what its directory looked like at every moment at which it could be killed."""
    live = root / "live"
    live.mkdir()
    found: list[Path] = []

    def snapshot(kind: str, path: Path) -> None:
        copy = root / f"moment-{len(found):03d}"
        shutil.copytree(live, copy)
        if kind == "rmtree":
            half_gone(copy / path.relative_to(live))
        found.append(copy)

    with effects(snapshot):
        quantize(model, live / "out", options, [text])
    return live / "out", found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_moment_ends_byte_identical_when_repeated(
    tiny_models, calibration_text, tmp_path, unpredicted, kind
):
    model, options = tiny_models["tied"], KINDS[kind]
    whole, found = moments(model, calibration_text, options, tmp_path)
    expected = files_of(whole)
    # Until the layers are done, a tuned run is like one that is not, which has a test of its own.
    late = [moment for moment in found if kind != "tuned" or (moment / ".out.work" / "full").exists()]
    assert len(late) > 15
    for moment in late:
        if not (moment / "out").exists():
            quantize(model, moment / "out", options, [calibration_text])
            assert not [path for path in moment.iterdir() if path.name != "out"]
        assert files_of(moment / "out") == expected, moment.name


def test_a_run_killed_while_it_starts_afresh_takes_nothing_over_from_the_one_before(
    tiny_models, calibration_text, tmp_path, unpredicted
):
    model, options = tiny_models["tied"], KINDS["calibrated"]
    quantize(model, tmp_path / "whole", options, [calibration_text])
    other = tmp_path / "other.txt"
    other.write_text("some other text than that " * 200)
    with pytest.raises(Killed):
        kill_at(model, tmp_path / "out", other, options, 30)
    work = tmp_path / ".out.work"
    assert (work / "hidden").is_dir()
    for entry in sorted(work.iterdir()):
        root = tmp_path / f"at-{entry.name}"
        shutil.copytree(work, root / ".out.work")

        def kill(kind: str, path: Path, victim: Path = root / ".out.work" / entry.name) -> None:
            if path == victim:
                raise Killed

        with pytest.raises(Killed), effects(kill):
            quantize(model, root / "out", options, [calibration_text], Placement(fresh=True))
        if (root / ".out.work" / PLAN_FILE).exists():
            # Nothing was removed yet, so this still is the other run.
            with pytest.raises(UsageError, match=r"other calibration tokens.*--fresh"):
                quantize(model, root / "out", options, [calibration_text])
            continue
        quantize(model, root / "out", options, [calibration_text])
        assert files_of(root / "out") == files_of(tmp_path / "whole"), entry.name


def kill_at(model: Path, output: Path, text: Path, options: QuantizeOptions, number: int) -> None:
    """Run until the effect of that number, then die."""
    left = [number]

    def count(kind: str, path: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with effects(count):
        quantize(model, output, options, [text])


def command(model: Path, output: Path, text: Path, *options: str) -> subprocess.Popen:
    program = "from fewbit.cli import main; main()"
    arguments = ["quantize", str(model), str(output), "--calib", str(text), "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def marks(directory: Path) -> int:
    """How far a run is, in files that it has made."""
    return sum(1 for _ in directory.rglob("*")) + sum(
        path.read_bytes().count(b"\n") for path in directory.rglob("log.jsonl")
    )


def test_a_process_killed_by_a_signal_ends_byte_identical_when_repeated(tiny_models, calibration_text, tmp_path):
    model, random_delay = tiny_models["biased"], random.Random(7)
    options = ["--calib-tokens", "1024", "--calib-window", "128", "--calib-dtype", "float32", "--tune"]
    options += ["--tune-steps", "40"]
    assert command(model, tmp_path / "whole", calibration_text, *options).wait() == 0
    output = tmp_path / "run" / "out"
    output.parent.mkdir()
    killed = 0
    while not output.exists():
        process = command(model, output, calibration_text, *options)
        # Each time a little further than the time before, so that the whole run is covered by a few kills.
        goal = marks(output.parent) + random_delay.randrange(4, 24)
        while process.poll() is None and marks(output.parent) < goal:
            time.sleep(0.002)
        if killed < 8:
            time.sleep(random_delay.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 3
    assert files_of(output) == files_of(tmp_path / "whole")
    shutil.rmtree(output.parent)


def interrupted(model: Path, text: Path, root: Path, stop: str, options: QuantizeOptions = KINDS["calibrated"]) -> Path:
    """The work directory of a run that died when the first path with `stop` in it was to get its name."""

    def kill(kind: str, path: Path) -> None:
        if kind == "replace" and stop in str(path):
            raise Killed

    with pytest.raises(Killed), effects(kill):
        quantize(model, root / "out", options, [text])
    return root / ".out.work"
