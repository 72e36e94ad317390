"""What other Python packages are asked, how their answers are read, and which bits count; none of them is needed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source

RUNNER = Path(__file__).resolve().parent.parent / "benchmarks" / "peers" / "quantize.py"


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("peer_runner", RUNNER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def python_peers(import_benchmark):
    return import_benchmark("python_peers")


def names_of(python_peers, source):
    config = source.config
    family = python_peers.get_family(config.model_type)
    return [name for _, name in python_peers.linears(family, config.num_hidden_layers)]


def request_for(names, directory, output, **settings):
    return {
        "method": "fake",
        "settings": {"bits": 4, "group_size": 32, "symmetric": False, **settings},
        "reference": str(directory),
        "linears": names,
        "output": str(output),
    }


@pytest.mark.parametrize(
    ("bits", "group_size", "zero_bits", "per_weight"),
    [(4, 64, 0, 4.25), (4, 64, 4, 4.3125), (3, 64, 16, 3.5), (3, 128, 0, 3.125), (8, None, 0, 8 + 16 / 384)],
)
def test_scales_and_zeros_count(runner, bits, group_size, zero_bits, per_weight):
    assert runner.code_bits(48, 384, bits, group_size, zero_bits) == per_weight * 48 * 384


def test_groups_that_do_not_divide_the_inputs_are_refused_before_the_work(runner, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setitem(runner.METHODS, "fake", ("torch", lambda request: pytest.fail("the work was begun")))
    names = ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match="72 inputs are not a multiple of 32: take a row with smaller groups"):
        runner.answer(request_for(names, tiny_models["odd"], tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_the_answer_holds_every_linear_of_the_layers_and_its_bits(
    runner, python_peers, tiny_models, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(
        runner.METHODS, "fake", ("torch", lambda request: (dict(runner.full_weights(request)), {"zero_bits": 4}))
    )
    source = open_source(tiny_models[name])
    names = names_of(python_peers, source)
    output = tmp_path / "weights.safetensors"
    runner.answer(request_for(names, tiny_models[name], output))
    weights, facts = load_file(output), json.loads(output.with_suffix(".json").read_text())
    assert set(weights) == set(names)
    for key, weight in weights.items():
        assert torch.equal(weight, source.tensor(f"{key}.weight").float())
    count = sum(weight.numel() for weight in weights.values())
    assert facts["bits"] == count * (4 + 20 / 32)
    assert facts["versions"]["torch"] == torch.__version__


def test_a_package_that_leaves_a_linear_as_it_was_is_refused(runner, python_peers, tiny_models, tmp_path, monkeypatch):
    def all_but_one(request):
        weights = dict(runner.full_weights(request))
        del weights["model.layers.1.mlp.up_proj"]
        return weights, {"zero_bits": 0}

    monkeypatch.setitem(runner.METHODS, "fake", ("torch", all_but_one))
    names = names_of(python_peers, open_source(tiny_models["tied"]))
    output = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"torch left 1 linears as they were: model\.layers\.1\.mlp\.up_proj"):
        runner.answer(request_for(names, tiny_models["tied"], output))
    assert not output.exists()


@pytest.fixture
def peer(python_peers, tiny_models, tmp_path, monkeypatch):
    """The module with a runner of this Python, which negates the weights and returns the windows it was given."""
    script = tmp_path / "run.py"
    script.write_text(
        "import importlib.util, json, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('runner', {str(RUNNER)!r})\n"
        "runner = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(runner)\n"
        "def fake(request):\n"
        "    weights = {name: -weight for name, weight in runner.full_weights(request)}\n"
        "    windows = runner.load_file(request['windows'])['windows'].tolist() if 'windows' in request else None\n"
        "    return weights, {'zero_bits': 0, 'windows': windows}\n"
        "runner.METHODS['hqq'] = ('torch', fake)\n"
        "runner.answer(json.loads(pathlib.Path(sys.argv[1]).read_text()))\n"
    )
    monkeypatch.setattr(python_peers, "RUNNER", script)
    monkeypatch.setattr(python_peers, "interpreter", lambda environment: Path(sys.executable))
    monkeypatch.setattr(python_peers, "WINDOW", 16)
    return python_peers


def test_a_package_gets_fewbits_own_calibration_windows(peer, tiny_models, calibration_text):
    recipe = peer.PythonRecipe("hqq", 4, 8, calibrated=True)
    weights, facts = peer.peer_weights(tiny_models["tied"], recipe, [calibration_text], 64)
    source = open_source(tiny_models["tied"])
    windows, _ = peer.calibration_windows(source, [peer.CalibrationText(calibration_text)], 64, 16)
    assert facts["windows"] == windows.tolist()
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(weights[name], -source.tensor(f"{name}.weight").float())
    assert recipe.options(64)["calib_tokens"] == 64


def test_a_package_without_calibration_gets_none_and_the_row_says_so(peer, tiny_models, calibration_text):
    recipe = peer.PythonRecipe("hqq", 4, 8)
    assert peer.peer_weights(tiny_models["tied"], recipe, [calibration_text], 64)[1]["windows"] is None
    assert recipe.options(64)["calib_tokens"] == 0


def test_a_package_that_fails_ends_the_run_with_its_last_words(peer, tiny_models, calibration_text):
    with pytest.raises(SystemExit, match=r"hqq failed:\n(.|\n)*not a multiple of 48: take a row with smaller groups"):
        peer.peer_weights(tiny_models["tied"], peer.PythonRecipe("hqq", 4, 48), [calibration_text], 64)


def facts_of(bits):
    return {"bits": bits, "seconds": 1.5, "versions": {"torch": "1", "hqq": "2"}}


def test_only_the_layers_linears_are_replaced_and_bits_are_exact(python_peers, tiny_models):
    source = open_source(tiny_models["biased"])
    model = load_plain(source, torch.float32)
    names = names_of(python_peers, source)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = {name: 2 * before[f"{name}.weight"] for name in names}
    count = sum(weight.numel() for weight in weights.values())
    row = python_peers.replace(model, source, weights, facts_of(5 * count))
    for name, parameter in model.named_parameters():
        factor = 2 if name.removesuffix(".weight") in weights else 1
        assert torch.equal(parameter, factor * before[name])
    everything = sum(parameter.numel() for parameter in model.parameters())
    bits = {"body": 5.0, "total": (5 * count + 16 * (everything - count)) / everything}
    assert row == {"peer": "torch 1 hqq 2", "bits_per_weight": bits, "quantize_seconds": 1.5}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda weights, name: weights.pop(name), "nothing"),
        (lambda weights, name: weights.update({name: weights[name][1:]}), "finite: True"),
        (lambda weights, name: weights[name].fill_(float("nan")), "finite: False"),
    ],
)
def test_weights_that_cannot_be_the_models_are_refused(python_peers, tiny_models, spoil, said):
    source = open_source(tiny_models["tied"])
    names = names_of(python_peers, source)
    weights = {name: source.tensor(f"{name}.weight").float() for name in names}
    spoil(weights, names[3])
    with pytest.raises(ValueError, match=f"{names[3]}: the peer's answer holds .*{said}"):
        python_peers.replace(load_plain(source, torch.float32), source, weights, facts_of(1))


def test_rows_are_those_whose_groups_fit_the_model(python_peers, tiny_models):
    assert python_peers.fitting(open_source(tiny_models["odd"])) == ["torchao int8"]
    fitting = python_peers.fitting(open_source(tiny_models["tied"]))
    assert "HQQ 3 bits g64" in fitting
    assert not [name for name in fitting if name.endswith("g128")]


def test_the_environment_is_made_once_for_its_versions(python_peers, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(python_peers, "BUILD", tmp_path)

    def run(command, what):
        commands.append(command)
        (tmp_path / "python-peers").mkdir(exist_ok=True)

    monkeypatch.setattr(python_peers, "run", run)
    wanted = python_peers.USUAL
    python = python_peers.interpreter(wanted)
    assert python == tmp_path / "python-peers" / "bin" / "python"
    assert len(commands) == 3
    assert set(wanted.tools) < set(commands[1])
    assert set(wanted.packages) < set(commands[2])
    python_peers.interpreter(wanted)
    assert len(commands) == 3
    python_peers.interpreter(python_peers.Packages(wanted.name, ("torch==2.13.0",), ("hqq==9",), isolated=False))
    assert len(commands) == 6
    assert "--no-build-isolation" in commands[5]
    assert "--no-build-isolation" not in commands[2]
