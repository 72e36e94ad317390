"""Bits by sensitivity: the choice within a budget, and the measurement behind it on tiny models."""

from __future__ import annotations

import itertools

import pytest

from fewbit.checkpoint.artifact import Artifact
from fewbit.errors import UsageError
from fewbit.pipeline.allocate import Choice, allocate, code_error
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import Placement, prepare, quantize
from fewbit.pipeline.sensitivity import SENSITIVITY

SMALL = {"calib_tokens": 512, "calib_window": 64, "calib_dtype": "float32", "tune": False}
CHOICES = [
    Choice("0.0", {2: 20, 3: 30, 4: 40}, 1.0, 3),
    Choice("0.1", {2: 20, 3: 30, 4: 40}, 0.1, 3),
    Choice("1.0", {2: 40, 3: 60, 4: 80}, 0.4, 3),
    Choice("1.1", {2: 10, 3: 15, 4: 20}, 0.02, 3),
]


def test_each_further_bit_divides_the_error_of_the_code_by_three_to_five():
    for bits in (2, 3):
        assert 3 < code_error("trellis", bits) / code_error("trellis", bits + 1) < 5


@pytest.mark.parametrize("budget", [90, 100, 110, 120, 135, 150, 180])
def test_the_choice_fits_and_comes_close_to_the_best_of_all(budget):
    def cost(bits):
        return sum(c.expected("trellis", bits[c.unit]) for c in CHOICES)

    def size(bits):
        return sum(c.bytes[bits[c.unit]] for c in CHOICES)

    chosen = allocate(CHOICES, budget, "trellis")
    units = [c.unit for c in CHOICES]
    every = (dict(zip(units, bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=len(units)))
    best = min(cost(bits) for bits in every if size(bits) <= budget)
    smaller = (dict(zip(units, bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=len(units)))
    # Greedy steps are optimal for the bytes that they use; one step's bytes may be left over.
    best_with_less = min((cost(bits) for bits in smaller if size(bits) <= max(90, budget - 20)), default=cost(chosen))
    assert size(chosen) <= budget
    assert best <= cost(chosen) <= best_with_less


def test_a_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(UsageError, match="raise the target"):
        allocate(CHOICES, 80, "trellis")


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_a_mean_number_of_bits_is_kept_and_groups_stay_together(tiny_models, calibration_text, tmp_path, name):
    options = QuantizeOptions(bits=3.3, **SMALL)
    quantize(tiny_models[name], tmp_path / "out", options, [calibration_text])
    entries = Artifact.open(tmp_path / "out").record["tensors"]
    rounded = [entry for entry in entries if entry["format"]]
    mean = 8 * sum(entry["bytes"] for entry in rounded) / sum(entry["weights"] for entry in rounded)
    assert 2.9 < mean <= 3.3
    bits = {entry["name"]: entry["bits"] for entry in rounded}
    assert len(set(bits.values())) > 1
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
        assert bits[f"{layer}.mlp.gate_proj.weight"] == bits[f"{layer}.mlp.up_proj.weight"]


def test_a_target_size_bounds_all_tensors_and_the_plan_shows_it(tiny_models, calibration_text, tmp_path):
    whole = prepare(tiny_models["biased"], QuantizeOptions(**SMALL), [calibration_text]).plan.totals()["bytes"]
    options = QuantizeOptions(target_bytes=whole - 3000, **SMALL)
    plan = prepare(tiny_models["biased"], options, [calibration_text], work=tmp_path / "work").plan
    assert whole - 6000 < plan.totals()["bytes"] <= whole - 3000
    assert (tmp_path / "work" / "sensitivity" / SENSITIVITY).exists()
    # A damaged plan of that measurement is measured anew where that is asked for.
    (tmp_path / "damaged" / "sensitivity").mkdir(parents=True)
    (tmp_path / "damaged" / "sensitivity" / "plan.json").write_text("{")
    fresh = Placement(work=tmp_path / "damaged", fresh=True)
    again = prepare(tiny_models["biased"], options, [calibration_text], fresh, tmp_path / "damaged").plan
    assert again.identity == plan.identity
    # The run finds what was measured and makes what was shown.
    placement = Placement(work=tmp_path / "work")
    result = quantize(tiny_models["biased"], tmp_path / "out", options, [calibration_text], placement)
    assert result.bytes == plan.totals()["bytes"]
    found = {entry["name"]: entry["bits"] for entry in Artifact.open(tmp_path / "out").record["tensors"]}
    assert {tensor.name: tensor.spec.bits for tensor in plan.quantized} == {k: v for k, v in found.items() if v}


def test_a_target_that_no_choice_reaches_is_refused(tiny_models, calibration_text, tmp_path):
    options = QuantizeOptions(target_bytes=5000, **SMALL)
    with pytest.raises(UsageError, match="raise the target"):
        quantize(tiny_models["biased"], tmp_path / "out", options, [calibration_text])
    # That is known before anything is measured.
    assert not any(tmp_path.iterdir())


def test_codes_of_one_width_cannot_be_allocated():
    with pytest.raises(UsageError, match="3 bits only"):
        QuantizeOptions(code="lloyd8", bits=3.5)
    with pytest.raises(UsageError, match="2 to 4 bits"):
        QuantizeOptions(bits=5.5)
