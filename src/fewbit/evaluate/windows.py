"""Cuts a text into the token windows that everything is evaluated on."""

from __future__ import annotations

from typing import Any

import torch

from fewbit.errors import UsageError


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token in front of a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def windows(tokenizer: Any, text: str, window: int = 512, tokens: int = 20480, bos: bool | None = None) -> torch.Tensor:
    """The first `tokens` tokens of `text` as int64 `[tokens // window, window]`, without overlap.

    With `bos` every window starts with the beginning-of-sequence token and holds `window - 1` tokens of
    text; None does what the tokenizer does by itself. Fewer windows come back from a shorter text.
    Raises `UsageError` where the text does not fill one window.
    """
    if window < 2 or tokens < window:
        raise UsageError(f"{tokens} tokens in windows of {window}: take at least one window of at least 2 tokens")
    with_bos = adds_bos(tokenizer) if bos is None else bos
    if with_bos and tokenizer.bos_token_id is None:
        raise UsageError("this tokenizer has no beginning-of-sequence token; evaluate without one")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    own = window - 1 if with_bos else window
    count = min(tokens // window, len(ids) // own)
    if count == 0:
        raise UsageError(f"the text has {len(ids)} tokens, a window {own}; give a longer text or a smaller --window")
    cut = torch.tensor(ids[: count * own], dtype=torch.long).view(count, own)
    if with_bos:
        cut = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), cut], dim=1)
    return cut
