"""Kills quantization at random moments and lays other faults in its way; every run must end with the same bytes.

Each run is a process of the command line on a toy model. Killed ones (SIGKILL) are started again, several
times over, until they end; what a run was doing when it was killed is read from its log. The disk that fills up and the
one that cannot be written are file systems of their own, which takes the right to mount them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encode import commit
from saving import save
from toy import toy_model

from fewbit.assets import fetch_text
from fewbit.environment import environment

OUTPUT = Path(__file__).resolve().parent / "results" / "robustness-interrupted.json"
CALIBRATION = ["--calib-tokens", "8192", "--calib-window", "128", "--calib-dtype", "float32", "--tune"]
KINDS = {
    "itq3_s": [*CALIBRATION, "--tune-steps", "80"],
    "itq3_s, 3.2 bits by sensitivity": [*CALIBRATION, "--tune-steps", "80", "--bits", "3.2"],
    "twinquant": [*CALIBRATION, "--tune-steps", "80", "--format", "twinquant"],
}
PROGRAM = "from fewbit.cli import main; main()"
# Every reading of a clock may be hours before or behind the one before.
JUMPING = f"""
import random, time
for name in ("time", "monotonic", "perf_counter"):
    setattr(time, name, lambda true=getattr(time, name): true() + random.uniform(-1e4, 1e4))
{PROGRAM}
"""
MEGABYTE = 1 << 20
KILLS_OF_ONE = 2  # so that moments are spread over whole runs
EARLY = 0.1  # of the kills, while a program starts


class Runs:
    """Quantizations of one model, all with the same options."""

    def __init__(self, model: Path, text: Path, options: list[str]) -> None:
        self.model, self.text, self.options = model, text, options

    def start(self, output: Path, program: str = PROGRAM) -> subprocess.Popen[str]:
        arguments = ["quantize", str(self.model), str(output), "--calib", str(self.text), *self.options]
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, output: Path, program: str = PROGRAM) -> tuple[int, str]:
        """Run to the end: the exit code and what was said on stderr."""
        process = self.start(output, program)
        _, words = process.communicate()
        return process.returncode, words


def digest(directory: Path) -> str:
    """A hash over the names and contents of a checkpoint's files."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def stage(output: Path) -> str:
    """What the run was doing, by the last line of its log that names a stage."""
    log = output.parent / f".{output.name}.work" / "log.jsonl"
    if not log.exists():
        return "planning"
    # The last line may be half a line.
    stages = [line for line in log.read_text().splitlines() if '"stage"' in line and line.endswith("}")]
    return json.loads(stages[-1])["stage"] if stages else "planning"


def wait_for_work(process: subprocess.Popen[str], output: Path) -> bool:
    """Wait until the run has a plan, and thus works; whether it does, and has not ended."""
    plan = output.parent / f".{output.name}.work" / "plan.json"
    while process.poll() is None and not plan.exists():
        time.sleep(0.01)
    return process.poll() is None


def kills(runs: Runs, root: Path, count: int, chance: random.Random) -> dict[str, Any]:
    """Kill `count` processes, each at a random moment: a few while they start, the others while they work."""
    whole = root / "whole"
    process, started = runs.start(whole), time.monotonic()
    wait_for_work(process, whole)
    working = time.monotonic()
    _, words = process.communicate()
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed:\n{words}")
    ended_at = time.monotonic()
    expected, moments = digest(whole), Counter[str]()
    killed = ended = different = failed = 0
    while (killed < count or ended == 0) and not failed:
        output = root / f"run-{ended}" / "out"
        output.parent.mkdir()
        left = min(KILLS_OF_ONE, count - killed)
        while not output.exists() and not failed:
            process = runs.start(output)
            if left:
                if chance.random() < EARLY:
                    time.sleep(chance.uniform(0, working - started))
                elif wait_for_work(process, output):
                    time.sleep(chance.uniform(0, ended_at - working))
                if process.poll() is None:
                    moments[stage(output)] += 1
                    process.send_signal(signal.SIGKILL)
                    killed, left = killed + 1, left - 1
            process.communicate()
            failed += process.returncode not in (0, -signal.SIGKILL)
        ended += not failed
        different += not failed and digest(output) != expected
        shutil.rmtree(output.parent)
    facts = {"killed": killed, "ended": ended, "different": different, "failed": failed}
    return {**facts, "working_seconds": round(ended_at - working, 1), "killed_while": dict(moments.most_common())}


def may_mount(root: Path) -> bool:
    """Whether this process may mount file systems, which root in a container often may not."""
    try:
        with disk(root, 1 << 20):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


@contextmanager
def disk(root: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    where = root / "disk"
    where.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)
        where.rmdir()


def remount(where: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(where)], check=True)


def fill(where: Path) -> Path:
    """Leave nothing of a file system's space; the file that takes it."""
    filler = where / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return filler


def full_disk(runs: Runs, root: Path, expected: str, chance: random.Random) -> list[str]:
    """What went wrong on a disk that fills up three times while the run works; nothing, if all went well."""
    with disk(root, 64 * MEGABYTE) as where:
        for _ in range(3):
            process = runs.start(where / "out")
            if wait_for_work(process, where / "out"):
                time.sleep(chance.uniform(0, 3))
            filler = fill(where)
            _, words = process.communicate()
            filler.unlink()
            if process.returncode == 0:
                break
            if "free some space" not in words or "Traceback" in words or (where / "out").exists():
                return [f"exit {process.returncode}: {words}"]
        else:
            code, words = runs.finish(where / "out")
            if code:
                return [f"exit {code}: {words}"]
        return [] if digest(where / "out") == expected else ["other bytes"]


def read_only(runs: Runs, root: Path, expected: str) -> list[str]:
    with disk(root, 64 * MEGABYTE) as where:
        remount(where, "ro")
        code, words = runs.finish(where / "out")
        if code == 0 or "Read-only file system" not in words or "Traceback" in words:
            return [f"exit {code}: {words}"]
        remount(where, "rw")
        code, words = runs.finish(where / "out")
        return [] if code == 0 and digest(where / "out") == expected else [f"exit {code}: {words}"]


def truncated_source(runs: Runs, root: Path, chance: random.Random) -> list[str]:
    model = Path(shutil.copytree(runs.model, root / "truncated"))
    file = model / "model.safetensors"
    os.truncate(file, chance.randrange(file.stat().st_size))
    code, words = Runs(model, runs.text, runs.options).finish(root / "out")
    shutil.rmtree(model)
    named = "model.safetensors" in words and "Traceback" not in words
    return [] if code and named and not (root / "out").exists() else [f"exit {code}: {words}"]


def jumping_clock(runs: Runs, root: Path, expected: str) -> list[str]:
    code, words = runs.finish(root / "out", JUMPING)
    right = code == 0 and digest(root / "out") == expected
    shutil.rmtree(root / "out", ignore_errors=True)
    return [] if right else [f"exit {code}: {words}"]


def two_at_once(runs: Runs, root: Path, expected: str) -> list[str]:
    """The second process is told of the first, which is not disturbed."""
    first = runs.start(root / "out")
    while not (root / ".out.work.lock").exists() and first.poll() is None:
        time.sleep(0.01)
    code, words = runs.finish(root / "out")
    first.communicate()
    refused = code != 0 and "another process works in" in words
    right = refused and first.returncode == 0 and digest(root / "out") == expected
    shutil.rmtree(root / "out", ignore_errors=True)
    return [] if right else [f"exit {code}: {words}"]


def faults(runs: Runs, root: Path, expected: str, times: int, chance: random.Random) -> dict[str, Any]:
    """How often each fault was tried, and what was lost."""
    trials: dict[str, Callable[[], list[str]]] = {
        "source cut off": lambda: truncated_source(runs, root, chance),
        "clocks that jump by hours": lambda: jumping_clock(runs, root, expected),
        "two runs in one directory": lambda: two_at_once(runs, root, expected),
    }
    if may_mount(root):
        trials["disk that fills up, three times"] = lambda: full_disk(runs, root, expected, chance)
        trials["output that cannot be written"] = lambda: read_only(runs, root, expected)
    found = {}
    for name, trial in trials.items():
        lost = [words for _ in range(times) for words in trial()]
        found[name] = {"tried": times, "lost": len(lost), "said": lost}
        print(f"{name}: {times} tried, {len(lost)} lost", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each kind of run")
    parser.add_argument("--times", type=int, default=3, help="that each other fault is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    report: dict[str, Any] = {"benchmark": "robustness-interrupted", "seed": arguments.seed, "kills": {}}
    # What is published is all of it.
    part = arguments.output.with_suffix(".part.json")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = toy_model(root / "model")
        for kind, options in KINDS.items():
            runs = Runs(model, fetch_text("wiki.calib"), options)
            place = root / kind.split(",")[0]
            place = place if not place.exists() else place.with_name(f"{place.name}-allocated")
            place.mkdir()
            report["kills"][kind] = kills(runs, place, arguments.kills, chance)
            print(f"{kind}: {report['kills'][kind]}", flush=True)
            if "faults" not in report:
                report["faults"] = faults(runs, place, digest(place / "whole"), arguments.times, chance)
            report |= {"environment": environment(), "commit": commit()}
            save(part, report)
    os.replace(part, arguments.output)
    lost = sum(found["lost"] for found in report["faults"].values())
    wrong = sum(found["different"] + found["failed"] for found in report["kills"].values())
    return int(lost + wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
