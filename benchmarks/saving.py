"""Writes results so that a process that is killed meanwhile leaves the file as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save(path: Path, report: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename; rows keep their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
