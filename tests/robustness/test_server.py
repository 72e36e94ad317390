"""The storm of `benchmarks/robustness_server.py` for some seconds, against a real server with a toy model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads a process' memory from /proc")


@pytest.fixture
def robustness(import_benchmark):
    return import_benchmark("robustness_server")


@pytest.fixture
def storm(import_benchmark):
    return import_benchmark("storm")


def test_a_server_survives_a_storm_and_nobody_gets_anothers_answer(robustness, import_benchmark, tmp_path):
    model = import_benchmark("toy").toy_checkpoint(tmp_path)
    options = ["--seconds", "5", "--every", "2", "--clients", "30", "--slots", "2", "--queue", "4", "--tokens", "8"]
    report = robustness.measure(model, robustness.parse([*options, "--context", "256"]))
    assert report["unexpected"] == []
    assert (report["mixed"], report["lost"], report["server_errors"]) == (0, 0, 0)
    assert report["compared_equal"] == sum(report["sent"].get(kind, 0) for kind in ("whole", "stream", "slow reader"))
    assert report["compared_equal"] > 10
    assert any(answer.endswith(" 429") for answer in report["answers"])
    assert report["left"] == {"running": 0, "waiting": 0, "descriptors": report["left"]["descriptors"]}
    assert report["left"]["descriptors"] <= 1
    assert report["shutdown"]["complete"] == report["shutdown"]["open"]
    assert report["shutdown"]["exit_code"] == 0
    assert report["key_in_log"] is False
    assert report["tracebacks_in_log"] == report["log_lines_beside_requests"] == 0


def test_answers_are_read_as_they_were_sent(storm):
    whole = b'HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n{"choices":[{"text":"ab"}]}'
    assert storm._parse(whole) is None, "one byte too many is no answer"
    assert storm._parse(whole.replace(b"26", b"27")).text() == "ab"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"
    event = b'data: {"choices":[{"text":"ab"}]}\n\n'
    chunk = b"%x\r\n%s\r\n" % (len(event), event)
    done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    assert storm._parse(head + chunk + chunk + done).text() == "abab"
    assert storm._parse(head + chunk + b"0\r\n\r\n").text() is None
    assert storm._parse(head + chunk) is None


def test_an_answer_that_belongs_to_another_request_is_seen(storm):
    clients = storm.Storm(0, tokens=4)
    clients.alone = ["one", "two"]
    for number, text in ((0, "one"), (0, "two"), (1, None)):
        clients._compare(number, "whole", text)
    assert (clients.tally.equal, clients.tally.mixed, clients.tally.lost) == (1, 1, 1)


def test_what_a_client_does_not_deserve_is_a_problem(storm):
    tally = storm.Tally()
    tally.expect("wrong key", 401, (401,))
    assert tally.problems == []
    tally.expect("wrong key", 200, (401,))
    tally.expect("wrong key", None, (401,))
    assert tally.problems == ["wrong key: 200", "wrong key: None"]


def test_a_server_that_is_not_there_loses_the_request(storm):
    clients = storm.Storm(1, tokens=4)
    asyncio.run(clients.proper(0))
    assert clients.tally.lost == 1


def test_growth_after_the_warm_up_is_seen(robustness):
    flat = [(float(second), 100 if second >= 10 else 50) for second in range(101)]
    assert robustness.drift(flat)["drift"] == 0
    growing = [(float(second), 100 + second) for second in range(101)]
    assert robustness.drift(growing)["drift"] > 0.5
