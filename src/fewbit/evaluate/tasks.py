"""Accuracy on the tasks of lm-evaluation-harness, for compressed and full models alike.

The harness is an extra (`pip install 'fewbit[eval]'`). Its own tasks fetch their questions from the hub; tasks in a
directory of one's own, a YAML file each, may read local files and need no network.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError, UsageError

BATCH = 8


def check_harness() -> None:
    """Raise `UsageError` where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-evaluation-harness; install it: pip install 'fewbit[eval]'")


def find_tasks(names: list[str], include_path: Path | None = None) -> Any:
    """The harness' task manager that knows all these tasks, groups, tags or patterns such as `mmlu_*`.

    Tasks of `include_path` go before the harness' own of the same name. Raises `UsageError` for a name that nothing
    has or a directory that does not exist, and `FewbitError` where a task or its questions cannot be loaded.
    """
    check_harness()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path} is not a directory; give one with a YAML file per task")
    manager, missing = None, names
    if include_path is not None:
        # Reading the thousands of files of the harness' own takes many seconds.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        missing = _missing(manager, names)
    if missing or manager is None:
        manager = TaskManager(include_path=str(include_path) if include_path else None)
        missing = _missing(manager, names)
    if missing:
        raise UsageError(
            f"no task is called '{missing[0]}'; the harness lists its own with: lm-eval ls tasks; "
            "one of yours needs --include-path with the directory of its YAML file"
        )
    try:
        manager.load(names)
    except Exception as error:  # whatever the hub, the reader of datasets or a task's own code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FewbitError(
            f"cannot load {', '.join(names)} ({reason}); the harness fetches questions from the hub: check the "
            "network, or describe local files in a YAML file and give its directory with --include-path"
        ) from error
    return manager


def _missing(manager: Any, names: list[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def evaluate_tasks(model: Any, tokenizer: Any, names: list[str], manager: Any, limit: float | None = None) -> Any:
    """Run a transformers model on tasks that `manager` (of `find_tasks`) knows.

    `limit` is a number of questions per task, or below 1 a share of them. Returns, by task, `samples` (the number of
    questions) and `metrics`, each with `value` and `stderr` (None where there is none).
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if limit is not None and limit <= 0:
        raise UsageError(f"--limit {limit:g}: give a number of questions, or a share below 1")
    count = int(limit) if limit is not None and limit >= 1 else limit
    # What a text without context is predicted from; the harness needs one even where nothing is.
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id, 0)
    prefix = next(token for token in named if token is not None)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, prefix_token_id=prefix)
    found = simple_evaluate(harness, tasks=names, task_manager=manager, limit=count, log_samples=False)
    return {
        name: {"samples": found["n-samples"].get(name, {}).get("effective"), "metrics": _metrics(scores)}
        for name, scores in found["results"].items()
    }


def harness_version() -> str:
    return metadata.version("lm_eval")


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness writes `acc,none` and `acc_stderr,none`, where `none` is the filter of the answers."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in scores.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = scores.get(f"{metric}_stderr,{filter_}")
        name = metric if filter_ == "none" else f"{metric} ({filter_})"
        found[name] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, int | float) else None}
    return found
