"""Opens damaged files in processes that may crash, hang or write elsewhere, and says what became of each.

`python hostile_sandbox.py DIRECTORY` makes the honest files there and then answers requests, one line of JSON each: it
forks for every case, so that nothing is imported twice and no case harms the next.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile_changes import Files, change, read_files, write_files

HERE = Path(__file__).resolve().parent
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
CPU_SECONDS = 60 if SANITIZED else 5
WALL_SECONDS = 60.0
"""A case that takes so long without computing hangs too; much more than the processor time, for busy machines."""
CONSTANT_BYTES = 2 << 30 if SANITIZED else 64 << 20
"""What a case may add to the process's memory beside twice its files; a sanitizer keeps books of its own."""
ADDRESS_BYTES = 4 << 30
"""What a case may reserve: an allocation beyond is refused by the system and shows as an error that is not typed."""


@dataclass
class Outcome:
    """What became of a case: "ok", "typed", or a failure ("untyped", "crash", "hang", "memory", "wrote")."""

    kind: str
    target: str
    number: int
    result: str
    error: str = ""
    message: str = ""
    seconds: float = 0.0
    memory: int = 0
    size: int = 0
    wrote: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return self.result in ("ok", "typed")


class Sandbox:
    """A process that runs cases, in a directory of its own, without changing the honest files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")))
            ),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(HERE / "hostile_sandbox.py"), str(directory)]
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        first = self._answer()
        self.targets: dict[str, list[str]] = first["targets"]
        self.honest = [Outcome(**outcome) for outcome in first["honest"]]
        self.seeds = {kind: read_files(directory / "seeds" / kind) for kind in self.targets}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the sandbox ended: " + (self._directory / "log").read_text(errors="replace")[-2000:])
        return dict(json.loads(line))

    def run(self, kind: str, target: str, number: int, files: Files | None = None) -> Outcome:
        """The case of that number, or one with these files."""
        found = change(Random(number), self.seeds[kind]) if files is None else files
        case = self._directory / "case"
        shutil.rmtree(case, ignore_errors=True)
        for name in ("in", "out", "outside"):
            (case / name).mkdir(parents=True)
        (case / "outside" / "secret").write_text("as it was")
        size = write_files(found, case / "in")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, target, number, str(case), size]) + "\n")
        self._process.stdin.flush()
        outcome = Outcome(**self._answer())
        if sorted(os.listdir(case)) != ["in", "out", "outside"] or os.listdir(case / "outside") != ["secret"]:
            outcome.result, outcome.wrote = "wrote", [*outcome.wrote, "beside the input"]
        return outcome

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class _Watch:
    """Notes what is written outside of the directories given, and connections."""

    WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
              "shutil.rmtree", "shutil.copyfile", "shutil.move")  # fmt: skip

    def __init__(self, allowed: Iterable[Path]) -> None:
        self._allowed = tuple(os.path.realpath(path) for path in allowed)
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._check(event, path)
        elif event in self.WRITES:
            self._check(event, arguments[1] if event.startswith("shutil.c") or "link" in event else arguments[0])
        elif event in ("socket.connect", "subprocess.Popen", "os.system"):
            self.found.append(event)

    def _check(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        real = os.path.realpath(os.fsdecode(path))
        inside = any(real == place or real.startswith(place + os.sep) for place in self._allowed)
        # Whoever makes sure that a directory is there changes nothing where it is.
        if not inside and real != os.devnull and not (event == "os.mkdir" and os.path.isdir(real)):
            self.found.append(f"{event} {real}")


def _status(name: str) -> int:
    """A figure of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not tell {name}")


def _open_case(kind: str, target: str, case: Path) -> dict[str, Any]:
    """Run a target in this process."""
    from hostile_targets import MAY_WRITE, TARGETS, TYPED

    function = next(function for function in TARGETS[kind] if function.__name__ == target)
    allowed = [case / "out", *(case / "in" / name for name in MAY_WRITE.get(target, ()))]
    watch = _Watch(allowed)
    before = _status("VmRSS")
    found: dict[str, Any] = {"result": "ok"}
    try:
        function(case / "in", case / "out")
    except TYPED as error:
        found = {"result": "typed", "error": type(error).__name__, "message": str(error)[:300]}
    except BaseException as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in last if "fewbit" in frame.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        found = {"result": "untyped", "error": type(error).__name__, "message": f"{place} {error}"[:300]}
    found["memory"] = max(0, _status("VmHWM") - before)
    if watch.found:
        found |= {"result": "wrote", "wrote": watch.found[:5]}
    return found


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    most = _status("VmSize") + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _fork(kind: str, target: str, number: int, case: Path, size: int) -> Outcome:
    """Run a case in a child and wait for it."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            faulthandler.disable()  # who waits says what happened
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            # PyTorch makes its pool anew in a child when it first asks for it, and of two threads that ask at once one
            # gets none.
            torch.set_num_threads(1)
            _limits()
            os.chdir(case / "out")
            os.write(writer, json.dumps(_open_case(kind, target, case)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    text = b""
    while select.select([reader], [], [], max(0.0, started + WALL_SECONDS - time.monotonic()))[0]:
        piece = os.read(reader, 65536)
        if not piece:
            break
        text += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status, usage = os.wait4(child, 0)
    outcome = Outcome(kind, target, number, "crash", size=size, seconds=round(usage.ru_utime + usage.ru_stime, 3))
    if text:
        for key, value in json.loads(text).items():
            setattr(outcome, key, value)
        if outcome.memory > 2 * size + CONSTANT_BYTES:
            outcome.result = "memory" if outcome.fine else outcome.result
    elif os.WIFSIGNALED(status):
        killer = signal.Signals(os.WTERMSIG(status))
        outcome.error = killer.name
        outcome.result = "hang" if killer in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    return outcome


def _serve(directory: Path) -> None:
    """Make the honest files, open each once here, so that cases import nothing, and then answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    from hostile_seeds import make_seeds
    from hostile_targets import TARGETS

    from fewbit.ops.extension import load_native

    native = load_native()
    if native is not None:
        native.set_num_threads(1)  # no pool, which a child would not have
    seeds = make_seeds(directory / "seeds")
    honest = []
    for kind, functions in TARGETS.items():
        for function in functions:
            case = directory / "honest"
            for turn in (0, 1):
                shutil.rmtree(case, ignore_errors=True)
                shutil.copytree(seeds[kind], case / "in")
                (case / "out").mkdir()
                if turn == 0 and function.__name__ != "engine":
                    function(case / "in", case / "out")
            size = sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
            honest.append(asdict(_fork(kind, function.__name__, -1, case, size)))
    names = {kind: [function.__name__ for function in functions] for kind, functions in TARGETS.items()}
    print(json.dumps({"targets": names, "honest": honest}), file=answers, flush=True)
    for line in sys.stdin:
        kind, target, number, case_name, size = json.loads(line)
        print(json.dumps(asdict(_fork(kind, target, number, Path(case_name), size))), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(_serve(Path(sys.argv[1])))
