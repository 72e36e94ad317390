"""A run that is killed, at whatever moment, and repeated ends with the bytes of a run that was left alone."""

from __future__ import annotations

import errno
import json
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
from fewbit.errors import CorruptFile, FewbitError, UsageError
from fewbit.pipeline.jobs import PLAN_FILE
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import Placement, quantize
from fewbit.pipeline.tune import TEACHER
from fewbit.pipeline.workdir import default_work, locked

CALIBRATED = {"calib_tokens": 1024, "calib_window": 128, "calib_dtype": "float32", "tune": False}
KINDS = {
    "calibrated": QuantizeOptions(**CALIBRATED),
    "independent": QuantizeOptions(**CALIBRATED, sequential=False),
    "nearest": QuantizeOptions(rounding="nearest"),
    "tuned": QuantizeOptions(**{**CALIBRATED, "tune": True}, tune_steps=20),
    "allocated": QuantizeOptions(**CALIBRATED, bits=3.2),
    "twinquant": QuantizeOptions(**CALIBRATED, format="twinquant", learn_steps=20),
    "learned and tuned": QuantizeOptions(
        **{**CALIBRATED, "tune": True}, format="twinquant", learn_steps=16, tune_steps=20
    ),
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


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("calibrated", 1),
        ("independent", 1),
        ("nearest", 1),
        # Most moments of these are of one kind, one batch of many.
        ("tuned", 9),
        ("allocated", 5),
        ("twinquant", 7),
        ("learned and tuned", 19),
        pytest.param("learned and tuned", 1, marks=pytest.mark.slow),
        pytest.param("twinquant", 1, marks=pytest.mark.slow),
        pytest.param("tuned", 1, marks=pytest.mark.slow),
        pytest.param("allocated", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_ends_byte_identical_when_repeated(
    tiny_models, calibration_text, tmp_path, unpredicted, kind, step
):
    model, options = tiny_models["tied"], KINDS[kind]
    whole, found = moments(model, calibration_text, options, tmp_path)
    expected = files_of(whole)
    # Until the layers are done, a tuned run is like one that is not, which has a test of its own.
    late = [moment for moment in found if kind != "tuned" or (moment / ".out.work" / TEACHER).exists()]
    assert len(late) > 15
    for moment in late[::step]:
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
    try:
        return sum(1 + (path.name == "log.jsonl" and path.read_bytes().count(b"\n")) for path in directory.rglob("*"))
    except FileNotFoundError:  # gone meanwhile
        return 0


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_process_killed_by_a_signal_ends_byte_identical_when_repeated(tiny_models, calibration_text, tmp_path, kills):
    model, random_delay = tiny_models["biased"], random.Random(kills)
    options = ["--calib-tokens", "1024", "--calib-window", "128", "--calib-dtype", "float32", "--tune"]
    options += ["--tune-steps", "40"]
    assert command(model, tmp_path / "whole", calibration_text, *options).wait() == 0
    output = tmp_path / "run" / "out"
    output.parent.mkdir()
    killed = 0
    while not output.exists():
        process = command(model, output, calibration_text, *options)
        # Each time a little further than the time before, so that the whole run is covered by a few kills.
        goal = marks(output.parent) + random_delay.randrange(30 // kills, 100 // kills)
        while process.poll() is None and marks(output.parent) < goal:
            time.sleep(0.002)
        if killed < kills:
            time.sleep(random_delay.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= min(kills, 4)
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


@pytest.mark.parametrize("kind", ["calibrated", "nearest"])
def test_a_full_disk_is_named_at_whatever_write_and_the_run_goes_on_when_there_is_space(
    tiny_models, calibration_text, tmp_path, unpredicted, kind
):
    model, options = tiny_models["tied"], KINDS[kind]
    seen: list[Path] = []
    with effects(lambda what, path: seen.append(path) if what == "replace" else None):
        quantize(model, tmp_path / "whole", options, [calibration_text])
    # The last is the plan's, when the output is complete.
    for number in range(0, len(seen) - 1, 1 if kind == "nearest" else 4):
        left = [number]

        def full(what: str, path: Path, left: list[int] = left) -> None:
            left[0] -= what == "replace"
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with pytest.raises(FewbitError, match=r"No space left on device; free some space"), effects(full):
            quantize(model, tmp_path / "out", options, [calibration_text])
        assert not (tmp_path / "out").exists()
        quantize(model, tmp_path / "out", options, [calibration_text])
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def repeat(model: Path, text: Path, root: Path, kind: str = "calibrated") -> dict[str, bytes]:
    quantize(model, root / "out", KINDS[kind], [text])
    return files_of(root / "out")


@pytest.fixture
def model(tiny_models, tmp_path) -> Path:
    """A model that a test may change."""
    return shutil.copytree(tiny_models["tied"], tmp_path / "model")


def test_a_damaged_shard_of_a_layer_at_work_is_made_again(model, calibration_text, tmp_path, unpredicted):
    quantize(model, tmp_path / "whole", KINDS["calibrated"], [calibration_text])
    work = interrupted(model, calibration_text, tmp_path, "hidden/0001")
    cut_off(work / "shards" / "model.layers.0.self_attn.o_proj.safetensors")
    assert repeat(model, calibration_text, tmp_path) == files_of(tmp_path / "whole")


def test_a_damaged_shard_of_a_finished_layer_is_refused(model, calibration_text, tmp_path, unpredicted):
    work = interrupted(model, calibration_text, tmp_path, "hidden/0002")
    cut_off(work / "shards" / "model.layers.0.self_attn.o_proj.safetensors")
    with pytest.raises(CorruptFile, match=r"layers\.0\.self_attn\.o_proj.* start again with --fresh"):
        repeat(model, calibration_text, tmp_path)


@pytest.mark.parametrize(
    ("stop", "damaged", "remedy", "kind"),
    [
        ("hidden/0002", "hidden/0001/000001.safetensors", "hidden", "calibrated"),
        (f"{TEACHER}/0002", f"{TEACHER}/0001/000000.safetensors", TEACHER, "tuned"),
        ("tuned-plain", "tuning.safetensors", "tuning.safetensors", "tuned"),
        ("tuned-plain", "tuning-layers.safetensors", "tuning-layers.safetensors", "tuned"),
        ("out.partial/config.json", "tuned-plain.safetensors", "tuned-plain.safetensors", "tuned"),
    ],
)
def test_damaged_states_are_refused_and_what_to_delete_is_said(
    model, calibration_text, tmp_path, unpredicted, stop, damaged, remedy, kind
):
    quantize(model, tmp_path / "whole", KINDS[kind], [calibration_text])
    work = interrupted(model, calibration_text, tmp_path, stop, KINDS[kind])
    cut_off(work / damaged)
    with pytest.raises(CorruptFile, match=rf"{damaged} is damaged .*; delete .* and run again"):
        repeat(model, calibration_text, tmp_path, kind)
    victim = work / remedy
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    assert repeat(model, calibration_text, tmp_path, kind) == files_of(tmp_path / "whole")


def test_a_damaged_tuned_shard_does_not_fall_back_to_the_one_before_tuning(
    model, calibration_text, tmp_path, unpredicted
):
    work = interrupted(model, calibration_text, tmp_path, "out.partial/config.json", KINDS["tuned"])
    cut_off(work / "tuned" / "shards" / "model.layers.1.mlp.up_proj.safetensors")
    with pytest.raises(CorruptFile, match=r"tuned/shards/model\.layers\.1\.mlp\.up_proj.* --fresh"):
        repeat(model, calibration_text, tmp_path, "tuned")


def test_a_damaged_plan_is_refused_and_made_again_afresh(model, calibration_text, tmp_path, unpredicted):
    work = interrupted(model, calibration_text, tmp_path, "hidden/0001")
    cut_off(work / PLAN_FILE)
    with pytest.raises(CorruptFile, match=r"plan\.json is not JSON .*--fresh"):
        repeat(model, calibration_text, tmp_path)
    quantize(model, tmp_path / "out", KINDS["calibrated"], [calibration_text], Placement(fresh=True))


def test_other_texts_weights_and_models_are_refused_by_name(
    model, tiny_models, make_tiny, calibration_text, tmp_path, unpredicted
):
    interrupted(model, calibration_text, tmp_path, "hidden/0001")
    other = tmp_path / "other.txt"
    other.write_text(calibration_text.read_text()[::-1])
    with pytest.raises(UsageError, match="with other calibration tokens: the texts or their weights have changed"):
        repeat(model, other, tmp_path)
    with pytest.raises(UsageError, match=rf"another source model, {model}"):
        repeat(tiny_models["biased"], calibration_text, tmp_path)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x01\x02")
    with pytest.raises(UsageError, match=rf"another content of {model}: the model's files have changed"):
        repeat(model, calibration_text, tmp_path)


def test_a_model_that_was_moved_is_the_same_model(model, calibration_text, tmp_path, unpredicted, monkeypatch):
    quantize(model, tmp_path / "whole", KINDS["calibrated"], [calibration_text])
    monkeypatch.chdir(tmp_path)
    interrupted(Path("model"), calibration_text, tmp_path, "hidden/0001")
    monkeypatch.chdir("/")
    model.rename(tmp_path / "moved")
    assert repeat(tmp_path / "moved", calibration_text, tmp_path) == files_of(tmp_path / "whole")


def test_a_shard_of_the_source_that_is_cut_off_is_named(model, calibration_text, tmp_path):
    cut_off(model / "model.safetensors")
    with pytest.raises(CorruptFile, match=r"model\.safetensors: .* download it again"):
        repeat(model, calibration_text, tmp_path)
    assert not (tmp_path / ".out.work").exists()


def test_directories_above_the_output_are_made(model, calibration_text, tmp_path):
    quantize(model, tmp_path / "a" / "b" / "out", KINDS["nearest"])
    assert (tmp_path / "a" / "b" / "out" / "fewbit.json").exists()


def test_a_text_too_short_to_tune_on_is_used_without_tuning(model, calibration_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(calibration_text.read_text()[:400])
    quantize(model, tmp_path / "out", KINDS["tuned"], [short])
    assert "tuning" not in json.loads((tmp_path / "out" / "fewbit.json").read_text())


def test_a_second_process_in_the_same_directory_is_refused(tiny_models, calibration_text, tmp_path):
    with locked(default_work(tmp_path / "out")), pytest.raises(UsageError, match="another process works in"):
        quantize(tiny_models["tied"], tmp_path / "out", KINDS["nearest"], [calibration_text])
    # The lock of a process that was killed is nobody's: its file does not matter.
    (tmp_path / ".out.work.lock").touch()
    quantize(tiny_models["tied"], tmp_path / "out", KINDS["nearest"], [calibration_text])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
