"""What an answer is made of: pieces of text as they come, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (natural logarithm), and the likeliest tokens at its place as
    (token id, text, log-probability). `text` is the token's alone, which may be part of a character."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that has become sure, and the tokens that came since the piece before.

    The last piece of an answer has a `finish_reason`: "stop" (the model ended it, or a stop string did), "length" (of
    tokens or of the context) or "cancelled". A token that ended the answer is counted, its text is not shown.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `cached_tokens` of the prompt were in the cache already; the time to the first token counts from
    the request, waiting included; `tokens_per_second` is the rate of those after the first (0 if there are none)."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...]
    seconds_to_first_token: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; `tokens` is the number of tokens."""
        fields = asdict(self)
        return {**fields, "tokens": len(self.token_ids)}


def join_pieces(pieces: Sequence[Piece]) -> tuple[str, tuple[int, ...], tuple[TokenLogprob, ...], str | None]:
    """Text, tokens, log-probabilities and finish reason of consecutive pieces."""
    return (
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        pieces[-1].finish_reason if pieces else None,
    )
