"""Who gets in: how many at once, under which host name, with which key, with how large a body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import time
import uuid
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewbit.serve.api_errors import ApiError, internal_error, shutting_down
from fewbit.serve.metrics import Metrics
from fewbit.serve.settings import Settings

log = logging.getLogger("fewbit.serve")

# What needs no key: the page (whose requests bring it), and the question whether the server lives.
OPEN = frozenset({"/", "/chat.js", "/markdown.js", "/style.css", "/health"})

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
SECURITY_HEADERS = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]

# How long, and how far, a refused body is read and forgotten: a connection that closes with bytes unread may destroy
# the answer on its way.
LINGER_SECONDS = 5.0
LINGER_SILENCE = 0.5
LINGER_BYTES = 16_000_000


_BODY_BYTES = "fewbit.body_bytes"  # in a request's scope: what it holds of `max_held_bytes`


class Abortable(Protocol):
    def abort(self, error: ApiError) -> None: ...


class Admission:
    """Counts the sequences that are in the engine, refuses those beyond its slots and the queue.

    Used from the event loop's thread alone, but for `drain`, which only sets a flag.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.capacity = slots + queue
        self.draining = False
        self._inside: dict[Abortable, tuple[int, float]] = {}
        self._mean_seconds = 1.0

    @property
    def count(self) -> int:
        return sum(count for count, _ in self._inside.values())

    def enter(self, who: Abortable, count: int, field: str = "n") -> None:
        """Let in `count` sequences until `leave`, or raise 400 (which blames the request's `field`), 429 or 503."""
        if self.draining:
            raise shutting_down()
        if count > self.capacity:
            raise ApiError(
                400,
                f"{count} answers in one request are more than this server ever holds ({self.capacity}, its slots and "
                f"its queue); ask for fewer in '{field}', or serve with --queue",
                code="invalid_value",
                param=field,
            )
        if self.count + count > self.capacity:
            rounds = (self.count + count - self.capacity) / self.slots
            wait = min(max(math.ceil(rounds * self._mean_seconds), 1), 60)
            raise ApiError(
                429,
                f"the queue is full ({self.capacity} sequences); try again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self._inside[who] = (count, time.monotonic())

    def leave(self, who: Abortable) -> None:
        entry = self._inside.pop(who, None)
        if entry is not None:
            self._mean_seconds += 0.2 * (time.monotonic() - entry[1] - self._mean_seconds)

    def drain(self) -> None:
        """From now on nobody comes in."""
        self.draining = True

    def abort(self) -> None:
        """End everything that is inside."""
        for who in list(self._inside):
            who.abort(shutting_down())


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def host_name(header: str) -> str:
    """The name in a Host header, without its port: "localhost" from "localhost:8000", "::1" from "[::1]:8000"."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


async def _turn_away(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer with an error and close the connection: what is left of the body would be taken for a request."""
    error.headers["Connection"] = "close"
    response = error.response()
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    # The answer is complete with this, whoever counts its bytes; the connection stays open until the last message.
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    end, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
    message: Any = {"more_body": True}
    while message.get("more_body", False) and left > 0 and time.monotonic() < end:
        try:
            message = await asyncio.wait_for(receive(), LINGER_SILENCE)
        except asyncio.TimeoutError:
            break
        left -= len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Guard:
    """The outermost layer: checks what can be checked before a request is read, and adds headers to every answer.

    Bodies are read here, up to the limit and no further, then handed on. Failures that nothing else caught become
    an error 500 without details, and a traceback in the log.
    """

    def __init__(self, app: ASGIApp, settings: Settings, admission: Admission, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._admission = admission
        self._metrics = metrics
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        request_id = uuid.uuid4().hex

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], *SECURITY_HEADERS, (b"x-request-id", request_id.encode())]
                if not any(key == b"cache-control" for key, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            await send(message)

        try:
            try:
                try:
                    self._check(scope)
                    receive = await self._read(scope, receive)
                except ApiError as error:
                    await _turn_away(error, receive, guarded_send)
                    return
                await self._app(scope, receive, guarded_send)
            except Exception:
                log.exception("request %s failed", request_id)
                if status:
                    raise
                await internal_error().response()(scope, receive, guarded_send)
        finally:
            self._held -= scope.get(_BODY_BYTES, 0)
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status or 499)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        if _header(scope, b"transfer-encoding") and _header(scope, b"content-length"):
            # A proxy may go by the other one, and see another request than this server.
            raise ApiError(400, "give Content-Length or Transfer-Encoding, not both", code="invalid_http")
        allowed = self._settings.allowed_hosts
        host = host_name(_header(scope, b"host").decode("latin-1"))
        if allowed and host not in allowed:
            raise ApiError(
                403, f"this server does not answer as '{host}'; serve with --allow-host {host}", code="host_not_allowed"
            )
        if self._key is not None and scope["path"] not in OPEN:
            self._check_key(_header(scope, b"authorization"))
        if scope["method"] == "POST":
            if self._admission.draining:
                raise shutting_down()
            kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
            # Anything else could come from a form on any web page without the browser asking this server first.
            if kind != b"application/json":
                raise ApiError(415, "send the header Content-Type: application/json", code="unsupported_media_type")

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._key or b""):
            return
        message = "the API key is wrong" if header else "this server wants an API key: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, and give back a `receive` that hands it on whole."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._collect(scope, receive), self._settings.body_timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, "the request's body did not arrive in time", code="body_timeout") from None
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    async def _collect(self, scope: Scope, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message: Any = await receive()
            if message["type"] == "http.disconnect":
                return bytes(body)
            part = message.get("body", b"")
            body += part
            self._held += len(part)
            scope[_BODY_BYTES] = len(body)
            if len(body) > self._settings.max_body_bytes:
                raise self._too_large()
            if self._held > self._settings.max_held_bytes:
                raise ApiError(
                    429,
                    "the server holds too many large requests; try again in 1 s",
                    code="too_many_bytes",
                    headers={"Retry-After": "1"},
                )
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        return ApiError(
            413,
            f"the request is larger than {limit} bytes; shorten it, or serve with --max-body",
            code="request_too_large",
        )
