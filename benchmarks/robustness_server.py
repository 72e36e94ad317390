"""Attacks a real `fewbit serve` for minutes: bursts of clients, most of them well-behaved, the others as in `storm.py`.

Counts what was sent and answered, compares every answer with the one a single client gets, follows the server's memory
and descriptors, and ends it with a signal in the middle of its work. Needs Linux (/proc). Without a MODEL it makes a
toy. What it measures goes to benchmarks/results/robustness-server.json, one entry per model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encode import commit
from storm import HOST, KEY, PROMPTS, Storm, talk
from toy import toy_checkpoint

import fewbit
from fewbit.environment import cpu_name

OUTPUT = Path(__file__).resolve().parent / "results" / "robustness-server.json"
SAMPLE_SECONDS = 1.0
WARM_UP = 0.2  # the share of the storm after which memory has to stay as it is


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    log: Path

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def served(model: Path, slots: int, queue: int, context: int) -> Iterator[Server]:
    """A server on a free port of this machine, with a key, while the block runs."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from fewbit.cli import main; main()", "serve", str(model), "--name", "model"]
    options = ["--port", port, "--slots", slots, "--queue", queue, "--context", context, "--threads", 1]
    # Patient, like the clients: a machine that is busy with other work fails nobody.
    options += ["--timeout", 3600, "--grace", 600]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, *map(str, options), "--access-log"],
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, "FEWBIT_API_KEY": KEY},
            )
        try:
            if not process.stdout or not process.stdout.readline():
                raise SystemExit(f"the server did not start: {log.read_text()}")
            yield Server(process, port, log)
        finally:
            process.kill()
            process.wait()


async def get(port: int, path: str) -> str:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    answer = await talk(port, request.encode())
    return answer.body.decode() if answer else ""


async def listening(server: Server) -> None:
    """Return once it answers: it says that it serves just before it does."""
    for _ in range(600):
        try:
            if await get(server.port, "/health"):
                return
        except OSError:
            await asyncio.sleep(0.1)
    raise SystemExit("the server does not answer")


async def follow(server: Server, samples: list[tuple[float, int]]) -> None:
    """Note the memory once a second until cancelled."""
    start = time.monotonic()
    while True:
        samples.append((time.monotonic() - start, server.memory()))
        await asyncio.sleep(SAMPLE_SECONDS)


def drift(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Median memory in the tenth of the time after the warm-up, and in the last tenth."""
    whole = samples[-1][0]
    after = [size for when, size in samples if WARM_UP * whole <= when <= (WARM_UP + 0.1) * whole]
    last = [size for when, size in samples if when >= 0.9 * whole]
    warm, end = statistics.median(after), statistics.median(last)
    return {
        "after_warm_up_bytes": int(warm),
        "end_bytes": int(end),
        "most_bytes": max(size for _, size in samples),
        "drift": round(end / warm - 1, 4),
    }


async def settled(server: Server, seconds: float = 60.0) -> dict[str, float]:
    """The server's gauges once nothing is in work any more, or when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        gauges = dict(re.findall(r"^fewbit_(running|waiting) (\S+)$", await get(server.port, "/metrics"), re.MULTILINE))
        found = {name: float(value) for name, value in gauges.items()}
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


async def shut_down(server: Server, storm: Storm, slots: int, context: int) -> dict[str, Any]:
    """End the server while an answer is on its way in every slot; they have to come whole."""
    tokens = context - max(len(request["prompt"]) for request in storm.requests) - 1
    long = [storm.message(number, stream=True, max_tokens=tokens) for number in range(slots)]
    tasks = [asyncio.create_task(talk(server.port, message)) for message in long]
    # The log has no line for a request before its answer begins, and then all of it is on its way.
    while float((await settled(server, 0.0)).get("running", 0)) < slots and not all(t.done() for t in tasks):
        await asyncio.sleep(0.01)
    running = sum(not task.done() for task in tasks)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*tasks)
    code = await asyncio.to_thread(server.process.wait, 700)
    complete = sum(answer is not None and bool(answer.text()) for answer in answers)
    return {
        "open": len(tasks),
        "unfinished_at_the_signal": running,
        "complete": complete,
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 2),
    }


def statuses(metrics: str) -> dict[str, int]:
    """Requests by status, of all routes."""
    found: dict[str, int] = {}
    for status, count in re.findall(r'^fewbit_requests_total\{.*status="(\d+)"\} (\S+)$', metrics, re.MULTILINE):
        found[status] = found.get(status, 0) + int(float(count))
    return dict(sorted(found.items()))


async def attack(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    await listening(server)
    start_bytes, start_descriptors = server.memory(), server.descriptors()
    storm = Storm(server.port, arguments.tokens)
    await storm.ask_alone()
    samples: list[tuple[float, int]] = []
    following = asyncio.create_task(follow(server, samples))
    began = time.monotonic()
    await storm.run(arguments.clients, arguments.seconds, arguments.every)
    took = time.monotonic() - began
    following.cancel()
    gauges = await settled(server)
    answered = statuses(await get(server.port, "/metrics"))
    report = {
        "seconds": round(took, 1),
        "sent": dict(sorted(storm.tally.sent.items())),
        "answers": dict(sorted(storm.tally.statuses.items())),
        "server_statuses": answered,
        "compared_equal": storm.tally.equal,
        "mixed": storm.tally.mixed,
        "lost": storm.tally.lost,
        "server_errors": sum(count for status, count in answered.items() if status.startswith("5")),
        "unexpected": storm.tally.problems[:20],
        "longest_wait_seconds": round(storm.tally.longest_wait, 1),
        "memory": {"start_bytes": start_bytes, **drift(samples)},
        "left": {**gauges, "descriptors": server.descriptors() - start_descriptors},
    }
    report["shutdown"] = await shut_down(server, storm, arguments.slots, arguments.context)
    log = server.log.read_text(errors="replace")
    others = [line for line in log.splitlines() if " INFO uvicorn.access: " not in line]
    return {
        **report,
        "key_in_log": KEY in log,
        "tracebacks_in_log": log.count("Traceback"),
        "log_lines_beside_requests": len(others),
    }


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with served(model, arguments.slots, arguments.queue, arguments.context) as server:
        return asyncio.run(attack(server, arguments))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="anything that fewbit serve takes; default: a toy")
    parser.add_argument("--name", help="of the entry in the results; default: the model's directory's, or toy")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--every", type=float, default=5, help="seconds from burst to burst")
    parser.add_argument("--tokens", type=int, default=24, help="per compared answer")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or toy_checkpoint(Path(directory))
        result = measure(model, arguments)
    name = arguments.name or (arguments.model.name if arguments.model else "toy")
    settings = {key: getattr(arguments, key) for key in ("clients", "every", "tokens", "slots", "queue", "context")}
    about = {"cpu": cpu_name(), "platform": platform.platform(), "fewbit": fewbit.__version__, "commit": commit()}
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report[name] = {**about, **settings, "prompts": PROMPTS, **result}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report[name], indent=2))
    bad = ("lost", "mixed", "server_errors", "unexpected", "key_in_log", "tracebacks_in_log")
    wrong = [key for key in bad if result[key]]
    end = result["shutdown"]
    if end["exit_code"] or end["complete"] < end["open"]:
        wrong.append("shutdown")
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
