"""The memory that a process has, and has had at most."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_PROCESSES = Path("/proc")


def resident_bytes() -> int:
    """Bytes that this process has in memory now; where the system does not tell, the most that it has had."""
    return _status("VmRSS") or _own_peak()


def peak_resident_bytes(process: int | None = None) -> int:
    """The most bytes that this process, or that of another number, has had in memory; 0 where the system does not tell
    of another one.

    Linux' resource usage begins with what the parent had when it started the process, so it is not asked there.
    """
    found = _status("VmHWM", process)
    return _own_peak() if found == 0 and process is None else found


def _status(field: str, process: int | None = None) -> int:
    """A field of a process' status in bytes; 0 where there is none."""
    path = _PROCESSES / ("self" if process is None else str(process)) / "status"
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0


def _own_peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
