"""What is concluded from the processor that a program runs on."""

from __future__ import annotations

import pytest
import torch

from fewbit import environment


@pytest.mark.parametrize(
    ("tiles", "instructions", "name", "expected"),
    [
        (True, True, "Intel(R) Xeon(R)", True),
        (False, True, "Intel(R) Xeon(R)", False),
        (False, True, "AMD EPYC", True),
        (False, False, "AMD EPYC", False),
    ],
)
def test_bfloat16_is_chosen_where_it_was_faster(monkeypatch, tiles, instructions, name, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(environment, "cpu_name", lambda: name)
    assert environment.multiplies_bfloat16() is expected


def test_a_processor_s_revision_is_told_beside_its_name(monkeypatch):
    facts = {"model name": "AMD EPYC", "cpu family": "25", "model": "1", "stepping": "2", "flags": "fpu"}
    monkeypatch.setattr(environment, "_cpu_facts", lambda: facts)
    assert (environment.cpu_name(), environment.cpu_revision()) == ("AMD EPYC", "family 25, model 1, stepping 2")
    monkeypatch.setattr(environment, "_cpu_facts", dict)
    assert environment.cpu_revision() == ""
    assert environment.cpu_name()
    assert environment.memory_bytes() is None or environment.memory_bytes() > 1 << 28
