"""Where the rounding jobs run: in this process, in a pool of processes, or on a Ray cluster.

Jobs are functions of files, so all executors give the same bytes; a worker that dies is replaced and its job
done again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import torch

from fewbit.errors import FewbitError, UsageError
from fewbit.ops.extension import load_native
from fewbit.pipeline.jobs import RoundJob, round_tensor

EXECUTORS = ("serial", "process", "ray")
RETRIES = 3


class Executor(Protocol):
    """Runs jobs; results come in the jobs' order."""

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class SerialExecutor:
    """One job after the other in this process, each on all its threads."""

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]:
        return map(round_tensor, jobs)

    def close(self) -> None:
        pass


class ProcessExecutor:
    """A pool of processes on this machine, which share its threads."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def _submit(self, job: RoundJob) -> Future[dict[str, Any]]:
        if self._pool is None:
            threads = max(1, torch.get_num_threads() // self._workers)
            # Forking a process with threads in native code is not safe.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _use_threads, (threads,))
        return self._pool.submit(round_tensor, job)

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]:
        failures = 0
        done = 0
        while done < len(jobs):
            try:
                for future in [self._submit(job) for job in jobs[done:]]:
                    yield future.result()
                    done += 1
            except BrokenProcessPool as error:
                failures += 1
                self.close()
                if failures > RETRIES:
                    raise FewbitError(
                        f"worker processes died {failures} times, last at {jobs[done].name}; memory may be short: "
                        "use fewer --workers, or --executor serial. The run continues where it stopped"
                    ) from error

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _use_threads(count: int) -> None:
    torch.set_num_threads(count)
    native = load_native()
    if native is not None:
        native.set_num_threads(count)


class RayExecutor:
    """Tasks on a Ray cluster whose nodes see the model and the work directory under the same paths."""

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("the ray executor needs Ray; install it with: pip install 'fewbit[ray]'") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            # RAY_ADDRESS names a cluster that is running; without it one starts here.
            here: dict[str, Any] = (
                {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            )
            ray.init(log_to_driver=False, **here)
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(round_tensor)

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]:
        for job, reference in [(job, self._task.remote(job)) for job in jobs]:
            try:
                yield self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, FewbitError) else error from None
            except self._ray.exceptions.RayError as error:
                raise FewbitError(
                    f"{job.name}: its Ray worker died {RETRIES + 1} times ({type(error).__name__}); memory may be "
                    "short. The run continues where it stopped"
                ) from error

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def check_executor(name: str, workers: int | None) -> None:
    """Raise `UsageError` for an executor that there is not, before any work is done for it."""
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor '{name}': choose one of {', '.join(EXECUTORS)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")


def make_executor(name: str, workers: int | None = None) -> Executor:
    """The executor of that name; `workers` defaults to the processors of this machine."""
    check_executor(name, workers)
    workers = workers or os.cpu_count() or 1
    if name == "serial":
        return SerialExecutor()
    return ProcessExecutor(workers) if name == "process" else RayExecutor(workers)
