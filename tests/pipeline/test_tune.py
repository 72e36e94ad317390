"""Tuning: its gradients, that folding gains gives the tuned model, that it helps, and that the best state is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit.pipeline.descent as descent
import fewbit.pipeline.memory as memory_module
import fewbit.pipeline.tune as tune
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.loading import load
from fewbit.pipeline.descent import Descent
from fewbit.pipeline.gains import GainLinear
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from fewbit.pipeline.teacher import Divergence
from fewbit.pipeline.texts import CalibrationText, calibration_windows
from fewbit.pipeline.tune import Tuner

SETTINGS = {"calib_tokens": 2048, "calib_window": 64, "calib_dtype": "float32", "damping": 0.01}


def history_of(directory: Path) -> list[dict[str, float]]:
    return json.loads((directory / "fewbit.json").read_text())["tuning"]["history"]


@pytest.mark.parametrize("positions", [1, 128, 300])
def test_the_divergence_and_its_gradient_are_those_of_plain_autograd(positions):
    torch.manual_seed(0)
    hidden = torch.randn(positions, 24, dtype=torch.float64, requires_grad=True)
    head, full, full_head = (torch.randn(rows, 24, dtype=torch.float64) for rows in (50, positions, 50))
    found = Divergence.apply(hidden, head, full, full_head)
    (gradient,) = torch.autograd.grad(3.0 * found, hidden)
    expected = nn.functional.kl_div(
        (hidden @ head.T).log_softmax(-1), (full @ full_head.T).log_softmax(-1), log_target=True, reduction="sum"
    )
    (exact,) = torch.autograd.grad(3.0 * expected / positions, hidden)
    assert float(found.detach()) == pytest.approx(float(expected.detach()) / positions, rel=1e-6)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


def test_a_model_does_not_diverge_from_itself():
    hidden, head = torch.randn(40, 16, requires_grad=True), torch.randn(30, 16)
    found = Divergence.apply(hidden, head, hidden.detach(), head)
    found.backward()
    assert abs(float(found.detach())) < 1e-6
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-7


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("biased", [False, True])
def test_the_gradients_of_gains_are_those_of_plain_autograd(groups, biased):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    linear = GainLinear(weight, groups, bias if biased else None).double()
    linear.gain.data.uniform_(0.5, 1.5)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, 5, dtype=torch.float64)
    wanted = [x, linear.gain] + ([linear.bias_gain] if biased else [])
    found = torch.autograd.grad((linear(x) * upstream).sum(), wanted)
    scaled = weight * linear.gain.repeat_interleave(12 // groups, 1)
    plain = nn.functional.linear(x, scaled, bias * linear.bias_gain if biased else None)
    torch.testing.assert_close(linear(x), plain)
    for mine, exact in zip(found, torch.autograd.grad((plain * upstream).sum(), wanted), strict=True):
        torch.testing.assert_close(mine, exact)


def test_gradients_of_gains_under_autocast_are_near_the_exact_ones():
    torch.manual_seed(0)
    linear = GainLinear(torch.randn(48, 64), 4, None)
    x = torch.randn(2, 100, 64, requires_grad=True)
    upstream = torch.randn(2, 100, 48)
    exact = torch.autograd.grad((linear(x) * upstream).sum(), [x, linear.gain])
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad((y * upstream).sum(), [x, linear.gain])
    for mine, wanted in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - wanted).square().mean() < 1e-4 * wanted.square().mean()


@pytest.fixture
def student(monkeypatch):
    """Keeps the tuner of a run, whose model is the tuned student in memory."""
    kept: list[Tuner] = []
    run = Tuner.run

    def keep(self: Tuner) -> None:
        run(self)
        kept.append(self)

    monkeypatch.setattr(Tuner, "run", keep)
    return kept


@torch.no_grad()
@pytest.mark.parametrize("code", ["trellis", "ternary", "lloyd8", "iq3_s"])
def test_the_checkpoint_is_the_tuned_student(tiny_models, calibration_text, tmp_path, student, code):
    options = QuantizeOptions(code=code, **SETTINGS, tune=True, tune_steps=32, tune_rate=0.01, head="bf16")
    quantize(tiny_models["biased"], tmp_path / "out", options, [calibration_text])
    (tuner,) = student
    assert sum(float((gain - 1).abs().max()) > 1e-3 for gain in tuner.gains.values()) > len(tuner.gains) / 2
    hidden = tuner.embed(tuner.ids[:2])
    for index in range(len(tuner.stream)):
        hidden = tuner.stream.call_layer(index, hidden)
    norm = tuner.stream.model.get_submodule(tuner.family.final_norm)
    expected = norm(hidden) @ tuner.head.T
    model = load(tmp_path / "out", torch.float32)[0]
    found = model(tuner.windows[:2]).logits
    # Scales are stored in 16 bits, tables and what is multiplied in the packed linears in few.
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_tuning_lowers_the_divergence_on_text_it_never_saw(tiny_models, calibration_text, tmp_path):
    source = open_source(tiny_models["biased"])
    texts = [CalibrationText(calibration_text)]
    windows = calibration_windows(source, texts, 4096, 64)[0][-8:]
    full = load_plain(source, torch.float32)
    with torch.no_grad():
        expected = full(windows).logits.log_softmax(-1)
    distance = {}
    for tuned in (False, True):
        options = QuantizeOptions(bits=2, **SETTINGS, tune=tuned, tune_steps=96 if tuned else 0, tune_rate=0.01)
        out = tmp_path / str(tuned)
        quantize(tiny_models["biased"], out, options, [calibration_text])
        with torch.no_grad():
            found = load(out, torch.float32)[0](windows).logits.log_softmax(-1)
        distance[tuned] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert distance[True] < 0.8 * distance[False]


def test_tuning_that_makes_things_worse_ends_early_and_keeps_where_it_began(
    tiny_models, calibration_text, tmp_path, monkeypatch
):
    options = QuantizeOptions(**SETTINGS, tune=True, tune_steps=200)
    held = iter([2.0, 1.0, 1.1, 0.9, 0.95, 0.91, 0.5])  # the first is taken before anything is tuned
    monkeypatch.setattr(descent, "mean_loss", lambda loss, batches: next(held))
    monkeypatch.setattr(tune, "mean_loss", lambda loss, batches: next(held))
    states: list[Descent] = []
    seen: list[dict[str, torch.Tensor]] = []
    look = Descent.look

    def note(self: Descent, value: float) -> None:
        states.append(self)
        seen.append({name: gain.detach().clone() for name, gain in self.gains.items()})
        look(self, value)

    monkeypatch.setattr(Descent, "look", note)
    quantize(tiny_models["tied"], tmp_path / "out", options, [calibration_text])
    history = history_of(tmp_path / "out")
    assert [entry["held"] for entry in history] == [1.0, 1.1, 0.9, 0.95, 0.91]
    assert history[-1]["step"] == 4 * descent.CHECK_EVERY
    gains = states[-1].gains
    assert all(torch.equal(gain, seen[2][name]) for name, gain in gains.items())
    assert not all(torch.equal(gain, seen[4][name]) for name, gain in gains.items())


def test_state_that_is_read_back_goes_on_as_if_nothing_had_happened(tmp_path):
    def fresh() -> dict[str, nn.Parameter]:
        return {
            "a": nn.Parameter(torch.ones(3, 2)),
            "b": nn.Parameter(torch.ones(4)),
            "idle": nn.Parameter(torch.ones(1)),
        }

    def learn(state: Descent, start: int, stop: int) -> None:
        for step in range(start, stop):
            for gain in (state.gains["a"], state.gains["b"]):
                gain.grad = torch.randn(gain.shape, generator=torch.Generator().manual_seed(step))
            state.descend(0.1 * step, 1.0 / (step + 1))

    whole = Descent(fresh(), 0.1, tmp_path / "whole")
    learn(whole, 0, 3)
    whole.look(2.0)
    learn(whole, 3, 9)
    whole.look(1.0)
    first = Descent(fresh(), 0.1, tmp_path / "parts")
    learn(first, 0, 3)
    first.look(2.0)
    learn(first, 3, 5)
    second = Descent(fresh(), 0.1, tmp_path / "parts")
    second.restore()
    learn(second, second.step, 9)
    second.look(1.0)
    assert second.history == whole.history
    assert all(torch.equal(gain, whole.gains[name]) for name, gain in second.gains.items())
    assert all(torch.equal(gain, whole.best[name]) for name, gain in second.best.items())


def test_activations_kept_or_computed_again_give_the_same_bytes(tiny_models, calibration_text, tmp_path, monkeypatch):
    options = QuantizeOptions(**SETTINGS, tune=True, tune_steps=16)
    for memory in (0, 1 << 40):
        monkeypatch.setattr(memory_module, "available_memory", lambda memory=memory: memory)
        quantize(tiny_models["tied"], tmp_path / str(memory), options, [calibration_text])
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / str(1 << 40) / path.name).read_bytes()
    shutil.rmtree(tmp_path / "0")
