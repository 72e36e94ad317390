"""Where the rounding jobs run: in this process, in a pool of processes, or on a Ray cluster.

Jobs are functions of files, so all executors give the same bytes; a worker that dies is replaced and its job
done again.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import torch

from fewbit.checkpoint.tensors import first_line
from fewbit.errors import FewbitError, UsageError
from fewbit.formats import get_format
from fewbit.ops.extension import load_native
from fewbit.pipeline.jobs import RoundJob, round_tensor
from fewbit.pipeline.memory import available_memory, rounding_bytes
from fewbit.pipeline.plan import Plan
from fewbit.resident import peak_resident_bytes

EXECUTORS = ("auto", "serial", "process", "ray")
RETRIES = 3
POOLED_WEIGHTS = 16_000_000  # of formats that round on one thread, from which on a pool is worth its start
WORKER_BYTES = 500_000_000  # that a worker takes before it has a job
SECONDS_TO_END = 10.0  # that an idle worker has to end by itself
CONNECT_SECONDS = 10


class Executor(Protocol):
    """Runs jobs; results come in the jobs' order. Once it is closed, `peak_bytes` is what its workers on this machine
    had in memory at most, all together."""

    name: str
    peak_bytes: int

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class SerialExecutor:
    """One job after the other in this process, each on all its threads."""

    name = "serial"
    peak_bytes = 0

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]:
        return map(round_tensor, jobs)

    def close(self) -> None:
        pass


class ProcessExecutor:
    """A pool of processes on this machine, which share its threads."""

    name = "process"

    def __init__(self, workers: int) -> None:
        self.peak_bytes = 0
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._processes: dict[int, Any] = {}  # the pool forgets its own as soon as it notices that one died

    def _submit(self, job: RoundJob) -> Future[dict[str, Any]]:
        if self._pool is None:
            threads = max(1, torch.get_num_threads() // self._workers)
            # Forking a process with threads in native code is not safe.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _use_threads, (threads,))
        future = self._pool.submit(round_tensor, job)
        self._processes |= self._pool._processes or {}
        return future

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
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        workers, self._processes = list(self._processes.values()), {}
        self.peak_bytes = max(self.peak_bytes, sum(peak_resident_bytes(worker.pid) for worker in workers))
        manager: Any = pool._executor_manager_thread
        pool.shutdown(wait=False, cancel_futures=True)
        # An idle worker that was killed may have held the lock of the queue, and then the others wait for it for ever.
        # Whatever a worker still does at this point is not wanted any more, or can be done again.
        running, end = {worker.sentinel for worker in workers}, time.monotonic() + SECONDS_TO_END
        while running and time.monotonic() < end:
            running -= set(multiprocessing.connection.wait(running, end - time.monotonic()))
        for worker in workers:
            worker.kill()
        # The pool's own thread waits for them too, and of two that wait at once one may miss a process' end.
        if manager is not None:
            manager.join(SECONDS_TO_END)
        for worker in workers:
            worker.join()


def _use_threads(count: int) -> None:
    torch.set_num_threads(count)
    native = load_native()
    if native is not None:
        native.set_num_threads(count)


class RayExecutor:
    """Tasks on a Ray cluster whose nodes see the model and the work directory under the same paths.

    `address` is that of a running cluster; without one, and without RAY_ADDRESS, a cluster of `workers` processes
    starts on this machine and ends with this object.
    """

    name = "ray"
    peak_bytes = 0

    def __init__(self, workers: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("the ray executor needs Ray; install it with: pip install 'fewbit[ray]'") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS")
        # Left to itself Ray would look for a cluster that somebody else has on this machine.
        here = (
            {"address": address} if address else {"address": "local", "num_cpus": workers, "include_dashboard": False}
        )
        if self._started:
            try:
                if address:
                    _check_reachable(address)
                ray.init(log_to_driver=False, **here)
            except (OSError, ValueError, RuntimeError) as error:
                raise FewbitError(
                    f"no Ray cluster at {address} ({first_line(error)}); start one with ray start --head, and give its "
                    "address as --ray-address HOST:6379"
                ) from error

        def _on_one_thread(job: RoundJob) -> dict[str, Any]:
            # A node runs as many tasks as it has processors.
            _use_threads(1)
            return round_tensor(job)

        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_on_one_thread)

    def run(self, jobs: Sequence[RoundJob]) -> Iterator[dict[str, Any]]:
        for job, reference in [(job, self._task.remote(job)) for job in jobs]:
            try:
                record = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise _of_worker(job, error.cause) or error from None
            except self._ray.exceptions.RayError as error:
                raise FewbitError(
                    f"{job.name}: its Ray worker died {RETRIES + 1} times ({type(error).__name__}); memory may be "
                    "short. The run continues where it stopped"
                ) from error
            # A network file system may remember for a while that a shard was not there; listing makes it look again.
            os.listdir(job.work)
            yield record

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise `OSError` where nothing listens; Ray itself would try for many minutes without a word."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _of_worker(job: RoundJob, cause: BaseException | None) -> FewbitError | None:
    """What a user can do about an error that a job raised on another machine, if anything."""
    if isinstance(cause, FewbitError):
        return cause
    if isinstance(cause, FileNotFoundError):
        return FewbitError(
            f"{job.name}: a Ray worker does not find {cause.filename}; every node must see the model and the work "
            "directory under the same paths: put both on shared storage"
        )
    if isinstance(cause, ImportError):
        return FewbitError(f"{job.name}: {cause} on a Ray worker; install the same fewbit on every node")
    return None


def check_executor(name: str, workers: int | None, ray_address: str | None = None) -> None:
    """Raise `UsageError` for an executor that there is not, before any work is done for it."""
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor '{name}': choose one of {', '.join(EXECUTORS)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    if ray_address and name != "ray":
        raise UsageError(f"--ray-address belongs to --executor ray, not to {name}")


def choose_executor(name: str, workers: int | None, plan: Plan) -> tuple[str, int]:
    """The executor behind a name, and its workers, by default as many as this machine has processors.

    "auto" is a pool of as many processes as memory takes where most is rounded by formats that use one thread for a
    matrix, and everything else is rounded in this process.
    """
    found = workers or os.cpu_count() or 1
    if name != "auto":
        return name, found
    pooled = [t for t in plan.quantized if t.spec is not None and get_format(t.spec.format).single_threaded]
    if sum(tensor.weights for tensor in pooled) < max(POOLED_WEIGHTS, sum(t.weights for t in plan.quantized) / 2):
        return "serial", 1
    if workers is None:
        # Half of the memory is left to what this process does itself.
        each = WORKER_BYTES + max(rounding_bytes(tensor) for tensor in pooled)
        found = min(found, available_memory() // 2 // each)
    return ("process", found) if found > 1 else ("serial", 1)


def make_executor(name: str, workers: int, ray_address: str | None = None) -> Executor:
    """The executor of that name, which is not "auto"."""
    check_executor(name, workers, ray_address)
    if name == "serial":
        return SerialExecutor()
    return ProcessExecutor(workers) if name == "process" else RayExecutor(workers, ray_address)
