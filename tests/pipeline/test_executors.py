"""Executors: all give the bytes of the serial one, and a worker that dies is replaced."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint.source import open_source
from fewbit.checkpoint.store import read_tensors, tensors_hash, write_tensors
from fewbit.errors import FewbitError, UsageError
from fewbit.math.rounding import inverse_factor
from fewbit.pipeline import executors
from fewbit.pipeline.executors import ProcessExecutor, RayExecutor, choose_executor, make_executor
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
    """What the shards that jobs wrote hold; they are taken away. (safetensors orders metadata by chance.)

    A worker that was killed may leave a file under a temporary name, which no run reads.
    """
    found = {}
    for path in (Path(jobs[0].work) / "shards").glob("[!.]*"):
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


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_killed_when_all_is_done_does_not_keep_the_pool_from_closing(jobs, index):
    before = multiprocessing.active_children()
    executor = ProcessExecutor(2)
    assert len(list(executor.run(jobs))) == len(jobs)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    # One of the two idle workers holds the queue's lock.
    os.kill(workers[index].pid, signal.SIGKILL)
    executor.close()
    assert not any(worker.is_alive() for worker in workers)


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
    if sys.platform == "linux":
        assert executor.peak_bytes > 1 << 20


def test_unknown_executors_and_no_workers_are_refused():
    with pytest.raises(UsageError, match="serial, process, ray"):
        make_executor("threads", 1)
    with pytest.raises(UsageError, match="at least 1"):
        make_executor("process", -2)
    with pytest.raises(UsageError, match="at least 1"):
        make_executor("process", 0)


def test_auto_is_a_pool_where_matrices_are_rounded_on_one_thread_and_memory_allows(tiny_models, monkeypatch):
    source = open_source(tiny_models["tied"])
    twin = make_plan(source, QuantizeOptions(format="twinquant", rounding="nearest", head="bf16").resolved(10**6))
    trellis = make_plan(source, NEAREST.resolved(10**6))
    assert choose_executor("auto", None, twin) == ("serial", 1)
    monkeypatch.setattr(executors, "POOLED_WEIGHTS", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(executors, "available_memory", lambda: 1 << 40)
    assert choose_executor("auto", None, twin) == ("process", 8)
    assert choose_executor("auto", 3, twin) == ("process", 3)
    assert choose_executor("auto", None, trellis) == ("serial", 1)
    assert choose_executor("serial", None, twin)[0] == "serial"
    assert choose_executor("process", 5, trellis) == ("process", 5)
    monkeypatch.setattr(executors, "available_memory", lambda: 7 * executors.WORKER_BYTES)
    assert choose_executor("auto", None, twin) == ("process", 3)
    monkeypatch.setattr(executors, "available_memory", lambda: executors.WORKER_BYTES)
    assert choose_executor("auto", None, twin) == ("serial", 1)


def test_ray_without_ray_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'fewbit\[ray\]'"):
        make_executor("ray", 1)


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


def test_an_address_without_ray_is_refused():
    with pytest.raises(UsageError, match="--ray-address belongs to --executor ray, not to process"):
        Placement(executor="process", ray_address="auto")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (FileNotFoundError(2, "No such file", "plan.json"), r"does not find plan\.json; every node must see"),
        (ModuleNotFoundError("No module named 'fewbit'"), "install the same fewbit on every node"),
    ],
)
def test_a_ray_worker_that_lacks_files_or_code_is_named_with_the_remedy(jobs, error, remedy):
    found = executors._of_worker(jobs[0], error)
    assert isinstance(found, FewbitError)
    assert re.search(remedy, str(found))
    assert jobs[0].name in str(found)


@pytest.fixture
def two_nodes(monkeypatch):
    """A Ray cluster of a head that does no work and two nodes of one processor each, all on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    yield cluster, {node.node_id: node for node in nodes}
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_that_is_lost_in_flight_leaves_its_job_to_the_others(jobs, monkeypatch, two_nodes):
    cluster, nodes = two_nodes
    for job in jobs:
        round_tensor(job)
    expected = shards(jobs)
    monkeypatch.setattr(executors, "round_tensor", hang_once)
    executor = RayExecutor(2, cluster.address)
    try:
        results = executor.run(jobs)
        pending = threading.Thread(target=lambda: found.extend(results))
        found: list[dict] = []
        pending.start()
        marker = Path(jobs[0].work) / "hangs"
        for _ in range(600):
            if marker.exists() and marker.read_text():
                break
            time.sleep(0.2)
        lost = marker.read_text()
        cluster.remove_node(nodes[lost], allow_graceful=False)
        pending.join(240)
        assert [record["tensor"] for record in found] == [job.name for job in jobs]
        assert shards(jobs) == expected
        where = (Path(jobs[0].work) / "nodes").read_text().split()
        assert lost in where
        assert set(where) == set(nodes), "the first jobs go to both nodes"
        assert where[-1] != lost
    finally:
        executor.close()


@pytest.mark.slow
def test_a_run_on_a_cluster_gives_the_serial_bytes_and_leaves_the_cluster_running(
    tiny_models, calibration_text, tmp_path, two_nodes
):
    import ray

    cluster, _ = two_nodes
    quantize(tiny_models["biased"], tmp_path / "serial", CALIBRATED, [calibration_text])
    placement = Placement(work=tmp_path / "work", executor="ray", ray_address=cluster.address)
    quantize(tiny_models["biased"], tmp_path / "cluster", CALIBRATED, [calibration_text], placement)
    assert files_of(tmp_path / "cluster") == files_of(tmp_path / "serial")
    assert not ray.is_initialized()
    ray.init(address=cluster.address, log_to_driver=False)
    assert sum(node["Alive"] for node in ray.nodes()) == 3
    ray.shutdown()


@pytest.mark.slow
def test_no_cluster_at_an_address_is_an_error_with_the_remedy():
    pytest.importorskip("ray")
    with pytest.raises(FewbitError, match=r"no Ray cluster at 127\.0\.0\.1:1 .*ray start --head"):
        RayExecutor(1, "127.0.0.1:1")


def hang_once(job: RoundJob) -> dict:
    import ray

    node = ray.get_runtime_context().get_node_id()
    with (Path(job.work) / "nodes").open("a") as file:
        file.write(f"{node}\n")
    marker = Path(job.work) / "hangs"
    try:
        with marker.open("x") as file:
            file.write(node)
        time.sleep(600)
    except FileExistsError:
        pass
    return round_tensor(job)


def die_once(job: RoundJob) -> dict:
    marker = Path(job.work) / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return round_tensor(job)
