"""Clients of every kind for `robustness_server.py`: well-behaved, slow, vanishing, half-spoken, hostile.

Each speaks HTTP over a socket of its own, so that it can stop where no library would. What a client that asks properly
gets is compared with what it gets alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
KEY = "a-key-for-the-storm"
PATIENCE = 1800.0  # seconds after which an answer counts as lost
PROMPTS = 40
BIG = b'{"prompt": "' + b"word " * 2_000_000 + b'"}'
HUGE = b'{"prompt": "' + b"word " * 380_000 + b'"}'


def bodies(tokens: int) -> list[dict[str, Any]]:
    """Requests whose answers are determined: greedy ones, and drawn ones with seeds."""
    return [
        {
            "prompt": f"Chapter {number}. In the town by the sea",
            "max_tokens": tokens,
            "temperature": 0.8 if number % 2 else 0,
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(PROMPTS)
    ]


def head(length: int, key: str = KEY, more: str = "") -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}"]
    lines += ["Content-Type: application/json", f"Content-Length: {length}", "Connection: close"]
    return "\r\n".join([*lines, *([more] if more else []), "", ""]).encode()


@dataclass
class Tally:
    """What was sent, and what came back."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    equal: int = 0
    mixed: int = 0
    lost: int = 0
    longest_wait: float = 0.0

    def expect(self, kind: str, status: int | None, allowed: tuple[int, ...]) -> None:
        """An answer to a request that deserves no other; None for a connection that ended without one."""
        self.statuses[f"{kind} {status}"] += 1
        if status not in allowed:
            self.problems.append(f"{kind}: {status}")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def text(self) -> str | None:
        """The text of a completion, streamed or not; None if it is not complete."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            events = self.body.split(b"\n\n")
            if b"data: [DONE]" not in events:
                return None
            chunks = (json.loads(event[6:]) for event in events if event.startswith(b"data: {"))
            return "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return json.loads(self.body)["choices"][0]["text"]


def _parse(raw: bytes) -> Answer | None:
    """A whole HTTP/1.1 answer; None for anything that is not one."""
    begin, found, body = raw.partition(b"\r\n\r\n")
    lines = begin.decode("latin-1").split("\r\n")
    if not found or not lines[0].startswith("HTTP/1.1 "):
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            length = int(size or b"0", 16)
            if not length:
                return Answer(int(lines[0][9:12]), headers, whole)
            whole, body = whole + body[:length], body[length + 2 :]
        return None
    if len(body) != int(headers.get("content-length", "0")):
        return None
    return Answer(int(lines[0][9:12]), headers, body)


async def talk(port: int, sent: bytes, pause: float = 0.0, stop: int | None = None) -> Answer | None:
    """Send bytes and read to the end, slowly with a `pause`, or only until `stop` bytes have come."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 16)
    raw = b""
    try:
        writer.write(sent)
        while stop is None or len(raw) < stop:
            part = await reader.read(256 if pause else 1 << 16)
            if not part:
                break
            raw += part
            if pause:
                await asyncio.sleep(pause)
    except ConnectionError:
        pass  # what had come by then is what the client has
    finally:
        writer.transport.abort()
    return _parse(raw)


class Storm:
    """Clients that all begin something at the same moment, every `every` seconds."""

    def __init__(self, port: int, tokens: int, seed: int = 0) -> None:
        self.port = port
        self.tally = Tally()
        self.requests = bodies(tokens)
        self.alone: list[str] = []
        self.seed = seed
        self.kinds = {
            "whole": (self.proper, 8),
            "stream": (self.streamed, 8),
            "slow reader": (self.slow, 3),
            "gone in mid-stream": (self.gone, 3),
            "gone at once": (self.gone_at_once, 2),
            "half a head": (self.half_head, 1),
            "half a body": (self.half_body, 1),
            "huge prompt": (self.huge, 1),
            "10 MB of JSON": (self.big, 1),
            "invalid UTF-8": (self.broken_text, 1),
            "nested JSON": (self.nested, 1),
            "wrong key": (self.wrong_key, 1),
            "not HTTP": (self.garbage, 1),
        }

    def message(self, number: int, **more: Any) -> bytes:
        body = json.dumps({**self.requests[number], **more}).encode()
        return head(len(body)) + body

    async def ask_alone(self) -> None:
        """One request after the other: what everybody has to get later."""
        for number in range(len(self.requests)):
            answer = await talk(self.port, self.message(number))
            text = answer.text() if answer and answer.status == 200 else None
            if text is None:
                raise SystemExit(f"the server does not answer a single client: {answer}")
            self.alone.append(text)

    async def run(self, clients: int, seconds: float, every: float) -> None:
        """Bursts until the time is over; a client that still waits for its answer sits the next burst out."""
        end = time.monotonic() + seconds
        busy: dict[int, asyncio.Task[None]] = {}
        dice = [random.Random(self.seed * 1000 + number) for number in range(clients)]
        names, weights = list(self.kinds), [weight for _, weight in self.kinds.values()]
        while time.monotonic() < end:
            self.tally.sent["bursts"] += 1
            for client in range(clients):
                if client in busy and not busy[client].done():
                    self.tally.sent["sat out"] += 1
                    continue
                if client in busy:
                    busy[client].result()
                name = dice[client].choices(names, weights)[0]
                self.tally.sent[name] += 1
                busy[client] = asyncio.create_task(self.kinds[name][0](dice[client].randrange(PROMPTS)))
            await asyncio.sleep(min(every, max(0.0, end - time.monotonic())))
        await asyncio.gather(*busy.values())

    async def proper(self, number: int, kind: str = "whole", pause: float = 0.0, **more: Any) -> None:
        """Ask until there is an answer; a full queue says when to come back."""
        start = time.monotonic()
        while time.monotonic() < start + PATIENCE:
            try:
                answer = await asyncio.wait_for(talk(self.port, self.message(number, **more), pause), PATIENCE)
            except (OSError, asyncio.TimeoutError) as error:
                self.tally.lost += 1
                self.tally.problems.append(f"{kind}: {type(error).__name__}")
                return
            self.tally.expect(kind, answer and answer.status, (200, 429))
            if answer is None or answer.status not in (200, 429):
                self.tally.lost += 1
                return
            if answer.status == 200:
                self.tally.longest_wait = max(self.tally.longest_wait, time.monotonic() - start)
                self._compare(number, kind, answer.text())
                return
            wait = answer.headers.get("retry-after", "")
            if not wait.isdigit():
                self.tally.problems.append(f"{kind}: 429 without Retry-After")
            await asyncio.sleep(float(wait or 1))
        self.tally.lost += 1
        self.tally.problems.append(f"{kind}: turned away for {PATIENCE:g} s")

    def _compare(self, number: int, kind: str, text: str | None) -> None:
        if text is None:
            self.tally.lost += 1
            self.tally.problems.append(f"{kind}: a stream that ended early")
        elif text == self.alone[number]:
            self.tally.equal += 1
        else:
            self.tally.mixed += 1

    async def streamed(self, number: int) -> None:
        await self.proper(number, "stream", stream=True)

    async def slow(self, number: int) -> None:
        await self.proper(number, "slow reader", pause=0.05, stream=True, logprobs=0)

    async def gone(self, number: int) -> None:
        await talk(self.port, self.message(number, stream=True, max_tokens=60), stop=600)

    async def gone_at_once(self, number: int) -> None:
        await talk(self.port, self.message(number), stop=0)

    async def half_head(self, number: int) -> None:
        answer = await talk(self.port, self.message(number)[:60])
        self.tally.expect("half a head", answer and answer.status, (None,))  # type: ignore[arg-type]

    async def half_body(self, number: int) -> None:
        answer = await talk(self.port, self.message(number)[:-20])
        self.tally.expect("half a body", answer and answer.status, (408,))

    async def _refused(self, kind: str, sent: bytes, status: int) -> None:
        answer = await talk(self.port, sent)
        self.tally.expect(kind, answer and answer.status, (status, 429))

    async def huge(self, number: int) -> None:
        await self._refused("huge prompt", head(len(HUGE)) + HUGE, 400)

    async def big(self, number: int) -> None:
        await self._refused("10 MB of JSON", head(len(BIG)) + BIG, 413)

    async def broken_text(self, number: int) -> None:
        body = b'{"prompt": "\xff\xfe\xc3("}'
        await self._refused("invalid UTF-8", head(len(body)) + body, 400)

    async def nested(self, number: int) -> None:
        body = b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
        await self._refused("nested JSON", head(len(body)) + body, 400)

    async def wrong_key(self, number: int) -> None:
        body = json.dumps(self.requests[number]).encode()
        await self._refused("wrong key", head(len(body), key=f"{KEY}x") + body, 401)

    async def garbage(self, number: int) -> None:
        await self._refused(
            "not HTTP", bytes(random.Random(number).randrange(256) for _ in range(300)) + b"\r\n\r\n", 400
        )
