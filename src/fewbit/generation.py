"""Generates text with a transformers model and measures how fast.

Streams pieces of text as they are decoded; the first token's time is kept apart, because it is the
prompt's and not the decoder's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TextStreamer

from fewbit.errors import UsageError


@dataclass(frozen=True)
class Generated:
    """A continuation: its text, its length, and the speed after the first token."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds_to_first_token: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Pieces(TextStreamer):
    """Hands finished pieces of text to a callback and notes when tokens arrive."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.monotonic())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


@torch.inference_mode()
def stream_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Continue `prompt`; raises `UsageError` for an empty prompt or a model without a chat template."""
    if not prompt.strip():
        raise UsageError("the prompt is empty; give some text with -p")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("this model has no chat template; leave --chat out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    streamer = _Pieces(tokenizer, on_text)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    fresh = output[0, ids.shape[1] :]
    # times[0] is the prompt's arrival, times[1] the first new token's.
    times = streamer.times
    decoding = times[-1] - times[1] if len(times) > 2 else 0.0
    return Generated(
        text=tokenizer.decode(fresh, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        tokens=fresh.numel(),
        seconds_to_first_token=round(times[1] - times[0], 4) if len(times) > 1 else 0.0,
        tokens_per_second=round((len(times) - 2) / decoding, 3) if decoding else 0.0,
    )
