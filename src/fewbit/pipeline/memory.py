"""What rounding and a step of descent keep in memory, and what there is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fewbit.formats import GroupFormat, get_format
from fewbit.math.rounding import CHUNK_WEIGHTS
from fewbit.pipeline.plan import Plan, PlannedTensor

COPIES_WHILE_ROUNDING = 6  # source, rotated, fed-back, values, errors and codes, in float32 each at most
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def rounding_bytes(tensor: PlannedTensor) -> int:
    """What rounding one matrix takes at most, without what calibration knows of its inputs."""
    assert tensor.spec is not None
    weights = tensor.weights
    if isinstance(get_format(tensor.spec.format), GroupFormat):
        # These take some rows at a time.
        weights = min(weights, max(CHUNK_WEIGHTS, 16 * tensor.shape[1]))
    return 4 * COPIES_WHILE_ROUNDING * weights


def activation_bytes(plan: Plan, tokens: int) -> int:
    """What a step over so many tokens keeps for the way back: what linears read and write, and as much between."""
    body = [tensor for tensor in plan.tensors if tensor.kind == "body"]
    return 2 * 4 * tokens * sum(sum(tensor.shape) for tensor in body)


def computed_again(kept: int) -> bool:
    """Whether a step forgets the `kept` bytes of its way there and computes them on the way back: they would take more
    than half of the memory that is free."""
    return kept > available_memory() / 2


def available_memory() -> int:
    """Bytes that can be had without taking them from anybody, as far as the system tells: what files are kept in
    counts, what is beyond a container's limit does not."""
    found = [4 << 30]
    with suppress(ValueError, OSError):
        found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, KeyError, ValueError):
        found = [1024 * _numbers(MEMINFO)["MemAvailable:"]]
    # Without a limit the file says "max", which is no number.
    with suppress(OSError, KeyError, ValueError):
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used + _numbers(CGROUP / "memory.stat")["file"])
    return max(0, min(found))


def _numbers(path: Path) -> dict[str, int]:
    """The first number of every line of a file of the system, by its first word."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}
