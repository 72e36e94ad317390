"""One answer in the making: its tokens, where it ends, and the pieces of text it gives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fewbit.runtime.drafts import Drafter
from fewbit.runtime.results import Piece, TokenLogprob
from fewbit.runtime.sampling import SamplingParams, log_probabilities, uniform
from fewbit.runtime.text import Detokenizer, StopFilter

Sink = Callable[[Piece | BaseException], None]
"""Takes the pieces of one answer, the last with a finish reason, or the error that ended it."""


class Sequence:
    """A prompt (token ids, at least one) and what follows it.

    `cached` of `tokens` are in the decoder's cache; the scheduler keeps that count. `cancel` may be called from any
    thread, everything else by one thread alone.
    """

    def __init__(
        self, prompt: list[int], params: SamplingParams, tokenizer: Any, eos: tuple[int, ...], sink: Sink
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.params = params
        self.cached = 0
        self.cached_tokens = 0
        self.limit = params.max_tokens
        self.finish_reason: str | None = None
        self.cancelled = False
        self.drafter: Drafter | None = None
        self.first_token_at = self.last_token_at = 0.0
        self._seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        self._seen = dict.fromkeys(prompt) if params.repetition_penalty != 1 else {}
        self._eos = frozenset() if params.ignore_eos else frozenset(eos)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopFilter(params.stop)
        self._sink = sink
        self._ready: list[Piece] = []
        self._new_ids: list[int] = []
        self._new_logprobs: list[TokenLogprob] = []

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens that the decoder has not seen."""
        return len(self.tokens) - self.cached

    def cancel(self) -> None:
        """Ask for an end; the scheduler sees to it before its next step."""
        self.cancelled = True

    def start(self, context: int, draft: int, cached: int) -> None:
        """The answer gets a slot that holds `context` positions, `cached` of them already."""
        self.cached = self.cached_tokens = cached
        self.limit = min(self.params.max_tokens, context - self.prompt_tokens)
        if draft:
            self.drafter = Drafter(draft, self.tokens)

    def draw(self, ahead: int) -> float:
        """The random number of the token that comes after `ahead` others."""
        return uniform(self._seed, self.generated + ahead) if self.params.temperature > 0 else 0.0

    def seen(self, drafts: list[int]) -> list[int]:
        """The distinct tokens so far, those of `drafts` included, if they are to be penalized."""
        if self.params.repetition_penalty == 1:
            return []
        return list({**self._seen, **dict.fromkeys(drafts)})

    def take(self, token: int, logits: np.ndarray) -> None:
        """The answer's next token, drawn from logits float32 `[V]`; may make a piece and end the answer."""
        self.last_token_at = time.monotonic()
        if not self.generated:
            self.first_token_at = self.last_token_at
        self.tokens.append(token)
        self._new_ids.append(token)
        if self.params.logprobs is not None:
            self._new_logprobs.append(self._logprob(token, logits))
        if self.params.repetition_penalty != 1:
            self._seen[token] = None
        if self.drafter is not None:
            self.drafter.append(token)
        ended = token in self._eos
        text, stopped = ("", False) if ended else self._stops.push(self._detokenizer.push(token))
        if ended or stopped:
            self.finish("stop", text)
        elif self.generated >= self.limit:
            self.finish("length", text)
        elif text:
            self._give(text)

    def finish(self, reason: str, text: str = "") -> None:
        """Make the last piece."""
        self.finish_reason = reason
        # A stop string's own text is gone; anything else that was held back is part of the answer.
        self._give(text + self._stops.flush())

    def deliver(self) -> None:
        """Hand over the pieces there are: once the step is done, so that who gets an answer finds its slot free."""
        ready, self._ready = self._ready, []
        for piece in ready:
            self._sink(piece)

    def fail(self, error: BaseException) -> None:
        """The answer ends with an error."""
        self.finish_reason = "error"
        self._sink(error)

    def _give(self, text: str) -> None:
        piece = Piece(text, tuple(self._new_ids), tuple(self._new_logprobs), self.finish_reason)
        self._new_ids, self._new_logprobs = [], []
        self._ready.append(piece)

    def _logprob(self, token: int, logits: np.ndarray) -> TokenLogprob:
        own, alternatives = log_probabilities(logits, token, self.params.logprobs or 0)
        before = self.tokens[-2]
        known = self._decoded([before])

        def text(token: int) -> str:
            """What a token says behind the one before; alone, some tokenizers leave out the space it begins with."""
            both = self._decoded([before, token])
            return both[len(known) :] if both.startswith(known) else self._decoded([token])

        return TokenLogprob(
            token, text(token), own, tuple((index, text(index), value) for index, value in alternatives)
        )

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
