"""Measures a set of models for one report and gives all figures back as plain data.

Every model reads the same windows of the same text beside one run of the reference; speeds are measured afterwards,
when no other model is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewbit.checkpoint.artifact import Artifact
from fewbit.console import BarProgress
from fewbit.environment import environment
from fewbit.errors import FewbitError
from fewbit.report import record
from fewbit.report.models import Subject, Subjects, check_tokenizers, open_subjects

if TYPE_CHECKING:
    from fewbit.evaluate import EvalResult
    from fewbit.evaluate.tails import RotatedLayer

SCORES = ("perplexity", "perplexity_stderr", "kl_mean", "kl_p99", "top1_agreement", "bits_per_char")
CONDITIONS = ("tokens", "window", "stride", "bos", "text_sha256")
PROMPT, GENERATED, REPEATS = 256, 64, 3
"""Tokens of the timed prompt, tokens decoded behind one, and repetitions; less where a model holds less."""

NO_REFERENCE = (
    "There is no full-precision model to compare with. Give the one that the checkpoints were made from, with "
    "--reference MODEL."
)


@dataclass(frozen=True)
class ReportSettings:
    """What is measured: `text` (UTF-8, whole), `tokens` of it in windows of `window`, and whether speed is."""

    text: str
    tokens: int = 20480
    window: int = 512
    speed: bool = True


def collect(
    paths: Sequence[str], reference: str | None, settings: ReportSettings, progress: BarProgress
) -> dict[str, Any]:
    """All figures of a report over the models at `paths`, ready for JSON.

    `missing` says of every section that cannot be there ("kl", "rotation", "speed", "errors") why, and how to get it.
    Raises `UsageError` and `CorruptFile` as opening, loading and evaluating models do.
    """
    subjects = open_subjects(paths, reference)
    missing: dict[str, str] = {}
    scores = _evaluate(subjects, settings, progress)
    speeds = {subject.name: _speed(subject, settings, progress) for subject in subjects.models}
    bandwidth = _add_limits(list(speeds.values()))
    rows = [_row(subject, subjects, scores[subject.name], speeds[subject.name]) for subject in subjects.models]
    tails, reason = _tails(subjects, progress)
    if subjects.reference is None:
        missing["kl"] = NO_REFERENCE
    if tails is None:
        missing["rotation"] = reason
    if not settings.speed:
        missing["speed"] = "Speed was not measured; leave out --no-speed."
    if not subjects.artifacts:
        missing["errors"] = "None of the models is a fewbit checkpoint, so there are no recorded errors and bits."
    facts = next(iter(scores.values()))
    return {
        "models": rows,
        "reference": subjects.reference.name if subjects.reference else None,
        "fronts": {score: front(rows, score) for score in ("kl_mean", "perplexity")},
        "tails": tails,
        "missing": missing,
        "read_bytes_per_second": bandwidth,
        "conditions": {key: getattr(facts, key) for key in CONDITIONS},
        "environment": environment(),
    }


def front(rows: Sequence[dict[str, Any]], score: str) -> list[str]:
    """The names of the models that no other is both smaller than and better than (or equal in one), by size.

    The reference's divergence from itself is no measurement and left out.
    """
    measured = [row for row in rows if row[score] is not None and not (score == "kl_mean" and row["reference"])]
    names, best = [], float("inf")
    for row in sorted(measured, key=lambda row: (row["bytes"], row[score])):
        if row[score] < best:
            names.append(row["name"])
            best = row[score]
    return names


def _evaluate(subjects: Subjects, settings: ReportSettings, progress: BarProgress) -> dict[str, EvalResult]:
    from fewbit.cli_inputs import load_model
    from fewbit.evaluate import evaluate_many

    loaded: dict[str, tuple[Any, Any]] = {}
    progress.stage("loading models", len(subjects.models))
    for subject in subjects.models:
        loaded[subject.name] = load_model(subject.path)
        progress.advance()
    check_tokenizers([(subject.path, loaded[subject.name][1]) for subject in subjects.models])
    first = subjects.models[0].name
    return evaluate_many(
        {name: model for name, (model, _) in loaded.items()},
        loaded[first][1],
        settings.text,
        loaded[first][0] if subjects.reference else None,
        window=settings.window,
        tokens=settings.tokens,
        progress=progress.count("evaluating windows"),
    )


def _speed(subject: Subject, settings: ReportSettings, progress: BarProgress) -> dict[str, Any] | None:
    """What `fewbit bench` says of a model; or `problem`, why it says nothing."""
    from fewbit.runtime.bench import BenchSettings, run_bench

    if not settings.speed:
        return None
    lengths = (min(PROMPT, subject.positions // 2),)
    wanted = BenchSettings(lengths, (1,), min(GENERATED, subject.positions // 4), REPEATS)
    try:
        return run_bench(subject.path, wanted, None, "bf16", progress.count(f"timing {subject.name}"))
    except FewbitError as error:
        return {"problem": str(error)}


def _add_limits(speeds: Sequence[dict[str, Any] | None]) -> float | None:
    """Give every speed the `limit` of decoding, in tokens/s, and its `share` of it; the memory's bytes per second.

    The limit is the memory's speed over the bytes of weights that a token takes. A machine has one memory, so the best
    of all runs counts for all; None where it was not measured.
    """
    timed = [speed for speed in speeds if speed and "decode" in speed]
    best = max((speed["read_bytes_per_second"] for speed in timed), default=0)
    for speed in timed:
        speed["limit"] = round(best / speed["weight_bytes_per_token"], 3) if best else None
        speed["share"] = round(speed["decode"][0]["tokens_per_second"] / speed["limit"], 4) if best else None
    return best or None


def _row(subject: Subject, subjects: Subjects, score: EvalResult, speed: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": subject.name,
        "path": subject.path,
        "reference": subject is subjects.reference,
        "checkpoint": None if subject.artifact is None else _checkpoint(subject.artifact, subjects),
        "model_type": subject.config.get("model_type"),
        **subject.size(),
        **{key: getattr(score, key) for key in SCORES},
        "speed": speed,
    }


def _checkpoint(artifact: Artifact, subjects: Subjects) -> dict[str, Any]:
    """What a checkpoint's own record says."""
    data = artifact.record
    tensors = data["tensors"]
    errors = [entry["relative_error"] for entry in tensors if entry["format"]]
    formats = sorted({entry["format"] for entry in tensors if entry["kind"] == "body" and entry["format"]})
    return {
        "formats": formats,
        "method": record.method(data),
        "options": data["options"],
        "fewbit_version": data.get("fewbit_version"),
        "source_fingerprint": data.get("source_fingerprint"),
        "made_from_reference": subjects.made_from_reference(artifact),
        "mean_relative_error": sum(errors) / max(1, len(errors)),
        "errors": record.errors_by_kind(tensors),
        "bits": record.bits_by_kind(tensors),
        "tables": record.tables(tensors),
        "tuning": record.tuning_gain(data),
    }


def _tails(subjects: Subjects, progress: BarProgress) -> tuple[dict[str, Any] | None, str]:
    """Histograms and outliers of the reference's layer with the heaviest tails; or None, and why."""
    from fewbit.checkpoint.equivalent import TRANSFORM
    from fewbit.evaluate.tails import heaviest_tails, tails

    reference = subjects.reference
    if reference is None or reference.source is None:
        return None, NO_REFERENCE
    if not subjects.artifacts:
        return None, "None of the models is a fewbit checkpoint; give one that was made from the reference."
    made = [(subject, artifact) for subject, artifact in subjects.artifacts if subjects.made_from_reference(artifact)]
    if not made:
        return None, (
            f"None of the checkpoints was made from {reference.name} as it is now; give the model that they were made "
            "from, with --reference MODEL."
        )
    # Learned axes change the weights before their rotation, so that a picture of the rotation alone needs another.
    plain = [(subject, artifact) for subject, artifact in made if not (artifact.path / TRANSFORM).exists()]
    for subject, artifact in plain:
        layers = _rotated_layers(artifact)
        if layers:
            layer = heaviest_tails(reference.source, layers, progress.count("reading layers"))
            return {"model": subject.name, **tails(layer, reference.source.tensor(layer.name))}, ""
    return None, (
        "No checkpoint here rotates the reference's own weights (they were not rotated, or put on learned axes first); "
        "add one, which takes a minute: fewbit quantize MODEL OUT --rounding nearest --no-tune"
    )


def _rotated_layers(artifact: Artifact) -> list[RotatedLayer]:
    from fewbit.evaluate.tails import RotatedLayer
    from fewbit.math.hadamard import unpack_signs

    return [
        RotatedLayer(
            f"{module.name}.weight",
            module.spec,
            unpack_signs(artifact.tensors([f"{module.name}.signs"])[f"{module.name}.signs"], module.spec.cols),
        )
        for module in artifact.modules.values()
        if module.kind == "body" and module.spec.block > 1
    ]
