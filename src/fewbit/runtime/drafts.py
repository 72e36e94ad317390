"""Guesses the next tokens of a sequence from its own past, for the decoder to check several at once."""

from __future__ import annotations

from collections.abc import Iterable

_LEAST, _LONGEST = 2, 16  # tokens of a match
_PLACES = 8  # most recent places looked at
_MOST_PAUSE = 8  # steps without a proposal after many in a row that did not come true


class PromptLookup:
    """Finds the longest match of a sequence's last tokens in its past, and proposes what followed there.

    Of equally long matches the most recent one counts. A proposal that reaches the end of the sequence goes on with
    itself, so that repeated text is continued as far as asked for.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the sequence's next token."""
        tokens = self._tokens
        if len(tokens) >= _LEAST:
            # Only now does something follow the last two tokens.
            self._places.setdefault((tokens[-2], tokens[-1]), []).append(len(tokens))
        tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next; none if the last two tokens are new together."""
        tokens = self._tokens
        if count < 1 or len(tokens) < _LEAST:
            return []
        best, follows = 0, 0
        for place in reversed(self._places.get((tokens[-2], tokens[-1]), [])[-_PLACES:]):
            length = self._match(place)
            if length > best:
                best, follows = length, place
        if not best:
            return []
        period = len(tokens) - follows
        return [tokens[follows + index % period] for index in range(count)]

    def _match(self, place: int) -> int:
        """How many tokens before `place` equal the last ones, up to 16."""
        tokens = self._tokens
        length = _LEAST
        while length < min(_LONGEST, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        return length


class Drafter:
    """Proposes as much as has been worth checking: more after some that came true, less after others."""

    def __init__(self, limit: int, tokens: Iterable[int]) -> None:
        self._lookup = PromptLookup(tokens)
        self._limit = self._size = limit
        self._failures = self._pause = 0

    def append(self, token: int) -> None:
        """Add the sequence's next token."""
        self._lookup.append(token)

    def propose(self, room: int) -> list[int]:
        """Up to `room` tokens to check in the next step."""
        if self._pause:
            self._pause -= 1
            return []
        return self._lookup.draft(min(self._size, room))

    def checked(self, proposed: int, accepted: int) -> None:
        """Note how many of the proposed tokens came true."""
        if accepted:
            self._failures = 0
            self._size = min(self._limit, 2 * self._size if accepted == proposed else accepted + 1)
            return
        self._size = max(1, self._size // 2)
        self._failures += 1
        self._pause = min(_MOST_PAUSE, self._failures - 1)
