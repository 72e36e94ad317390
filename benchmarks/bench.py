"""Runs every script of this directory, the short ones first, and writes the tables of the docs from their results.

A script that fails is named at the end and keeps nobody else from running. What a run that was cut off has finished is
not run again by the next one at the same commit, and rows that take minutes to hours are kept whatever their commit is;
`--again` forgets both and starts from the beginning.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from browser import without_chromium
from encode import commit
from saving import save

from fewbit.assets import fetch_model

HERE = Path(__file__).resolve().parent
STATE = HERE.parent / "build" / "bench.json"
RESULTS = HERE / "results"
KEPT = ("quality-*.json", "twinquant-*.json", "cost.json")  # results whose scripts go on with the rows that are there
QUANTIZING = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}
SMALL, LARGE = "smollm2-135m", "qwen2.5-coder-1.5b"


def small_model() -> list[str]:
    return [str(fetch_model(SMALL))]


def without_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no NVIDIA GPU"


def without_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@dataclass(frozen=True)
class Step:
    """A script with its arguments; `obstacle` says why it cannot run here, `prepare` gives more arguments.

    Scripts that quantize (`quantizes`) get the variables that the command line sets for itself.
    """

    script: str
    arguments: tuple[str, ...] = ()
    quantizes: bool = False
    obstacle: Callable[[], str | None] = lambda: None
    prepare: Callable[[], list[str]] = list

    @property
    def name(self) -> str:
        return " ".join([self.script.removesuffix(".py"), *self.arguments])


# From seconds to hours.
STEPS = (
    Step("gpu_static.py", obstacle=without_triton),
    Step("gpu_model.py"),
    Step("gpu.py", obstacle=without_gpu),
    Step("encode.py"),
    Step("twin_operator.py"),
    Step("serving.py", prepare=small_model),
    Step("cache.py"),
    Step("kernels.py", ("--peers",)),
    Step("context.py"),
    Step("robustness.py", ("numerics",)),
    Step("robustness.py", ("threads",)),
    Step("robustness.py", ("schema",)),
    Step("robustness.py", ("files",)),
    Step("robustness.py", ("coverage",)),
    Step("robustness_interrupted.py"),
    Step("robustness_server.py"),
    Step("report_pictures.py", quantizes=True, obstacle=without_chromium),
    Step("end_to_end.py"),
    Step("sweep.py"),
    Step("blocks.py", quantizes=True),
    Step("quality.py", ("--model", SMALL, "--peers"), quantizes=True),
    Step("twinquant.py", ("--model", SMALL), quantizes=True),
    Step("big.py", quantizes=True),
    Step("cost.py", quantizes=True),
    Step("quality.py", ("--model", LARGE, "--peers"), quantizes=True),
    Step("twinquant.py", ("--model", LARGE, "--calib-tokens", "32768"), quantizes=True),
)


def finished_before(state: Path, now: str | None) -> list[str]:
    """Names of the steps that runs at commit `now` have finished."""
    if now is None or not state.exists():
        return []
    report = json.loads(state.read_text())
    return report["finished"] if report["commit"] == now else []


def forget(state: Path, results: Path) -> None:
    """Leave nothing that the next run would go on with."""
    state.unlink(missing_ok=True)
    for file in (found for pattern in KEPT for found in results.glob(pattern)):
        save(file, {**json.loads(file.read_text()), "rows": {}})


def run_step(step: Step) -> str | None:
    """Run a script with its output on the terminal; why it failed, or None."""
    try:
        command = [sys.executable, str(HERE / step.script), *step.arguments, *step.prepare()]
        environment = {**os.environ, **(QUANTIZING if step.quantizes else {})}
        code = subprocess.run(command, env=environment, check=False).returncode
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if code == 0 else f"exit {code}"


def run_all(
    steps: Sequence[Step], state: Path, now: str | None, run: Callable[[Step], str | None] = run_step
) -> dict[str, str]:
    """Run the steps that are not finished at commit `now`; which failed, and why."""
    finished, failed = finished_before(state, now), {}
    started = time.monotonic()
    for number, step in enumerate(steps, 1):
        elapsed = timedelta(seconds=int(time.monotonic() - started))
        place = f"[{number} of {len(steps)}, {elapsed}] {step.name}"
        reason = "finished before" if step.name in finished else step.obstacle()
        if reason:
            print(f"{place}: left out: {reason}", flush=True)
            continue
        print(place, flush=True)
        problem = run(step)
        if problem:
            failed[step.name] = problem
            print(f"{place}: failed: {problem}", flush=True)
        else:
            finished.append(step.name)
            save(state, {"commit": now, "finished": finished})
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure everything anew, rows that are kept included")
    if parser.parse_args().again:
        forget(STATE, RESULTS)
    try:
        failed = run_all(STEPS, STATE, commit())
    except KeyboardInterrupt:
        print("\nbench: stopped; the next run goes on here")
        return 130
    # Also after failures: the results of the others are new.
    for step in (Step("tables.py"), Step("pictures.py")):
        if problem := run_step(step):
            failed[step.name] = problem
    for name, problem in failed.items():
        print(f"bench: {name} failed: {problem}")
    print(f"bench: {len(failed)} failed; results are in {RESULTS}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
