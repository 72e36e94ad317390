"""From the engine to the client, piece by piece: several sequences at once, time limits, server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fewbit.runtime.engine import Piece
from fewbit.runtime.sampling import SamplingParams
from fewbit.serve.api_errors import ApiError, internal_error, timed_out
from fewbit.serve.limits import Admission
from fewbit.serve.metrics import Metrics, TokenClock

log = logging.getLogger("fewbit.serve")

KEEP_ALIVE_SECONDS = 15.0
# A client that reads nothing holds its answer back this long beyond the request's time at most.
STALLED_SECONDS = 5.0

Value = TypeVar("Value")


class Generation:
    """The answers to one HTTP request: one sequence per prompt and choice, read as they come.

    It counts against `admission` from `enter` to `close`, which also cancels what still runs.
    """

    def __init__(self, engine: Any, admission: Admission, metrics: Metrics, limit: float) -> None:
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._limit = limit
        self._deadline = time.monotonic() + limit
        # (number, piece), (number, None) at a sequence's end, an error for all of them, None for a sign of life.
        self._events: asyncio.Queue[tuple[int, Piece | None] | ApiError | None] = asyncio.Queue()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._requests: list[Any] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._choices = 1

    @property
    def time_left(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def count(self) -> int:
        return len(self._requests)

    def prompt_tokens(self) -> tuple[int, int]:
        """Tokens of the prompts, and those of them that were cached; each prompt counts once."""
        firsts = self._requests[:: self._choices]
        return sum(request.prompt_tokens for request in firsts), sum(request.cached_tokens for request in firsts)

    def enter(self, sequences: int, field: str) -> None:
        """Take the places in the queue that the request's `field` asks for; raises `ApiError` if there are too few."""
        self._admission.enter(self, sequences, field)

    def start(self, prompts: Sequence[list[int]], choices: Sequence[SamplingParams]) -> None:
        """Submit every prompt with every choice's parameters.

        A piece carries the number of its sequence: all choices of the first prompt, then those of the second.
        """
        self._choices = len(choices)
        for prompt in prompts:
            for params in choices:
                self._requests.append(self._engine.submit(prompt, params))
        self._call_later("end", self.time_left, self.abort, timed_out(self._limit))
        for index, request in enumerate(self._requests):
            self._metrics.prompt_tokens.inc(request.prompt_tokens)
            self._pumps.append(asyncio.create_task(self._pump(index, request)))

    async def _pump(self, index: int, request: Any) -> None:
        """Put the pieces of one sequence among those of the others."""
        try:
            async for piece in request:
                self._events.put_nowait((index, piece))
            self._events.put_nowait((index, None))
        except Exception:
            log.exception("generation failed")
            self.abort(internal_error())

    def abort(self, error: ApiError) -> None:
        """Let whoever reads the pieces end with this error."""
        self._events.put_nowait(error)

    def _call_later(self, name: str, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, work, *arguments)

    def _beat(self, seconds: float) -> None:
        self._events.put_nowait(None)
        self._call_later("beat", seconds, self._beat, seconds)

    async def pieces(self, beat: float | None = None) -> AsyncIterator[tuple[int, Piece] | None]:
        """(number, piece) as they come; None every `beat` seconds. Raises `ApiError`, also when the time is over.

        The time is a timer's matter: `asyncio.wait_for` around every piece would cost more, and before Python 3.12 it
        may swallow a cancellation that comes together with a piece.
        """
        if beat is not None:
            self._call_later("beat", beat, self._beat, beat)
        clocks = [TokenClock(self._metrics) for _ in self._requests]
        left = len(clocks)
        while left:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            if event is None:
                yield None
                continue
            index, piece = event
            if piece is None:
                left -= 1
                continue
            clocks[index].tokens(len(piece.token_ids))
            yield index, piece

    def close(self) -> None:
        """Free the slots and the places in the queue; does nothing the second time."""
        for request in self._requests:
            request.cancel()
        for pump in self._pumps:
            pump.cancel()
        for timer in self._timers.values():
            timer.cancel()
        self._metrics.cached_tokens.inc(sum(request.cached_tokens for request in self._requests))
        self._requests, self._pumps = [], []
        self._admission.leave(self)


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def unless_gone(receive: Receive, work: Awaitable[Value], time_left: float) -> Value:
    """The result of `work`, which is cancelled when the client closes the connection or the time is over.

    Raises `ClientGone` or `TimeoutError`.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, timeout=time_left, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if watching.done():
            raise ClientGone
        raise TimeoutError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Server-sent events made of a generation's pieces, with `[DONE]` at the end.

    An error after the beginning is an event of its own, `{"error": ...}`, and then the stream ends without `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: Callable[[], AsyncIterator[dict[str, Any] | None]]) -> None:
        self._generation = generation
        self._make_events = events
        self.status_code = 200
        self.background = None
        # For proxies such as nginx, which would collect the pieces.
        self.init_headers({"x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            time_left = self._generation.time_left + STALLED_SECONDS
            await unless_gone(receive, self._send_all(send), time_left)
        except ClientGone:
            log.info("a client left before its answer was complete")
        except TimeoutError:
            log.warning("a client did not read its answer; its connection is closed")
        finally:
            self._generation.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def part(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        events = self._make_events()
        try:
            async for data in events:
                await part(b": still working\n\n" if data is None else event(data))
            await part(b"data: [DONE]\n\n")
        except ApiError as error:
            await part(event(error.body()))
        except Exception:
            log.exception("streaming failed")
            await part(event(internal_error().body()))
        await part(b"", more=False)
