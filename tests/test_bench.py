"""All benchmarks are run, in spite of failures, and a run that was cut off goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewbit.formats import get_format

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(import_benchmark):
    return import_benchmark("bench")


def recorded(failing=()):
    """A function that runs no step but notes it, and the notes."""
    ran = []

    def run(step):
        ran.append(step.name)
        return "exit 3" if step.name in failing else None

    return run, ran


def test_every_script_that_writes_results_is_run(bench):
    scripts = {file.name for file in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in file.read_text()}
    # peers.py alone measures one product of kernels.py --peers, and toy.py makes a model; what is read comes last.
    others = {"bench.py", "peers.py", "toy.py", "tables.py", "pictures.py"}
    assert {step.script for step in bench.STEPS} == scripts - others
    assert len({step.name for step in bench.STEPS}) == len(bench.STEPS)


def test_a_failing_script_is_named_and_the_others_still_run(bench, tmp_path, capsys):
    steps = [bench.Step("a.py"), bench.Step("b.py", ("--long",)), bench.Step("c.py")]
    run, ran = recorded(failing=["b --long"])
    assert bench.run_all(steps, tmp_path / "state.json", "1234", run) == {"b --long": "exit 3"}
    assert ran == ["a", "b --long", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[2 of 3, ")
    assert lines[2].endswith("b --long: failed: exit 3")


def test_the_next_run_at_the_same_commit_runs_what_is_not_finished(bench, tmp_path, capsys):
    state = tmp_path / "build" / "state.json"
    steps = [bench.Step("a.py"), bench.Step("b.py"), bench.Step("c.py")]

    def stopped(step):
        if step.name == "c":
            raise KeyboardInterrupt
        return "exit 1" if step.name == "b" else None

    with pytest.raises(KeyboardInterrupt):
        bench.run_all(steps, state, "1234", stopped)
    run, ran = recorded()
    assert bench.run_all(steps, state, "1234", run) == {}
    assert ran == ["b", "c"]
    assert "a: left out: finished before" in capsys.readouterr().out
    assert sorted(json.loads(state.read_text())["finished"]) == ["a", "b", "c"]


@pytest.mark.parametrize("now", ["5678", None])
def test_at_another_commit_or_without_one_everything_runs_again(bench, tmp_path, now):
    state = tmp_path / "state.json"
    bench.run_all([bench.Step("a.py")], state, "1234", recorded()[0])
    run, ran = recorded()
    bench.run_all([bench.Step("a.py")], state, now, run)
    assert ran == ["a"]


def test_a_step_that_this_machine_cannot_run_is_left_out_with_the_reason(bench, tmp_path, capsys):
    run, ran = recorded()
    steps = [bench.Step("a.py", obstacle=lambda: "no NVIDIA GPU"), bench.Step("b.py")]
    assert bench.run_all(steps, tmp_path / "state.json", "1234", run) == {}
    assert ran == ["b"]
    assert "a: left out: no NVIDIA GPU" in capsys.readouterr().out


def test_a_script_that_ends_badly_or_cannot_be_prepared_is_a_failure(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    (tmp_path / "good.py").write_text("import sys\nassert sys.argv[1:] == ['--long', 'model']\n")
    (tmp_path / "bad.py").write_text("raise SystemExit(4)\n")

    def no_model():
        raise OSError("no network")

    assert bench.run_step(bench.Step("good.py", ("--long",), prepare=lambda: ["model"])) is None
    assert bench.run_step(bench.Step("bad.py")) == "exit 4"
    assert bench.run_step(bench.Step("good.py", prepare=no_model)) == "OSError: no network"


def test_starting_again_forgets_rows_and_keeps_what_else_results_say(bench, tmp_path):
    state = tmp_path / "bench.json"
    state.write_text("{}")
    for name in ("quality-small.json", "twinquant-small.json", "cost.json", "encode.json"):
        (tmp_path / name).write_text(json.dumps({"benchmark": name, "rows": {"a": 1}}))
    bench.forget(state, tmp_path)
    assert not state.exists()
    left = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert [name for name, report in sorted(left.items()) if report["rows"]] == ["encode.json"]
    assert all(report["benchmark"] == name for name, report in left.items())


def test_ranks_that_come_to_others_are_not_measured_twice(import_benchmark):
    twinquant = import_benchmark("twinquant")
    shapes = {
        "smollm2-135m": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
        "qwen2.5-coder-1.5b": [(1536, 1536), (256, 1536), (8960, 1536), (1536, 8960)],
    }
    for model, sizes in shapes.items():
        found = {}
        for name in twinquant.rows_of(model):
            options = twinquant.ROWS[name]
            choose = get_format(options.format_name).spec
            specs = tuple(choose(*size, 4, **options.spec_choices) for size in sizes)
            found.setdefault((specs, replace(options, rank=0)), []).append(name)
        assert [names for names in found.values() if len(names) > 1] == []
        assert any(twinquant.ROWS[name].rank == twinquant.RANKS[model][0] for name in twinquant.rows_of(model))
