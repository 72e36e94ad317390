"""The benchmark of the server, on the fake engine: what it counts and what it compares."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from fewbit.serve.settings import Settings

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processor time from /proc")


@pytest.fixture
def serving(import_benchmark):
    return import_benchmark("serving")


def test_it_measures_every_number_of_clients_and_compares_a_crowd(serve, serving, monkeypatch):
    served = serve(Settings(model_name="model"))
    ticks = iter(range(1, 100))
    monkeypatch.setattr(serving, "processor_seconds", lambda pid: next(ticks))
    result = asyncio.run(serving.measure(served.port, 0, tokens=8, repeats=1))
    assert [row["clients"] for row in result["rates"]] == [1, 2, 4, 8]
    assert all(row["tokens_per_second"] > 0 for row in result["rates"])
    # One second passed between two looks.
    assert [row["tokens_per_cpu_second"] for row in result["rates"]] == [8, 16, 32, 64]
    assert (result["crowd"], result["equal_answers"]) == (32, 32)


def test_answers_that_differ_in_a_crowd_are_seen(serve, serving, monkeypatch):
    served = serve(Settings(model_name="model"))
    seen = iter(range(2))

    async def ask(client, number, tokens):
        return f"{number} {next(seen) if number == 5 else 0}"

    monkeypatch.setattr(serving, "ask", ask)

    async def compare():
        async with served.async_client() as client:
            return await serving.equal_answers(client, 8)

    assert asyncio.run(compare()) == 31


def test_processor_time_of_a_process_is_read(serving):
    assert 0 < serving.processor_seconds(os.getpid()) <= sum(os.times()[:2]) + 1
