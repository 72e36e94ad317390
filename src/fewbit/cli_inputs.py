"""What several verbs read: texts to measure on, and models for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.console import progress_bars
from fewbit.errors import UsageError


def read_text(path: Path | None) -> str:
    """The text of a file, or without one the held-out text that is fetched; raises `UsageError` for no UTF-8 file."""
    if path is None:
        from fewbit.assets import fetch_text

        with progress_bars() as bars:
            path = fetch_text("wiki.eval", progress=bars.fetch)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; give a UTF-8 text file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a directory; give a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a UTF-8 text file") from error


def load_model(path: str, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """A model and its tokenizer, without bars of transformers' own."""
    import torch
    from transformers.utils import logging

    from fewbit.loading import load_any

    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"unknown dtype '{dtype}': choose bfloat16 or float32")
    logging.disable_progress_bar()
    return load_any(path, getattr(torch, dtype))
