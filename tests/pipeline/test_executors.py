"""Executors: all give the bytes of the serial one, and a worker that dies is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint.source import open_source
from fewbit.checkpoint.store import read_tensors, tensors_hash, write_tensors
from fewbit.errors import FewbitError, UsageError
from fewbit.math.rounding import inverse_factor
from fewbit.pipeline import executors
from fewbit.pipeline.executors import ProcessExecutor, RayExecutor, make_executor
from fewbit.pipeline.jobs import RoundJob, round_tensor
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.run import Placement, quantize
from fewbit.pipeline.workdir import open_work

CALIBRATED = QuantizeOptions(calib_tokens=1024, calib_window=128, calib_dtype="float32", tune=False)
NEAREST = QuantizeOptions(rounding="nearest")


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def jobs(tiny_models, tmp_path) -> list[RoundJob]:
    """Jobs on a tiny model's tensors, with their factors on disk."""
    source, work = open_source(tiny_models["tied"]), tmp_path / "work"
    plan = make_plan(source, NEAREST)
    open_work(work, plan, {}, fresh=False)
    found = []
    for tensor in plan.quantized:
        cols = tensor.shape[1]
        x = torch.randn(4 * cols, cols, generator=torch.Generator().manual_seed(cols))
        write_tensors(work / f"factor-{cols}.safetensors", {"factor": inverse_factor(x.T @ x / len(x))})
        found.append(RoundJob(str(work), tensor.name, f"factor-{cols}.safetensors"))
    return found


def shards(jobs: list[RoundJob]) -> dict[str, tuple[str, dict[str, str]]]:
    """What the shards that jobs wrote hold; they are taken away. (safetensors orders metadata by chance.)"""
    found = {}
    for path in (Path(jobs[0].work) / "shards").iterdir():
        tensors, metadata = read_tensors(path)
        found[path.name] = (tensors_hash(tensors), metadata)
        path.unlink()
    return found


def test_processes_give_the_serial_bytes_whether_calibrated_or_not(tiny_models, calibration_text, tmp_path):
    for name, options in (("calibrated", CALIBRATED), ("nearest", NEAREST)):
        quantize(tiny_models["biased"], tmp_path / name, options, [calibration_text])
    placement = Placement(executor="process", workers=2)
    for name, options in (("calibrated", CALIBRATED), ("nearest", NEAREST)):
        out = tmp_path / f"{name}-processes"
        quantize(tiny_models["biased"], out, options, [calibration_text], placement)
        assert files_of(out) == files_of(tmp_path / name)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("code", ["trellis", "ternary", "iq3_s", "lloyd8"])
def test_a_job_does_not_depend_on_the_number_of_threads(make_tiny, tmp_path, code):
    model = make_tiny("llama")
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 512, "intermediate_size": 1024})
    torch.manual_seed(0)
    type(model)(config).save_pretrained(tmp_path / "model")
    source, work = open_source(tmp_path / "model"), tmp_path / "work"
    plan = make_plan(source, QuantizeOptions(code=code, rounding="nearest"))
    open_work(work, plan, {}, fresh=False)
    x = torch.randn(2048, 1024)
    write_tensors(work / "factor.safetensors", {"factor": inverse_factor(x.T @ x)})
    job = RoundJob(str(work), "model.layers.0.mlp.down_proj.weight", "factor.safetensors")
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        round_tensor(job)
        found.append(shards([job]))
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_a_worker_killed_in_flight_is_replaced(jobs):
    for job in jobs:
        round_tensor(job)
    expected = shards(jobs)
    executor = ProcessExecutor(2)
    results = executor.run(jobs)
    found = [next(results)]
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    found += results
    executor.close()
    assert [record["tensor"] for record in found] == [job.name for job in jobs]
    assert shards(jobs) == expected
    assert victim not in [child.pid for child in multiprocessing.active_children()]


def die(job: RoundJob) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_workers_that_always_die_end_the_run_with_the_remedy(jobs, monkeypatch):
    monkeypatch.setattr(executors, "round_tensor", die)
    monkeypatch.setattr(executors, "RETRIES", 1)
    with pytest.raises(FewbitError, match=rf"died 2 times, last at {jobs[0].name}; .*fewer --workers"):
        list(ProcessExecutor(1).run(jobs))
    assert not multiprocessing.active_children()


def test_a_worker_s_error_arrives_as_it_is(jobs, tiny_models, tmp_path):
    executor = ProcessExecutor(1)
    with pytest.raises(FewbitError, match="damaged"):
        list(executor.run([RoundJob(jobs[0].work, jobs[0].name, "factor-7.safetensors")]))
    assert next(executor.run(jobs[:1]))["tensor"] == jobs[0].name
    executor.close()


def test_unknown_executors_and_no_workers_are_refused():
    with pytest.raises(UsageError, match="serial, process, ray"):
        make_executor("threads")
    with pytest.raises(UsageError, match="at least 1"):
        make_executor("process", -2)
    with pytest.raises(UsageError, match="at least 1"):
        make_executor("process", 0)


def test_ray_without_ray_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'fewbit\[ray\]'"):
        make_executor("ray")


@pytest.mark.slow
def test_ray_gives_the_serial_bytes_retries_a_killed_worker_and_passes_errors_on(jobs, monkeypatch):
    ray = pytest.importorskip("ray")
    for job in jobs:
        round_tensor(job)
    expected = shards(jobs)
    # The workers cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(executors, "round_tensor", die_once)
    executor = RayExecutor(2)
    try:
        found = list(executor.run(jobs))
        assert (Path(jobs[0].work) / "died").exists()
        assert [record["tensor"] for record in found] == [job.name for job in jobs]
        assert shards(jobs) == expected
        with pytest.raises(FewbitError, match="damaged"):
            list(executor.run([RoundJob(jobs[0].work, jobs[0].name, "factor-7.safetensors")]))
    finally:
        executor.close()


def die_once(job: RoundJob) -> dict:
    marker = Path(job.work) / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return round_tensor(job)
