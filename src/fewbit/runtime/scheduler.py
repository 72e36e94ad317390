"""Decides what every forward of a decoder works on: sequences join and leave between steps.

A step takes one token of every sequence that is being continued, drafts to check behind it, and some tokens of
prompts. Sequences wait for a slot in the order of their arrival. A slot keeps what it held, so that a prompt which
begins like an earlier one begins behind the part they share.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from fewbit.errors import UsageError
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import Decoder
from fewbit.runtime.sampling import sample_rows
from fewbit.runtime.sequence import Sequence

_LEAST_COPY = 16  # tokens shared with another slot that are worth a copy
_LEAST_PROMPT = 32  # prompt tokens per step, at least, while others are being continued


@dataclass
class _Slot:
    """A place in the decoder's cache: who uses it, and what it holds when nobody does."""

    index: int
    sequence: Sequence | None = None
    left: list[int] = field(default_factory=list)
    used: int = 0

    def held(self) -> list[int]:
        return self.left if self.sequence is None else self.sequence.tokens[: self.sequence.cached]


@dataclass(frozen=True)
class _Run:
    """One sequence's part of a step: `count` of its own tokens, then drafts; `rows` logits are wanted, those of the
    last own token and of the drafts, or none in the middle of a prompt."""

    slot: _Slot
    sequence: Sequence
    count: int
    drafts: list[int]
    rows: int


@dataclass
class Counts:
    """What a scheduler has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0


class Scheduler:
    """Runs sequences over one decoder, in one thread.

    `draft` is the most tokens guessed ahead, 0: none. Sampling uses `threads` like the decoder, 0: all.
    """

    def __init__(self, decoder: Decoder, draft: int = 0, threads: int = 0) -> None:
        if decoder.slots > decoder.block:
            raise UsageError(f"{decoder.slots} slots need blocks of at least as many tokens, not {decoder.block}")
        self.counts = Counts()
        self.waiting: deque[Sequence] = deque()
        self._decoder = decoder
        self._draft = draft
        self._threads = threads
        self._slots = [_Slot(index) for index in range(decoder.slots)]
        self._clock = 0

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return sum(slot.sequence is not None for slot in self._slots)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def step(self) -> bool:
        """Run one forward; returns whether anything is left to do."""
        self._drop_cancelled()
        self._admit()
        runs = self._plan()
        if runs:
            logits = self._decoder.forward(_batch(runs))
            self.counts.steps += 1
            self._apply(runs, logits)
        return bool(self.waiting) or self.running > 0

    def fail(self, error: BaseException) -> None:
        """End every sequence with an error and forget what the cache holds."""
        sequences = [slot.sequence for slot in self._slots if slot.sequence is not None] + list(self.waiting)
        self.waiting.clear()
        self._slots = [_Slot(slot.index) for slot in self._slots]
        for sequence in sequences:
            sequence.fail(error)

    def _drop_cancelled(self) -> None:
        for slot in self._slots:
            if slot.sequence is not None and slot.sequence.cancelled:
                self._cancel(slot.sequence, slot)
        dropped = [sequence for sequence in self.waiting if sequence.cancelled]
        for sequence in dropped:
            self.waiting.remove(sequence)
            self._cancel(sequence)

    def _cancel(self, sequence: Sequence, slot: _Slot | None = None) -> None:
        sequence.finish("cancelled")
        if slot is not None:
            self._release(slot)
        sequence.deliver()

    def _release(self, slot: _Slot) -> None:
        slot.left, slot.sequence = slot.held(), None
        self.counts.finished += 1

    # ---- joining

    def _admit(self) -> None:
        while self.waiting and any(slot.sequence is None for slot in self._slots):
            # Copying a cache may fail; until it has not, the sequence waits.
            slot, cached = self._place(self.waiting[0].tokens)
            sequence = self.waiting.popleft()
            self._clock += 1
            slot.sequence, slot.left, slot.used = sequence, [], self._clock
            sequence.start(self._decoder.context, self._draft, cached)
            self.counts.cached_tokens += cached

    def _place(self, prompt: list[int]) -> tuple[_Slot, int]:
        """A free slot for a prompt, and how many of its tokens the slot holds; one at least is left to run."""
        shared = [_common(slot.held(), prompt, len(prompt) - 1) for slot in self._slots]
        free = [slot for slot in self._slots if slot.sequence is None]
        oldest = min(free, key=lambda slot: (slot.used, slot.index))
        best = max(self._slots, key=lambda slot: (shared[slot.index], slot.sequence is None, slot.used))
        length = shared[best.index]
        # Continuing in place gives up what the slot holds beyond; a slot that is mostly something else is copied from.
        if best.sequence is None and (best is oldest or 2 * length >= len(best.left)):
            return best, length
        if length >= _LEAST_COPY:
            self._decoder.copy(best.index, oldest.index, length)
            return oldest, length
        return oldest, shared[oldest.index]

    # ---- one step

    def _plan(self) -> list[_Run]:
        busy = sorted((slot for slot in self._slots if slot.sequence is not None), key=lambda slot: slot.used)
        continued = [slot for slot in busy if slot.sequence and slot.sequence.pending == 1]
        prompts = [slot for slot in busy if slot.sequence and slot.sequence.pending > 1]
        room = self._decoder.block - len(continued)
        share = min(room, max(_LEAST_PROMPT, self._decoder.block // 4)) if continued else room
        parts = _split(share, [slot.sequence.pending for slot in prompts if slot.sequence])
        room -= sum(parts)
        runs = []
        for slot in continued:
            assert slot.sequence is not None
            drafts = self._guess(slot.sequence, room)
            room -= len(drafts)
            runs.append(_Run(slot, slot.sequence, 1, drafts, 1 + len(drafts)))
        for slot, part in zip(prompts, parts, strict=True):
            if part:
                assert slot.sequence is not None
                runs.append(_Run(slot, slot.sequence, part, [], int(part == slot.sequence.pending)))
        return runs

    def _guess(self, sequence: Sequence, room: int) -> list[int]:
        """Drafts behind a sequence's last token: none that could not be part of the answer."""
        if sequence.drafter is None:
            return []
        return sequence.drafter.propose(min(room, sequence.limit - sequence.generated - 1))

    def _apply(self, runs: list[_Run], logits: np.ndarray) -> None:
        asked = [(run.sequence, run.drafts[:ahead]) for run in runs for ahead in range(run.rows)]
        tokens: list[int] = []
        if asked:
            tokens = sample_rows(
                logits,
                [sequence.params for sequence, _ in asked],
                [sequence.seen(drafts) for sequence, drafts in asked],
                [sequence.draw(len(drafts)) for sequence, drafts in asked],
                self._threads,
            )
        first = 0
        try:
            for run in runs:
                rows = slice(first, first + run.rows)
                first = rows.stop
                self._advance(run, tokens[rows], logits[rows])
        finally:
            # Also of those before one that failed: a finished sequence is in nobody's hands any more.
            for run in runs:
                run.sequence.deliver()

    def _advance(self, run: _Run, tokens: list[int], logits: np.ndarray) -> None:
        """Note what the cache holds now, and take the tokens that were drawn, if any."""
        sequence = run.sequence
        before, sequence.cached = sequence.cached, sequence.cached + run.count
        self.counts.prompt_tokens += max(0, min(sequence.cached, sequence.prompt_tokens) - before)
        if tokens:
            self._take(run, tokens, logits)
        if sequence.finish_reason is not None:
            self._release(run.slot)

    def _take(self, run: _Run, tokens: list[int], logits: np.ndarray) -> None:
        """Give a sequence its next tokens: as many as were drawn behind drafts that came true, and one more."""
        sequence = run.sequence
        taken = 0
        for index, token in enumerate(tokens):
            sequence.take(token, logits[index])
            taken += 1
            if sequence.finish_reason is not None or index == len(run.drafts) or token != run.drafts[index]:
                break
        sequence.cached = len(sequence.tokens) - 1
        self.counts.generated_tokens += taken
        if run.drafts and sequence.drafter is not None:
            self.counts.drafted_tokens += len(run.drafts)
            self.counts.accepted_tokens += taken - 1
            sequence.drafter.checked(len(run.drafts), taken - 1)


def _common(held: list[int], prompt: list[int], most: int) -> int:
    """Length of the longest common beginning, at most `most`."""
    length = min(len(held), most)
    if held[:length] == prompt[:length]:
        return length
    return next(index for index in range(length) if held[index] != prompt[index])


def _split(room: int, wanted: list[int]) -> list[int]:
    """Share `room` tokens fairly among prompts: the short ones get all they need, the others equal parts."""
    parts = [0] * len(wanted)
    for done, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        parts[index] = min(wanted[index], room, max(1, room // (len(wanted) - done)))
        room -= parts[index]
    return parts


def _batch(runs: list[_Run]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    for run in runs:
        start = run.sequence.cached
        own = run.sequence.tokens[start : start + run.count] + run.drafts
        tokens += own
        positions += range(start, start + len(own))
        slots += [run.slot.index] * len(own)
        wanted += range(len(tokens) - run.rows, len(tokens))
    return Batch(*(np.array(values, dtype=np.int32) for values in (tokens, positions, slots, wanted)))
