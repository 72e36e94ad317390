"""The memory that this process has, and has had at most."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Bytes that the process has in memory now; where the system does not tell, the most that it has had."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most bytes that the process has had in memory.

    Linux' resource usage begins with what the parent had when it started the process, so it is not asked there.
    """
    return _status("VmHWM")


def _status(field: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
