"""Connections with limits: uvicorn waits for ever for a request's head, and for a client that reads nothing.

Whoever opens connections and sends nothing, or asks and does not read, costs a connection for a limited time, and only
as many as there are places; an idle one makes room for a new one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from fewbit.serve.api_errors import ApiError
from fewbit.serve.limits import SECURITY_HEADERS
from fewbit.serve.settings import Settings

# What a refused client may still send until it has read why, in seconds; closing at once could destroy the answer.
LINGER_SECONDS = 1.0


def raw_answer(error: ApiError) -> bytes:
    """A whole HTTP answer that closes its connection, for where no request was read."""
    response = error.response()
    headers = [*response.raw_headers, *SECURITY_HEADERS, (b"cache-control", b"no-store"), (b"connection", b"close")]
    lines = [
        b"HTTP/1.1 %d " % error.status,
        *(key + b": " + value for key, value in headers),
        b"",
        bytes(response.body),
    ]
    return b"\r\n".join(lines)


class Connection(H11Protocol):
    """One client's connection. A request's head must arrive within `head_timeout` of its first byte (of the
    connection's beginning, for the first), and an answer must be read at some 50 kB per `stall_timeout` at least."""

    def __init__(self, *arguments: Any, settings: Settings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = settings
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._refused = False
        self.since = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no request is in work: none came yet, or the last one is answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._make_room():
            self._refuse()
            return
        self._head = self.loop.call_later(self._limits.head_timeout, self._cut)

    def _make_room(self) -> bool:
        """Close the connection that has been idle for the longest time; False if all others have work."""
        others = [other for other in self.connections if other is not self]
        idle = [other for other in others if isinstance(other, Connection) and other.idle]
        if not idle:
            return False
        oldest = min(idle, key=lambda other: other.since)
        oldest._cut()
        # The loop tells it of its end later; until then it would be counted, and chosen again.
        self.connections.discard(oldest)
        return True

    def _refuse(self) -> None:
        self.connections.discard(self)
        self._turn_away(
            ApiError(
                503,
                f"all {self._limits.connections} connections of this server are busy; try again",
                code="too_many_connections",
                headers={"Retry-After": "1"},
            )
        )

    def _turn_away(self, error: ApiError) -> None:
        """Answer without a request that could be read, and listen no more."""
        self._refused = True
        if self.cycle is not None and not self.idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(raw_answer(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._cancel("_head")
        self._head = self.loop.call_later(LINGER_SECONDS, self._cut)

    def _cut(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if not self.idle:
            self._cancel("_head")
        elif self._head is None:
            self._head = self.loop.call_later(self._limits.head_timeout, self._cut)

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()
        self._flush_in_time()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._flush_in_time()

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP: the shape of every other error."""
        self._turn_away(ApiError(400, "this is not an HTTP request", code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._cancel("_stall")

    def _flush_in_time(self) -> None:
        """A transport that closes waits for its last bytes to be read, without a limit of its own."""
        if self.transport.is_closing():
            self._arm_stall()

    def _arm_stall(self) -> None:
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.stall_timeout, self._cut)

    def _cancel(self, timer: str) -> None:
        handle = getattr(self, timer)
        if handle is not None:
            handle.cancel()
            setattr(self, timer, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("_head")
        super().connection_lost(exc)
        self._cancel("_stall")


def connection_factory(settings: Settings) -> Callable[..., Connection]:
    """What uvicorn calls for every connection."""

    def make(*arguments: Any, **options: Any) -> Connection:
        return Connection(*arguments, settings=settings, **options)

    return make
