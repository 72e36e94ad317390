"""What the benchmark of robustness reads out of other programs' words."""

from __future__ import annotations

from argparse import Namespace

import pytest

SCHEMA = "Schemathesis v4.32.5\n{}\nTest cases:\n  {}\n"
FUZZED = "#2\tINITED cov: 10\n#1024\tpulse cov: 12\n{}"


@pytest.fixture
def robustness(import_benchmark, monkeypatch):
    module = import_benchmark("robustness")
    module.say = lambda code, words: monkeypatch.setattr(module, "words_of", lambda *command: (code, words))
    return module


@pytest.mark.parametrize(
    ("line", "survived"),
    [("30 generated, 30 passed", 30), ("30 generated, 3 found 1 unique failures, 27 passed", 27)],
)
def test_requests_that_fail_are_lost(robustness, line, survived):
    robustness.say(0, SCHEMA.format("", line))
    (row,) = robustness.schema(Namespace())["rows"]
    assert (row["tried"], row["survived"], row["lost"]) == (30, survived, 30 - survived)
    assert "4.32.5" in row["fault"]


def test_a_finding_of_the_fuzzer_is_lost(robustness):
    arguments = Namespace(minutes=0.5)
    robustness.say(0, FUZZED.format("Done 4000 runs in 30 second(s)\n"))
    assert robustness.coverage(arguments)["rows"][0]["survived"] == 4000
    robustness.say(77, FUZZED.format("==1== ERROR: libFuzzer: timeout\n"))
    (row,) = robustness.coverage(arguments)["rows"]
    assert (row["tried"], row["lost"]) == (1024, 1)


def test_programs_that_did_not_run_leave_no_row(robustness):
    robustness.say(1, "no such command")
    for part in (robustness.schema, robustness.coverage):
        with pytest.raises(SystemExit, match="did not run: no such command"):
            part(Namespace(minutes=1))
