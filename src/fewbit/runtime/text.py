"""Turns tokens into text as they come: whole characters only, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"
_CONTEXT = 6  # tokens of the prompt that the first text is decoded with: some tokenizers drop a text's first space
_LONGEST = 8  # tokens that may wait for the rest of a character (of 4 bytes at most); more are broken for good


class Detokenizer:
    """Decodes one answer, token by token.

    Tokens are decoded together with some before them, because their text may depend on those; what is new is what
    follows the text of those alone. Tokens whose bytes end inside a character wait for the next ones.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt[-_CONTEXT:])
        self._waiting: list[int] = []

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token: int) -> str:
        """The text that is complete with this token; "" if it ends inside a character."""
        self._waiting.append(token)
        known, text = self._decode(self._before), self._decode(self._before + self._waiting)
        if text.endswith(_BROKEN) and len(self._waiting) < _LONGEST:
            return ""
        self._before, self._waiting = self._waiting, []
        return text[_shared(known, text) :]


def _shared(known: str, text: str) -> int:
    """Length of the common beginning: all of `known` but a character that was not complete."""
    if text.startswith(known):
        return len(known)
    return next((place for place, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), len(text))


class StopFilter:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string followed it."""
        if not self._stops or not text:
            return text, False
        text, self._held = self._held + text, ""
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            return text[: min(found)], True
        for start in range(max(0, len(text) - max(map(len, self._stops)) + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._held = text[start:]
                return text[:start], False
        return text, False

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        text, self._held = self._held, ""
        return text
