"""Makes the checkpoints that benchmarks evaluate: once, going on where a run was cut off, and with how long it took."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encode import commit
from saving import save

from fewbit.assets import fetch_text
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.progress import Silent
from fewbit.pipeline.run import Placement, quantize

CALIBRATION = ("c4.calib", "wiki.calib")


class Stages(Silent):
    """Notes how long each stage of a run takes, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._title = ""
        self._since = 0.0

    def stage(self, title: str, total: int) -> None:
        self.end()
        self._title, self._since = title, time.monotonic()

    def end(self) -> None:
        if self._title:
            took = self.seconds.get(self._title, 0.0) + time.monotonic() - self._since
            self.seconds[self._title] = round(took, 1)


def work_dir(row: str, output: Path) -> Path:
    """Where a row's checkpoint is made; kept until the row is measured, so that a run that was cut off goes on."""
    return output.with_suffix(".work") / re.sub(r"[^a-z0-9]+", "-", row.lower())


def made(reference: Path, options: QuantizeOptions, output: Path, any_commit: bool = False) -> dict[str, Any]:
    """Quantize `reference` into `output` unless that is done with these options at this commit (or at whichever); what
    the run said of itself, and the seconds of its stages (those of a run that went on with another one's work are
    `resumed` and count that part alone)."""
    path = output.with_suffix(".json")
    label = {"options": asdict(options), "commit": commit()}
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if any(found.get(key) != label[key] for key in label if key == "options" or not any_commit):
        stages = Stages()
        # A checkpoint without a result is of a process that was killed between the two.
        placement = Placement(fresh=output.exists(), executor="auto")
        result = quantize(reference, output, options, [fetch_text(name) for name in CALIBRATION], placement, stages)
        stages.end()
        found = {**result.to_json(), "stage_seconds": stages.seconds, **label}
        save(path, found)
    return found


def forget(work: Path) -> None:
    """Remove what `made` left in a row's directory, first what says that it is complete."""
    for path in work.glob("*.json"):
        path.unlink()
    shutil.rmtree(work)


def unlike(report: dict[str, Any], settings: dict[str, int]) -> dict[str, int] | None:
    """The tokens, window and calibration tokens that some row of a report has in place of `settings`, if any."""
    for row in report["rows"].values():
        calibrated = row["options"]["calib_tokens"] or settings["calib_tokens"]
        found = {"window": row["window"], "tokens": row["tokens"], "calib_tokens": calibrated}
        if found != settings:
            return found
    return None
