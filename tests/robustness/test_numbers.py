"""Extreme numbers give the same defined results on every instruction set, in every kernel."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_numbers import differing

from fewbit.ops.extension import load_native
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize

native = load_native()
pytestmark = pytest.mark.skipif(native is None, reason="the native extension is not built")
ISAS = [*native.available_isas(), *native.emulated_isas()] if native else []


@pytest.fixture(scope="module")
def measured(make_tiny, tmp_path_factory):
    """What the cases give, by instruction set."""
    directory = tmp_path_factory.mktemp("numbers")
    make_tiny("llama", tied=True, num_hidden_layers=1).save_pretrained(directory / "plain")
    quantize(directory / "plain", directory / "packed", QuantizeOptions(rounding="nearest"))
    script = Path(__file__).with_name("hostile_numbers.py")
    found = {}
    for isa in ISAS:
        environment = {**os.environ, "FEWBIT_ISA": isa}
        command = [sys.executable, str(script), str(directory / "packed")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found[isa] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same(measured, isa):
    for kind in ("exact", "bounded"):
        assert len(measured[isa][kind]) >= 90
        assert differing(measured["portable"], measured[isa], kind) == []


def test_results_are_what_the_numbers_mean(measured):
    exact, bounded = measured["portable"]["exact"], measured["portable"]["bounded"]
    for bits in (2, 3, 4):
        assert exact[f"encode, NaN, {bits} bits"] == exact[f"encode, infinity, {bits} bits"] == "NonFiniteWeights"
    for case, logits in bounded.items():
        finite = [math.isfinite(float(value)) for value in logits]
        if "NaN" in case or "infinity" in case:
            assert not all(finite), case
        if "zero" in case or "outlier" in case or "subnormal" in case:
            assert all(finite), case


def test_a_difference_would_be_noticed(measured):
    one = measured["portable"]
    name = next(iter(one["bounded"]))
    other = {"exact": {**one["exact"], "more": "0"}, "bounded": {**one["bounded"], name: ["nan"] * 96}}
    assert differing(one, other, "exact") == ["more"]
    assert differing(one, other, "bounded") == [name]
