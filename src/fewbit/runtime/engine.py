"""A model that answers: one thread runs its steps, any number of threads and tasks ask.

with Engine("OUT") as engine:
    for piece in engine.stream("Once upon a time"):
        print(piece.text, end="")
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, overload

from fewbit.errors import EngineError, UsageError
from fewbit.runtime.decoder import Decoder
from fewbit.runtime.results import Completion, Piece, TokenLogprob, join_pieces
from fewbit.runtime.sampling import SamplingParams
from fewbit.runtime.scheduler import Scheduler
from fewbit.runtime.sequence import Sequence

__all__ = ["Completion", "Engine", "Piece", "Request", "SamplingParams", "TokenLogprob"]

Prompt = str | Iterable[int]
MAX_DRAFT = 64
MAX_THREADS = 4096


def check_threads(threads: int | None) -> None:
    """`UsageError` for a number of threads that cannot be; None means all."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads must be between 1 and {MAX_THREADS}, not {threads}")


class Request:
    """One answer that was asked for: iterate over it, once, for its pieces.

    Iteration (plain or `async for`) raises `EngineError` where the engine could not finish the answer. `cancel` may be
    called from any thread; the answer then ends with a piece whose finish reason is "cancelled".
    """

    def __init__(self, loop: _Loop, prompt: list[int], params: SamplingParams, tokenizer: Any) -> None:
        self._loop = loop
        self._pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
        self._notify: Callable[[], Any] | None = None
        self._done = False
        self._asked_at = time.monotonic()
        self._sequence = Sequence(prompt, params, tokenizer, loop.decoder.eos, self._put)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._sequence.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache already; 0 as long as the request waits."""
        return self._sequence.cached_tokens

    def cancel(self) -> None:
        """End the answer before its next token."""
        self._sequence.cancel()
        self._loop.wake()

    @property
    def seconds_to_first_token(self) -> float:
        """From the request to the first token, waiting included; 0 as long as there is none."""
        return max(0.0, self._sequence.first_token_at - self._asked_at) if self._sequence.generated else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The rate of the tokens after the first; 0 as long as there are none."""
        spent = self._sequence.last_token_at - self._sequence.first_token_at
        return (self._sequence.generated - 1) / spent if spent > 0 else 0.0

    def result(self, on_piece: Callable[[Piece], object] | None = None) -> Completion:
        """Wait for the whole answer; `on_piece` gets its pieces as they come."""
        pieces = []
        for piece in self:
            pieces.append(piece)
            if on_piece is not None:
                on_piece(piece)
        text, ids, logprobs, reason = join_pieces(pieces)
        return Completion(
            text=text,
            token_ids=ids,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            finish_reason=reason or "cancelled",
            logprobs=logprobs,
            seconds_to_first_token=round(self.seconds_to_first_token, 4),
            tokens_per_second=round(self.tokens_per_second, 3),
        )

    def summary(self) -> str:
        """Length and speed of the answer in one line."""
        count = self._sequence.generated
        # A rate is that of the tokens after the first.
        rate = f"{self.tokens_per_second:.1f} tokens/s, " if count > 1 else ""
        return (
            f"{count} token{'' if count == 1 else 's'}, {rate}the first after "
            f"{self.seconds_to_first_token:.2f} s; {self.cached_tokens} of {self.prompt_tokens} prompt tokens cached"
        )

    def __iter__(self) -> Iterator[Piece]:
        while not self._done:
            self._loop.check_process()
            yield self._checked(self._pieces.get())

    async def __aiter__(self) -> AsyncIterator[Piece]:
        # Whoever gets here has imported it already; others are spared the time.
        import asyncio

        arrived = asyncio.Event()
        self._notify = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, arrived.set)
        while not self._done:
            self._loop.check_process()
            arrived.clear()
            try:
                item = self._pieces.get_nowait()
            except queue.Empty:
                await arrived.wait()
                continue
            yield self._checked(item)

    def _checked(self, item: Piece | BaseException) -> Piece:
        if isinstance(item, BaseException):
            self._done = True
            raise EngineError(str(item)) from item.__cause__
        self._done = item.finish_reason is not None
        return item

    def _put(self, item: Piece | BaseException) -> None:
        """On the engine's thread: hand over what has come."""
        self._pieces.put(item)
        if self._notify is not None:
            try:
                self._notify()
            except RuntimeError:  # the asking event loop is closed: nobody will read the rest
                self._sequence.cancel()


class _Loop:
    """The thread behind an engine. It holds no reference to the engine, so that a forgotten engine ends it."""

    def __init__(self, decoder: Decoder, draft: int, threads: int) -> None:
        self.decoder = decoder
        self.scheduler = Scheduler(decoder, draft, threads)
        self.busy_seconds = 0.0
        self._process = os.getpid()
        self._inbox: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fewbit-engine", daemon=True)
        self._thread.start()

    def check_process(self) -> None:
        """`EngineError` in a forked child, which has neither the thread nor the pool behind the kernels."""
        if os.getpid() != self._process:
            raise EngineError("an engine cannot be used in a forked process; make one there, or use the spawn method")

    def add(self, sequence: Sequence) -> None:
        self.check_process()
        with self._wake:
            if self._stopping:
                raise EngineError("the engine is closed; make another one")
            self._inbox.append(sequence)
            self._wake.notify()

    def wake(self) -> None:
        """Have the thread look at what changed; in a forked child there is none."""
        if os.getpid() == self._process:
            with self._wake:
                self._wake.notify()

    @property
    def waiting(self) -> int:
        return len(self._inbox) + len(self.scheduler.waiting)

    def stop(self) -> None:
        """End the thread after its step, and every request with an error. In a forked child there is nothing to end."""
        if os.getpid() != self._process:
            return
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        work = False
        while self._collect(work):
            started = time.monotonic()
            try:
                work = self.scheduler.step()
            except Exception as error:
                failure = EngineError(f"decoding failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self.scheduler.fail(failure)
                work = False
            self.busy_seconds += time.monotonic() - started
        self.scheduler.fail(EngineError("the engine was closed before the answer was complete"))
        self.decoder.close()

    def _collect(self, work: bool) -> bool:
        """Move what came in to the scheduler, waiting for something if there is no other work; False to stop."""
        with self._wake:
            while not (work or self._inbox or self._stopping):
                self._wake.wait()
            while self._inbox:
                self.scheduler.add(self._inbox.popleft())
            return not self._stopping


class Engine:
    """Generates text with a model, for many requests at once.

    `path` is whatever `fewbit quantize` makes or takes. Up to `slots` answers are in work together, each with a cache
    of `context` positions (None: the model's own number, at most 4096) in `kv` ("bf16" or "int8"); others wait. A
    forward takes at most `block` tokens; `threads` None means all cores. `draft` is the most tokens guessed ahead from
    the text so far (0: none), which changes the speed and not the answers. Answers do not depend on each other.

    Raises `UsageError` for a model or a setting that cannot be used. An engine does not survive a fork.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        slots: int = 8,
        context: int | None = None,
        threads: int | None = None,
        kv: str = "bf16",
        block: int = 256,
        draft: int = 0,
        tokenizer: Any = None,
        decoder: Decoder | None = None,
    ) -> None:
        if not 0 <= draft <= MAX_DRAFT:
            raise UsageError(f"draft must be between 0 and {MAX_DRAFT} tokens, not {draft}")
        if context is not None and context < 2:
            raise UsageError(f"the context must hold 2 tokens at least, not {context}")
        check_threads(threads)
        if decoder is None:
            from fewbit.runtime.decoder import open_decoder

            decoder, found = open_decoder(path, slots=slots, context=context, block=block, threads=threads, kv=kv)
            tokenizer = tokenizer or found
        if tokenizer is None:
            decoder.close()
            remedy = "copy tokenizer.json and its configuration from the model"
            if Path(path).suffix == ".gguf":
                remedy = "take a file that has one, or the model's directory"
            raise UsageError(f"{path} holds no tokenizer; {remedy}")
        self.name = Path(path).name or str(path)
        self.tokenizer = tokenizer
        self.context = decoder.context
        self.vocabulary = decoder.vocabulary
        self._slots = decoder.slots
        self._encoding = threading.Lock()
        self._loop = _Loop(decoder, draft, threads or 0)
        self._close = weakref.finalize(self, self._loop.stop)

    @overload
    def generate(self, prompts: str | list[int], params: SamplingParams | None = None) -> Completion: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]] | list[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]: ...

    def generate(self, prompts: Any, params: SamplingParams | None = None) -> Completion | list[Completion]:
        """Answer one prompt (text, or token ids) or a list of them, together."""
        if isinstance(prompts, str) or not isinstance(prompts, list) or (prompts and isinstance(prompts[0], int)):
            return self.submit(prompts, params).result()
        requests: list[Request] = []
        try:
            requests += (self.submit(prompt, params) for prompt in prompts)
            return [request.result() for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            raise

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The pieces of an answer as they come; closing the iterator cancels the request."""
        request = self.submit(prompt, params)
        try:
            yield from request
        finally:
            request.cancel()

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Piece]:
        """As `stream`, without blocking the event loop; cancelling the task cancels the request."""
        request = self.submit(prompt, params)
        try:
            async for piece in request:
                yield piece
        finally:
            request.cancel()

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Ask for an answer; returns at once. `UsageError` for a prompt that is empty or does not fit the context."""
        self._loop.check_process()
        params = params or SamplingParams()
        ids = self.encode(prompt)
        if not ids:
            raise UsageError("the prompt is empty; give some text")
        if len(ids) >= self.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, and the context of {self.context} must hold it and an answer; "
                "shorten it, or open the model with a larger context"
            )
        outside = [token for token in ids if not 0 <= token < self.vocabulary]
        if outside:
            raise UsageError(f"token {outside[0]} is not in the vocabulary of {self.vocabulary}")
        request = Request(self._loop, ids, params, self.tokenizer)
        self._loop.add(request._sequence)
        return request

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation (`role` and `content` each) up to where the model answers.

        Raises `UsageError` if the model has no chat template or the template refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("this model has no chat template; give it plain text instead")
        with self._encoding:
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # whatever a model's own template raises
                raise UsageError(f"the model's chat template refuses these messages: {error}") from error
            return self._ids(text, add_special_tokens=False)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, which may be those already; called by any thread. Raises `UsageError` for a text with
        halves of characters."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if not prompt:
            return []
        with self._encoding:
            return self._ids(prompt)

    def _ids(self, text: str, **options: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the text holds half a character; give it in UTF-8") from error
        return list(self.tokenizer(text, **options)["input_ids"])

    def stats(self) -> dict[str, Any]:
        """Requests running and waiting, and totals since the engine was made."""
        counts = self._loop.scheduler.counts
        return {
            "running": self._loop.scheduler.running,
            "waiting": self._loop.waiting,
            "slots": self._slots,
            "steps_total": counts.steps,
            "finished_total": counts.finished,
            "prompt_tokens_total": counts.prompt_tokens,
            "cached_tokens_total": counts.cached_tokens,
            "generated_tokens_total": counts.generated_tokens,
            "drafted_tokens_total": counts.drafted_tokens,
            "accepted_tokens_total": counts.accepted_tokens,
            "busy_seconds_total": self._loop.busy_seconds,
        }

    def close(self) -> None:
        """End the thread after its present step and free the model; answers in work end with an `EngineError`."""
        self._close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
