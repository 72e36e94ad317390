"""Calibration texts: files with weights, chats through the model's template, cut into windows of tokens.

A text is a UTF-8 file. A `.jsonl` file holds one object per line, with `text` or with `messages` as chat
models take them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint.source import Source
from fewbit.checkpoint.tensors import first_line
from fewbit.errors import UsageError

MAX_CHARACTERS_PER_TOKEN = 12  # more than any language model's tokenizer needs on running text


@dataclass(frozen=True)
class CalibrationText:
    """A file and its share of the token budget, relative to the other files'."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, argument: str | Path) -> CalibrationText:
        """`FILE` or `FILE:WEIGHT`; a colon in a path is fine as long as no number follows the last one."""
        path, colon, number = str(argument).rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            return cls(Path(argument))
        if not colon:
            return cls(Path(argument))
        if not 0 < weight < float("inf"):
            raise UsageError(f"{argument}: the weight of a calibration file must be positive")
        return cls(Path(path), weight)


def calibration_windows(
    source: Source, texts: Sequence[CalibrationText], tokens: int, window: int
) -> tuple[torch.Tensor, dict[str, int]]:
    """Token windows int64 `[n, window]`, cut from the start of each file, and how many each file gave.

    Shares follow the weights; what a short file cannot give is taken from the others. Windows of different files
    alternate, so that any number of first windows is a mixture. Raises `UsageError` where a file is missing or is
    no text, or where all files together do not fill one window.
    """
    tokenizer = source.tokenizer()
    wanted = max(1, tokens // window)
    available = [_windows(tokenizer, text.path, wanted, window) for text in texts]
    shares = _shares([text.weight for text in texts], [len(part) for part in available], wanted)
    if sum(shares) == 0:
        raise UsageError(f"the calibration text is shorter than one window of {window} tokens; give a longer file")
    placed = [
        ((number + 0.5) / share, index, row)
        for index, (part, share) in enumerate(zip(available, shares, strict=True))
        for number, row in enumerate(part[:share])
    ]
    placed.sort(key=lambda entry: entry[:2])
    counts = {str(text.path): share for text, share in zip(texts, shares, strict=True)}
    return torch.stack([row for _, _, row in placed]), counts


def _shares(weights: list[float], available: list[int], wanted: int) -> list[int]:
    """Windows that each file gives: in proportion to the weights as far as files reach."""
    shares = [0] * len(weights)
    for _ in range(min(wanted, sum(available))):
        open_files = [index for index, share in enumerate(shares) if share < available[index]]
        # The file that is furthest behind its weight comes next, as in a fair vote.
        chosen = min(open_files, key=lambda index: ((shares[index] + 1) / weights[index], index))
        shares[chosen] += 1
    return shares


def _windows(tokenizer: Any, path: Path, count: int, window: int) -> torch.Tensor:
    """At most `count` windows int64 `[n, window]` from the start of a file."""
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"calibration file {path} {problem}; give a UTF-8 text file")
    limit = MAX_CHARACTERS_PER_TOKEN * count * window
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                ids = _records(tokenizer, path, file, count * window)
            else:
                ids = tokenizer(file.read(limit), verbose=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise UsageError(f"calibration file {path} is not UTF-8 text ({error.reason})") from error
    usable = min(count, len(ids) // window)
    return torch.tensor(ids[: usable * window], dtype=torch.long).view(usable, window)


def _records(tokenizer: Any, path: Path, lines: Any, tokens: int) -> list[int]:
    """The tokens of a `.jsonl` file, records one after the other, until there are enough."""
    ids: list[int] = []
    for number, line in enumerate(lines, 1):
        if len(ids) >= tokens:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "messages" in record:
                # The template puts special tokens where they belong.
                chat = tokenizer.apply_chat_template(record["messages"], tokenize=False)
                ids += tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"]
            elif isinstance(record["text"], str):
                ids += tokenizer(record["text"], verbose=False)["input_ids"]
            else:
                raise TypeError("text is no string")
        # A template may raise anything on messages that it does not know.
        except Exception as error:
            raise UsageError(
                f"{path}, line {number}: neither {{'text': ...}} nor {{'messages': [{{'role', 'content'}}]}} that the "
                f"model's chat template takes ({type(error).__name__}: {first_line(error)})"
            ) from error
    return ids


def tokens_hash(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
