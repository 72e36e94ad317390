"""A decoder that is a pure function of each sequence, and a tokenizer whose tokens cut characters."""

from __future__ import annotations

import threading
import zlib

import numpy as np
import pytest

from fewbit.runtime.batch import Batch

VOCABULARY = 64


class PureDecoder:
    """Logits that follow from the tokens of a slot up to a position alone: any mistake in what the cache holds shows.

    `repeat` is added to the logit of what followed the same token before, which gives drafts something to find.
    `forwards` keeps every forward's number of tokens per slot; `gate`, when set, holds forwards back until it opens.
    """

    def __init__(self, slots: int = 4, context: int = 128, block: int = 16, repeat: float = 0.0) -> None:
        self.vocabulary, self.context, self.slots, self.block = VOCABULARY, context, slots, block
        self.eos: tuple[int, ...] = (2,)
        self.repeat = repeat
        self.cache: list[list[int]] = [[] for _ in range(slots)]
        self.forwards: list[dict[int, int]] = []
        self.gate: threading.Event | None = None
        self.fails: Exception | None = None
        self.copies = 0
        self.closed = False

    def logits(self, tokens: list[int]) -> np.ndarray:
        seed = zlib.crc32(np.array(tokens, dtype=np.int64).tobytes())
        values = np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)
        values[2] -= 3
        if self.repeat and tokens[-1] in tokens[:-1]:
            values[tokens[len(tokens) - 1 - tokens[-2::-1].index(tokens[-1])]] += self.repeat
        return values

    def forward(self, batch: Batch) -> np.ndarray:
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fails is not None:
            raise self.fails
        assert 0 < batch.tokens.size <= self.block
        assert all(part.dtype == np.int32 for part in (batch.tokens, batch.positions, batch.slots, batch.wanted))
        assert 1 + np.count_nonzero(np.diff(batch.slots)) == len(np.unique(batch.slots)), (
            "a slot's tokens stand together"
        )
        wanted = batch.wanted.tolist()
        assert wanted == sorted(set(wanted))
        rows, counts = {}, {}
        places = zip(batch.tokens.tolist(), batch.positions.tolist(), batch.slots.tolist(), strict=True)
        for index, (token, position, slot) in enumerate(places):
            held = self.cache[slot]
            assert position <= len(held), "a position may not be skipped"
            assert position < self.context
            del held[position:]
            held.append(token)
            counts[slot] = counts.get(slot, 0) + 1
            if index in wanted:
                rows[index] = self.logits(held)
        self.forwards.append(counts)
        return np.stack([rows[index] for index in wanted]) if wanted else np.empty((0, VOCABULARY), np.float32)

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= len(self.cache[source])
        self.cache[target] = self.cache[source][:length]
        self.copies += 1

    def close(self) -> None:
        self.closed = True


class ByteTokenizer:
    """Tokens 3 to 63 are pieces of bytes, so that characters and stop strings lie across several of them.

    0 to 2 are special and have no text. Text is encoded by its longest pieces. Higher tokens mean the same again.
    """

    chat_template = "yes"
    PIECES = (
        *(bytes([code]) for code in b"abcdefghijklmnopqrstuvwxyz .,!?"),
        *(bytes([code]) for code in (0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9)),
        *(b"the ", b"and", b"ing", b"on", b"er", b"st", b"op", b"ou", b"ea", b"wh", b"ll", b"ow", b"re", b"nd", b"en"),
        *(b"END", b"E", b"N", b"D", b"0", b"1"),
    )

    def __init__(self) -> None:
        assert len(self.PIECES) == VOCABULARY - 3

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) -> str:
        skipped = b"" if skip_special_tokens else b"<s>"
        data = b"".join(self.PIECES[(i - 3) % len(self.PIECES)] if i > 2 else skipped for i in ids)
        return data.decode("utf-8", errors="replace")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        data, ids = text.encode(), []
        while data:
            piece = max((piece for piece in self.PIECES if data.startswith(piece)), key=len)
            ids.append(3 + self.PIECES.index(piece))
            data = data[len(piece) :]
        return {"input_ids": ids}

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        if messages[0]["role"] not in ("user", "system"):
            raise ValueError("the first message must be the user's")
        return "".join(f"{message['role'][0]} {message['content']}. " for message in messages) + "a "


@pytest.fixture
def make_decoder():
    """The class `PureDecoder(slots=4, context=128, block=16, repeat=0.0)`."""
    return PureDecoder


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
