"""Measures the server: tokens per second for one client and for several at once, and that all get their own answers.

`fewbit serve` runs as a process of its own; clients are OpenAI's package, greedy, with prompts of their own. Rates are
per second of wall clock and per second of the server's processor time; the latter says something on a machine that is
busy with other work. What it measures goes to benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from encode import commit

import fewbit
from fewbit.environment import cpu_name

OUTPUT = Path(__file__).resolve().parent / "results" / "serving.json"
CLIENTS = (1, 2, 4, 8)
CROWD = 32
PROMPT = "Chapter {number}. Once upon a time there was a town by the sea whose people"


@contextmanager
def server(path: str, slots: int, threads: int) -> Iterator[tuple[int, int]]:
    """Port and process id of a server, while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from fewbit.cli import main; main()", "serve", path, "--name", "model"]
    options = ["--port", str(port), "--slots", str(slots), "--threads", str(threads)]
    process = subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True)
    try:
        if not process.stdout or not process.stdout.readline():
            raise SystemExit("the server did not start")
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(client: openai.AsyncOpenAI, number: int, tokens: int) -> str:
    answer = await client.completions.create(
        model="model",
        prompt=PROMPT.format(number=number),
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].text


async def rates(client: openai.AsyncOpenAI, pid: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """For every number of clients; they take turns, so that a busy minute meets all of them."""
    walls: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    cpus: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    for _ in range(repeats):
        for clients in CLIENTS:
            start, used = time.perf_counter(), processor_seconds(pid)
            await asyncio.gather(*(ask(client, number, tokens) for number in range(clients)))
            walls[clients].append(clients * tokens / (time.perf_counter() - start))
            cpus[clients].append(clients * tokens / (processor_seconds(pid) - used))
    return [
        {
            "clients": clients,
            "tokens_per_second": round(statistics.median(walls[clients]), 2),
            "stdev": round(statistics.pstdev(walls[clients]), 2),
            "tokens_per_cpu_second": round(statistics.median(cpus[clients]), 2),
        }
        for clients in CLIENTS
    ]


async def equal_answers(client: openai.AsyncOpenAI, tokens: int) -> int:
    """How many of a crowd of clients get what they would get alone."""
    alone = [await ask(client, number, tokens) for number in range(CROWD)]
    together = await asyncio.gather(*(ask(client, number, tokens) for number in range(CROWD)))
    return sum(one == other for one, other in zip(alone, together, strict=True))


async def measure(port: int, pid: int, tokens: int, repeats: int) -> dict[str, Any]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await ask(client, 0, 8)
        rows = await rates(client, pid, tokens, repeats)
        equal = await equal_answers(client, tokens)
    return {"rates": rows, "crowd": CROWD, "equal_answers": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a fewbit checkpoint, or any model that fewbit quantize takes")
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    with server(arguments.model, arguments.slots, arguments.threads) as (port, pid):
        result = asyncio.run(measure(port, pid, arguments.tokens, arguments.repeats))
    first, last = result["rates"][0], result["rates"][-1]
    report = {
        "model": Path(arguments.model).name,
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "slots": arguments.slots,
        "threads": arguments.threads,
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "fewbit": fewbit.__version__,
        "commit": commit(),
        "load": [round(load, 2) for load in os.getloadavg()],
        **result,
        "gain": round(last["tokens_per_second"] / first["tokens_per_second"], 3),
        "gain_per_cpu_second": round(last["tokens_per_cpu_second"] / first["tokens_per_cpu_second"], 3),
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
