"""OpenAI's answers, made of the engine's pieces: objects of one go, and chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from fewbit import __version__
from fewbit.runtime.engine import Piece, TokenLogprob
from fewbit.serve.streaming import KEEP_ALIVE_SECONDS, Generation

# JSON has no infinity; nothing that a model computes comes near.
LOWEST_LOGPROB = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0  # where the text of the last piece's log-probabilities starts
    _end: int = 0

    def add(self, piece: Piece) -> None:
        self.offset, self._end = self._end, self._end + sum(len(token.text) for token in piece.logprobs)
        self.text += piece.text
        self.tokens += len(piece.token_ids)
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Answer(ABC):
    """The shape of one endpoint's answers."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str, logprobs: bool) -> None:
        self._wants_logprobs = logprobs
        self._head = {
            "id": self.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fewbit-{__version__}",
        }

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A complete choice."""

    @abstractmethod
    def chunks(self, index: int, choice: Choice, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """The chunks' choices for a piece, `choice` holding everything up to that piece."""

    @staticmethod
    def _usage(generation: Generation, choices: list[Choice]) -> dict[str, Any]:
        prompt, cached = generation.prompt_tokens()
        completion = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Everything in one object, when the last answer is complete."""
        choices = [Choice() for _ in range(generation.count)]
        async for event in generation.pieces():
            if event is not None:
                choices[event[0]].add(event[1])
        return {
            **self._head,
            "object": self.object,
            "choices": [self.choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(generation, choices),
        }

    async def stream(self, generation: Generation, usage: bool) -> AsyncIterator[dict[str, Any] | None]:
        """The chunks, None for a sign of life; with `usage` a last one that has no choices."""
        head: dict[str, Any] = {**self._head, "object": self.chunk_object}
        if usage:
            head["usage"] = None
        choices = [Choice() for _ in range(generation.count)]
        seen: set[int] = set()
        async for event in generation.pieces(KEEP_ALIVE_SECONDS):
            if event is None:
                yield None
                continue
            index, piece = event
            choices[index].add(piece)
            for chunk in self.chunks(index, choices[index], piece, index not in seen):
                yield {**head, "choices": [chunk]}
            seen.add(index)
        if usage:
            yield {**head, "choices": [], "usage": self._usage(generation, choices)}


class CompletionAnswer(Answer):
    id_prefix = "cmpl-"
    object = chunk_object = "text_completion"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._choice(index, choice.text, choice.logprobs, 0, choice.finish_reason)

    def chunks(self, index: int, choice: Choice, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        if piece.text or piece.finish_reason or (piece.logprobs and self._wants_logprobs):
            yield self._choice(index, piece.text, list(piece.logprobs), choice.offset, piece.finish_reason)

    def _choice(
        self, index: int, text: str, tokens: list[TokenLogprob], offset: int, reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens, offset) if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    @staticmethod
    def _logprobs(tokens: list[TokenLogprob], offset: int) -> dict[str, Any]:
        offsets, tops = [], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
            top: dict[str, float] = {}
            # The token itself is among the alternatives whether it is one of the likeliest or not. Of two tokens
            # with the same text (pieces of one character, say) the likelier one stays.
            for text, logprob in (*((text, logprob) for _, text, logprob in token.top), (token.text, token.logprob)):
                top.setdefault(text, _finite(logprob))
            tops.append(top)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def chunks(self, index: int, choice: Choice, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        if first:
            yield self._chunk(index, {"role": "assistant", "content": ""})
        if piece.text or (piece.logprobs and self._wants_logprobs):
            yield self._chunk(index, {"content": piece.text}, self._logprobs(list(piece.logprobs)))
        if piece.finish_reason:
            yield self._chunk(index, {}, reason=piece.finish_reason)

    @staticmethod
    def _chunk(
        index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None

        def entry(text: str, logprob: float) -> dict[str, Any]:
            # A token that is part of a character has bytes that its text does not tell.
            whole = "\ufffd" not in text
            return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}

        content = [
            {
                **entry(token.text, token.logprob),
                "top_logprobs": [entry(text, logprob) for _, text, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}
