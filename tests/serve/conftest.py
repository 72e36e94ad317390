"""A small deterministic engine behind the server, and the server on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import math
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2
import openai
import pytest

from fewbit.errors import UsageError
from fewbit.runtime.engine import Engine, Piece, SamplingParams, TokenLogprob
from fewbit.serve.app import create_app
from fewbit.serve.server import make_server
from fewbit.serve.settings import Settings

LETTERS = "abcdefgh "


def fake_tokenizer(text: str) -> dict[str, list[int]]:
    """A token per byte."""
    return {"input_ids": list(text.encode())}


fake_tokenizer.get_vocab = lambda: {"\u20ac": 0}  # a character at least for every token


@dataclass(eq=False)
class FakeRequest:
    prompt: list[int]
    params: SamplingParams
    ids: list[int] = field(default_factory=list)
    text: str = ""
    cancelled: bool = False
    cached_tokens: int = 0
    pieces: deque = field(default_factory=deque)
    notify: Callable[[], object] = lambda: None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self):
        arrived = asyncio.Event()
        self.notify = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, arrived.set)
        reason = None
        while reason is None:
            arrived.clear()
            if not self.pieces:
                await arrived.wait()
                continue
            piece = self.pieces.popleft()
            if isinstance(piece, Exception):
                raise piece
            reason = piece.finish_reason
            yield piece

    def put(self, piece: Piece | Exception) -> None:
        self.pieces.append(piece)
        with contextlib.suppress(RuntimeError):
            self.notify()


class FakeEngine:
    """Answers with letters that depend on the prompt, the seed and the place alone, or with `script`.

    Clearing `go` holds it between two tokens; `failure` is raised instead of the next token.
    """

    name = "fake"
    vocabulary = 256
    context = 1000

    def __init__(self, slots: int = 4, script: str | None = None, step_seconds: float = 0.0) -> None:
        self.tokenizer = fake_tokenizer
        self.slots = slots
        self.script = script
        self.failure: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.seen: list[SamplingParams] = []
        self.chats: list[list[dict]] = []
        self._step_seconds = step_seconds
        self._running: list[FakeRequest] = []
        self._waiting: deque[FakeRequest] = deque()
        self._work = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def encode(self, prompt: str | list[int]) -> list[int]:
        return fake_tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def encode_chat(self, messages: list[dict]) -> list[int]:
        self.chats.append(messages)
        if messages[-1]["content"] == "no template":
            raise UsageError("this model has no chat template; use /v1/completions")
        return fake_tokenizer("".join(f"<{m['role']}>{m['content']}" for m in messages))["input_ids"]

    def submit(self, prompt: list[int], params: SamplingParams) -> FakeRequest:
        request = FakeRequest(list(prompt), params)
        self.seen.append(params)
        with self._work:
            self._waiting.append(request)
            self._work.notify()
        return request

    def stats(self) -> dict:
        return {"running": len(self._running), "waiting": len(self._waiting), "slots": self.slots}

    def close(self) -> None:
        with self._work:
            self._closed = True
            self.go.set()
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._running or self._waiting or self._closed):
                    self._work.wait()
                if self._closed:
                    for request in (*self._running, *self._waiting):
                        request.put(RuntimeError("the engine was closed"))
                    return
                while self._waiting and len(self._running) < self.slots:
                    self._running.append(self._waiting.popleft())
            self.go.wait(0.005)
            for request in list(self._running):
                if request.cancelled or self.go.is_set():
                    self._step(request)
            time.sleep(self._step_seconds)

    def _step(self, request: FakeRequest) -> None:
        if request.cancelled:
            piece: Piece | Exception = Piece("", (), (), "cancelled")
        elif self.failure is not None:
            piece, self.failure = self.failure, None
        elif self.script is not None:
            piece = self._scripted(request)
        else:
            piece = self._next(request)
        if isinstance(piece, Exception) or piece.finish_reason:
            self._running.remove(request)
        request.put(piece)

    def _scripted(self, request: FakeRequest) -> Piece:
        start = 4 * len(request.ids)
        request.ids.append(0)
        reason = "stop" if start + 4 >= len(self.script) else None
        return Piece(self.script[start : start + 4], (0,), (), reason)

    def _next(self, request: FakeRequest) -> Piece:
        params = request.params
        state = hashlib.sha256(bytes(request.prompt) + bytes(request.ids)).digest()
        total = math.log(sum(math.exp(value / 64) for value in state[: len(LETTERS)]))
        ranked = sorted(
            ((ord(letter), letter, value / 64 - total) for letter, value in zip(LETTERS, state, strict=False)),
            key=lambda entry: -entry[2],
        )
        number = 0
        if params.temperature > 0:
            seed = random.random() if params.seed is None else params.seed
            number = hashlib.sha256(f"{seed} {len(request.ids)}".encode()).digest()[0] % len(ranked)
        token, letter, logprob = ranked[number]
        request.ids.append(token)
        request.text += letter
        logprobs = () if params.logprobs is None else (
            TokenLogprob(token, letter, logprob, tuple(ranked[: params.logprobs])),
        )  # fmt: skip
        stopped = next((stop for stop in params.stop if request.text.endswith(stop)), None)
        if stopped is not None and len(stopped) == 1:
            return Piece("", (token,), logprobs, "stop")
        done = "length" if len(request.ids) == params.max_tokens else None
        return Piece(letter, (token,), logprobs, done)


class Served:
    """A server in a thread on a free port, and clients for it."""

    def __init__(self, engine: FakeEngine | Engine, settings: Settings | None = None) -> None:
        self.engine = engine
        self.app = create_app(engine, settings)
        self.server = make_server(self.app, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx2.Client(timeout=30)

    @property
    def admission(self):
        return self.app.state.service.admission

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **options)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def terminate(self) -> None:
        """What the signal of `kill` does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def stop(self) -> None:
        self.http.close()
        self.engine.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def until(condition, seconds: float = 20.0) -> None:
    """Wait for something another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(name="until")
def until_fixture():
    return until


@pytest.fixture
def logged(caplog):
    """Call it after the server has started: it gives the records of all that the server logs from then on."""
    names = ("fewbit.serve", "uvicorn", "asyncio")

    def begin() -> list[logging.LogRecord]:
        for name in names:
            logging.getLogger(name).addHandler(caplog.handler)
        return caplog.records

    yield begin
    for name in names:
        logging.getLogger(name).removeHandler(caplog.handler)


@pytest.fixture
def serve():
    """`serve(settings, **engine options)` starts a server that ends with the test."""
    running: list[Served] = []

    def start(settings: Settings | None = None, **options) -> Served:
        running.append(Served(FakeEngine(**options), settings))
        return running[-1]

    yield start
    for served in running:
        served.stop()


@pytest.fixture(scope="module")
def serve_engine():
    """`serve_engine(engine)` serves any engine until the module's tests are through."""
    running: list[Served] = []

    def start(engine: FakeEngine | Engine) -> Served:
        running.append(Served(engine))
        return running[-1]

    yield start
    for served in running:
        served.stop()


@pytest.fixture(scope="module")
def shared(serve_engine) -> Served:
    """One server for all tests of a module that leave it as it was."""
    return serve_engine(FakeEngine())
