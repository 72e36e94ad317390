"""How the command line talks: progress and prose on stderr, results on stdout.

With `--json` one object is all that stdout gets.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from fewbit.errors import UsageError

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)
SECONDS_BETWEEN_LINES = 60


def print_json(data: Any) -> None:
    """One JSON object on stdout and nothing else."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def human_bytes(size: float) -> str:
    """A size with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def parse_size(text: str) -> int:
    """Bytes from "800MB", "1.2 GB" or a plain number; units are decimal, as everywhere here."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?\s*", text)
    if match is None:
        raise UsageError(f"'{text}' is no size; give a number with B, kB, MB or GB, such as 800MB")
    size = int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()])
    if size < 1:
        raise UsageError(f"'{text}' leaves room for nothing; give a size such as 800MB")
    return size


def human_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def table(title: str, columns: list[str], rows: list[list[str]], numeric_from: int = 1) -> Table:
    """A table whose columns from `numeric_from` on are numbers."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index >= numeric_from else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def plan_table(plan: Any) -> Table:
    """A plan's tensors, added up by kind and storage, with the totals over every weight."""
    rows: dict[tuple[str, str], list[int]] = {}
    for tensor in plan.tensors:
        stored = str(tensor.spec) if tensor.spec else f"{tensor.dtype}: {tensor.reason}"
        total = rows.setdefault((tensor.kind, stored), [0, 0, 0])
        total[0] += 1
        total[1] += tensor.weights
        total[2] += tensor.bytes
    lines = [
        [kind, stored, str(count), f"{weights / 1e6:.2f} M", human_bytes(size), f"{8 * size / weights:.3f}"]
        for (kind, stored), (count, weights, size) in sorted(rows.items())
    ]
    totals = plan.totals()
    lines.append(
        ["all", "", str(len(plan.tensors)), f"{totals['weights'] / 1e6:.2f} M", human_bytes(totals["bytes"]),
         f"{totals['bits_per_weight']['total']:.3f}"]
    )  # fmt: skip
    return table("Plan", ["tensors", "stored as", "count", "weights", "size", "bits/weight"], lines, 2)


def bits_table(plan: Any) -> Table:
    """The bits chosen for every group: a row per layer with the groups in order, then the tables."""
    roles: dict[str, list[str]] = {}
    rows: dict[str, dict[str, int]] = {}
    for tensor in plan.quantized:
        row, place = tensor.unit, ""
        if tensor.kind == "body":
            layer, _, place = tensor.unit.partition(".")
            row = f"layer {layer}"
            role = tensor.module.rpartition(".")[2].removesuffix("_proj")
            if role not in roles.setdefault(place, []):
                roles[place].append(role)
        rows.setdefault(row, {})[place] = tensor.spec.bits
    places = sorted(roles, key=int)
    lines = [[row, *(str(bits.get(place, "")) for place in ("", *places))] for row, bits in rows.items()]
    return table("Bits", ["", "whole", *("/".join(roles[place]) for place in places)], lines)


class BarProgress:
    """Draws a bar per stage, and a line per tensor when asked for; in a file, without bars, a line a minute."""

    def __init__(self, bar: RichProgress, lines: bool) -> None:
        self._bar = bar
        self._lines = lines
        self._task: Any = None
        self._told = time.monotonic()

    def stage(self, title: str, total: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, visible=False)
        self._task = self._bar.add_task(title, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._bar.advance(self._task, steps)
            self._tell()

    def tensor(self, record: dict[str, Any]) -> None:
        if self._lines:
            tokens = f"  {record['tokens']:.0f} tokens" if "tokens" in record else ""
            self._bar.console.print(
                f"{record['tensor']:<52} {record['format']:<8} {record['bits_per_weight']:.3f} bits"
                f"  error {record['relative_error']:.4f}{tokens}  {record['seconds']:.2f} s",
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        if self._lines:
            self._bar.console.print(text, soft_wrap=True)

    def fetch(self, what: str, done: int, total: int) -> None:
        """Parts of a download, as `fewbit.assets` reports them."""
        self.count(f"fetching {what}")(done, total)

    def count(self, title: str) -> Any:
        """A `(done, total)` callback that drives a stage of its own."""

        def update(done: int, total: int) -> None:
            if done == 0:
                self.stage(title, total)
            self._bar.update(self._task, completed=done, total=total)
            self._tell()

        return update

    def _tell(self) -> None:
        """How far the stage is, in words, where nobody sees its bar."""
        now = time.monotonic()
        if self._bar.console.is_terminal or now < self._told + SECONDS_BETWEEN_LINES:
            return
        self._told = now
        task = next(task for task in self._bar.tasks if task.id == self._task)
        self._bar.console.print(f"{task.description}: {task.completed:.0f} of {task.total:.0f}", soft_wrap=True)


@contextmanager
def progress_bars(lines: bool = False) -> Iterator[BarProgress]:
    """Progress on stderr for as long as the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=stderr) as bar:
        yield BarProgress(bar, lines)
