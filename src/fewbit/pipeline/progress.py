"""How a running pipeline tells what it does.

The pipeline calls a `Progress`; the command line draws bars from it, and every tensor's line goes to
`log.jsonl` in the work directory as well.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol


class Progress(Protocol):
    """What the pipeline reports; every method may be called from the main thread only."""

    def stage(self, title: str, total: int) -> None:
        """A new stage begins, with `total` steps."""

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current stage are done."""

    def tensor(self, record: dict[str, Any]) -> None:
        """A tensor is stored: name, bits, error and seconds."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class Silent:
    """Reports nothing."""

    def stage(self, title: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def tensor(self, record: dict[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Logged:
    """Passes everything on and appends one JSON line per stage and per tensor to a file."""

    def __init__(self, inner: Progress, path: Path) -> None:
        self._inner = inner
        self._path = path

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as log:
            log.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")

    def stage(self, title: str, total: int) -> None:
        self._write({"stage": title, "total": total})
        self._inner.stage(title, total)

    def advance(self, steps: int = 1) -> None:
        self._inner.advance(steps)

    def tensor(self, record: dict[str, Any]) -> None:
        self._write(record)
        self._inner.tensor(record)

    def note(self, text: str) -> None:
        self._write({"note": text})
        self._inner.note(text)
