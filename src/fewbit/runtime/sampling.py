"""Draws the next token from logits: the settings, the specification in numpy, and the native code's face.

A draw is a function of the logits, the settings, and one random number that depends on the seed and on the token's
number in its sequence alone. So an answer depends neither on what else is decoded beside it nor on how many tokens a
step brought.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewbit.checkpoint.damage import shortened
from fewbit.errors import FewbitError, UsageError
from fewbit.ops.extension import load_native

MAX_STOPS = 16
MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-4  # below, nothing but the likeliest token has any probability in float32
LEAST_PENALTY = 0.01  # far below, logits that are divided by it leave float32, and the step fails for everybody in it
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn, and where it ends.

    `temperature` 0 (or below 0.0001) takes the likeliest token. Otherwise tokens outside the `top_k` likeliest (0:
    all), outside the smallest set that holds `top_p` of the probability left, and less likely than `min_p` times the
    likeliest are left out, in that order. `repetition_penalty` divides positive logits of tokens seen before (in the
    prompt, too) and multiplies negative ones. Without a `seed` every answer is another. `stop` strings end the answer
    and are no part of it. `logprobs` asks for each token's log-probability and those of that many alternatives, from
    the model's own logits. `ignore_eos` goes on where the model would end. Raises `UsageError` for what it refuses.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple):
            raise UsageError(f"stop takes a string or a list of them, not {stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        for name, (low, high, kind) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            whole = kind is int
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise UsageError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}")
            # No number is between them and a NaN.
            if not low <= value <= high:
                raise UsageError(f"{name} must be between {low} and {high}, not {shortened(value)}")
        if self.top_p == 0 or self.repetition_penalty == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            raise UsageError(f"{name} must be above 0; 1 turns it off")
        if self.repetition_penalty < LEAST_PENALTY:
            raise UsageError(f"repetition_penalty must be at least {LEAST_PENALTY}, not {self.repetition_penalty}")
        if len(self.stop) > MAX_STOPS or any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError(f"stop takes up to {MAX_STOPS} strings that are not empty")

    def row(self, uniform: float) -> tuple[float, ...]:
        """What the native sampler reads: temperature, top_k, top_p, min_p, repetition_penalty, the random number."""
        temperature = self.temperature if self.temperature >= LEAST_TEMPERATURE else 0.0
        return (temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, uniform)


_RANGES: dict[str, tuple[float, float, type]] = {
    "max_tokens": (1, 1_000_000, int),
    "temperature": (0.0, 100.0, float),
    "top_k": (0, 1_000_000, int),
    "top_p": (0.0, 1.0, float),
    "min_p": (0.0, 1.0, float),
    "repetition_penalty": (0.0, 100.0, float),
    "seed": (-(1 << 63), _MASK, int),
    "logprobs": (0, MAX_LOGPROBS, int),
}


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood, 2014): a bijection of 64 bits that scatters them."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def uniform(seed: int, number: int) -> float:
    """The random number in [0, 1) of a sequence's token `number`: a counter-based generator, without state."""
    return (_mix(_mix(seed & _MASK) + (number + 1) * _GOLDEN & _MASK) >> 11) * 2.0**-53


def sample_reference(logits: np.ndarray, params: SamplingParams, seen: Sequence[int], draw: float) -> int:
    """The token that `draw` in [0, 1) stands for under logits float32 `[V]`; the specification.

    Likelier tokens come first, of equal ones the lower id; the kept tokens share [0, 1) in the order of their ids.
    Raises `FewbitError` if the logits are not finite enough to choose from.
    """
    values = np.array(logits, dtype=np.float32)
    if params.repetition_penalty != 1:
        ids = np.unique(np.asarray(seen, dtype=np.int64))
        penalty = np.float32(params.repetition_penalty)
        values[ids] = np.where(values[ids] > 0, values[ids] / penalty, values[ids] * penalty)
    if np.isnan(values).any() or not np.isfinite(values.max()):
        raise _not_finite()
    if params.temperature < LEAST_TEMPERATURE:
        return int(values.argmax())
    exponents = (values.astype(np.float64) - float(values.max())) / params.temperature
    weights = np.exp(exponents)
    order = np.argsort(-values, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        mass = np.cumsum(weights[order])
        order = order[: int(np.searchsorted(mass, params.top_p * mass[-1])) + 1]
    if params.min_p > 0:
        order = order[exponents[order] >= math.log(params.min_p)]
    kept = np.sort(order)
    mass = np.cumsum(weights[kept])
    index = int(np.searchsorted(mass, draw * mass[-1], side="right"))
    return int(kept[min(index, len(kept) - 1)])


def sample_rows(
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    seen: Sequence[Sequence[int]],
    draws: Sequence[float],
    threads: int = 0,
) -> list[int]:
    """One token for every row of logits float32 `[W, V]` contiguous; rows are drawn side by side.

    `seen[i]` are row i's earlier tokens, each once, and may be empty where nothing is penalized. The native code sums
    in float32 what the specification sums in float64: a random number within some 1e-6 of a border between two tokens
    may give the other one.
    """
    native = load_native()
    if native is None:
        rows = zip(logits, params, seen, draws, strict=True)
        return [sample_reference(*row) for row in rows]
    settings = np.array([p.row(draw) for p, draw in zip(params, draws, strict=True)], dtype=np.float64)
    ends = np.cumsum([len(ids) for ids in seen], dtype=np.int64)
    ids = np.fromiter((token for row in seen for token in row), dtype=np.int32, count=int(ends[-1]))
    tokens = np.empty(len(params), dtype=np.int32)
    native.sample(logits, settings, ids, ends, tokens, threads)
    if tokens.min() < 0:
        raise _not_finite()
    return tokens.tolist()


def _not_finite() -> FewbitError:
    return FewbitError("the model's logits are not finite; check its weights with fewbit verify")


def log_probabilities(logits: np.ndarray, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token under logits float32 `[V]`, and the `count` likeliest tokens with theirs."""
    largest = float(logits.max())
    normalizer = largest + math.log(np.exp(logits.astype(np.float64) - largest).sum())
    count = min(count, logits.size)
    best = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, np.int64)
    ordered = best[np.lexsort((best, -logits[best]))].tolist()
    return float(logits[token]) - normalizer, [(index, float(logits[index]) - normalizer) for index in ordered]
