"""Chooses the bits of every group of tensors within a budget of bytes, so that the least divergence is expected.

The divergence of a group at other bits than those it was measured at follows the squared error of its code, which
falls by a factor of four or so with each bit; divergences of groups add up. Both hold as long as errors are small.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import torch

from fewbit.errors import UsageError
from fewbit.formats import group_format
from fewbit.math.rounding import quantize_rotated

SAMPLE = (64, 1024)


@dataclass(frozen=True)
class Choice:
    """One group: the bytes it takes at each number of bits, and the divergence measured at `measured_bits`."""

    unit: str
    bytes: dict[int, int]
    divergence: float
    measured_bits: int

    def expected(self, code: str, bits: int) -> float:
        return self.divergence * code_error(code, bits) / code_error(code, self.measured_bits)


@functools.cache
def code_error(code: str, bits: int) -> float:
    """The squared error of a format on Gaussian weights, relative to their energy."""
    weight_format = group_format(code)
    weight = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    return quantize_rotated(weight_format, weight, weight_format.spec(*SAMPLE, bits)).relative_error


def check_budget(sizes: list[dict[int, int]], budget: int) -> None:
    """Raise `UsageError` where units of these sizes (bits to bytes) do not fit even with the fewest bits."""
    least = sum(size[min(size)] for size in sizes)
    if least > budget:
        raise UsageError(
            f"the smallest plan takes {least / 1e6:.1f} MB for what is to be rounded and the target leaves "
            f"{budget / 1e6:.1f} MB; raise the target"
        )


def allocate(choices: list[Choice], budget: int, code: str) -> dict[str, int]:
    """Bits for every unit, of all those the units offer, within `budget` bytes in total.

    Every unit starts with the fewest bits; then the step that saves the most divergence per byte is taken, and the
    next, until none fits. As each further bit saves less than the one before, no other order saves more, up to
    the last step. Raises `UsageError` where even the fewest bits do not fit.
    """
    check_budget([choice.bytes for choice in choices], budget)
    bits = {choice.unit: min(choice.bytes) for choice in choices}
    used = sum(choice.bytes[bits[choice.unit]] for choice in choices)
    queue: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        choice = choices[index]
        now = bits[choice.unit]
        higher = [number for number in sorted(choice.bytes) if number > now]
        if higher:
            gain = choice.expected(code, now) - choice.expected(code, higher[0])
            heapq.heappush(queue, (-gain / (choice.bytes[higher[0]] - choice.bytes[now]), index, higher[0]))

    for index in range(len(choices)):
        offer(index)
    while queue:
        _, index, number = heapq.heappop(queue)
        choice = choices[index]
        more = choice.bytes[number] - choice.bytes[bits[choice.unit]]
        if used + more <= budget:
            used += more
            bits[choice.unit] = number
            offer(index)
    return bits
