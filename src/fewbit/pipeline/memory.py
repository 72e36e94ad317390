"""What a step of descent keeps in memory, and what there is."""

from __future__ import annotations

import os

from fewbit.pipeline.plan import Plan


def activation_bytes(plan: Plan, tokens: int) -> int:
    """What a step over so many tokens keeps for the way back: what linears read and write, and as much between."""
    body = [tensor for tensor in plan.tensors if tensor.kind == "body"]
    return 2 * 4 * tokens * sum(sum(tensor.shape) for tensor in body)


def computed_again(kept: int) -> bool:
    """Whether a step forgets the `kept` bytes of its way there and computes them on the way back: they would take more
    than half of the memory that is free."""
    return kept > available_memory() / 2


def available_memory() -> int:
    """Bytes of memory that nobody uses, as far as the system tells."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 << 30
