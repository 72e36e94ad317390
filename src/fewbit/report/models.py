"""The models of a report: opened, named, and checked to be comparable before anything takes time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.checkpoint.artifact import Artifact, is_artifact
from fewbit.errors import UsageError

if TYPE_CHECKING:
    from fewbit.checkpoint.source import Source


@dataclass(frozen=True)
class Subject:
    """One model of a report: a fewbit checkpoint (`artifact`) or a full-precision one (`source`).

    `name` is unique in the report.
    """

    name: str
    path: str
    artifact: Artifact | None = None
    source: Source | None = None

    @property
    def config(self) -> dict[str, Any]:
        if self.artifact is not None:
            return self.artifact.config
        assert self.source is not None
        found: dict[str, Any] = self.source.config.to_dict()
        return found

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model tells apart, 0 where its configuration does not say."""
        inner = self.config.get("text_config") or {}
        return int(self.config.get("vocab_size") or inner.get("vocab_size") or 0)

    @property
    def positions(self) -> int:
        """The positions that the model was made for."""
        return int(self.config.get("max_position_embeddings") or 2048)

    def size(self) -> dict[str, Any]:
        """`bytes`, `weights` and `bits_per_weight`; a full model counts as 16 bits, however its file keeps it."""
        if self.artifact is not None:
            inspected = self.artifact.inspect()
            return {key: inspected[key] for key in ("bytes", "weights", "bits_per_weight")}
        assert self.source is not None
        weights = self.source.weights()
        return {"bytes": 2 * weights, "weights": weights, "bits_per_weight": {"body": 16.0, "total": 16.0}}


@dataclass(frozen=True)
class Subjects:
    """The models of a report in the order they were given, and the full-precision one they are measured against.

    The `reference` is one of `models`; None where none was given.
    """

    models: tuple[Subject, ...]
    reference: Subject | None

    @property
    def artifacts(self) -> list[tuple[Subject, Artifact]]:
        return [(subject, subject.artifact) for subject in self.models if subject.artifact is not None]

    def made_from_reference(self, artifact: Artifact) -> bool:
        """Whether a checkpoint was made from the reference's files as they are now."""
        if self.reference is None or self.reference.source is None:
            return False
        return bool(artifact.record.get("source_fingerprint") == self.reference.source.fingerprint())


def open_subjects(paths: Sequence[str], reference: str | None = None) -> Subjects:
    """Open every model once, the reference first among them.

    Without `reference` it is the full model among `paths` that a checkpoint was made from, or else the first full
    model. Raises `UsageError` for what is no model, for a reference that is a checkpoint, and where vocabularies differ
    in size; `CorruptFile` for damaged models.
    """
    if not paths:
        raise UsageError("a report takes one model at least: fewbit report PATH... -o report.html")
    places: dict[str, str] = {}
    for path in [*([] if reference is None else [reference]), *paths]:
        places.setdefault(str(Path(path).resolve()) if Path(path).exists() else path, path)
    order = list(places.values())
    models = [_open(path, name) for path, name in zip(order, _names(order), strict=True)]
    chosen = models[0] if reference is not None else _full_model(models)
    if chosen is not None and chosen.artifact is not None:
        raise UsageError(
            f"--reference takes a full-precision model and {chosen.path} is a fewbit checkpoint; give the model that "
            "it was made from"
        )
    if chosen is not None:
        models = [chosen, *(model for model in models if model is not chosen)]
    _check_vocabularies(models)
    return Subjects(tuple(models), chosen)


def _open(path: str, name: str) -> Subject:
    if is_artifact(Path(path)):
        return Subject(name, path, artifact=Artifact.open(path))
    from fewbit.checkpoint.source import open_source

    return Subject(name, path, source=open_source(path))


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of every path, with as many parts before it as it takes to tell them apart."""
    parts = [Path(path).resolve().parts if Path(path).exists() else Path(path).parts for path in paths]
    names = [where[-1] if where else path for where, path in zip(parts, paths, strict=True)]
    for depth in range(2, 8):
        repeated = {name for name in names if names.count(name) > 1}
        pairs = list(zip(parts, names, strict=True))
        names = ["/".join(where[-depth:]) if name in repeated else name for where, name in pairs]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _full_model(models: Sequence[Subject]) -> Subject | None:
    full = [model for model in models if model.source is not None]
    wanted = {model.artifact.record.get("source_fingerprint") for model in models if model.artifact is not None}
    for model in full if len(full) > 1 else []:
        if model.source is not None and model.source.fingerprint() in wanted:
            return model
    return full[0] if full else None


def _check_vocabularies(models: Sequence[Subject]) -> None:
    for model in models[1:]:
        if model.vocabulary != models[0].vocabulary:
            raise UsageError(
                f"{model.path} has a vocabulary of {model.vocabulary} tokens and {models[0].path} one of "
                f"{models[0].vocabulary}: a report compares models of one vocabulary; leave one of them out"
            )


def check_tokenizers(loaded: Sequence[tuple[str, Any]]) -> None:
    """Refuse models whose tokenizers give other numbers to tokens; `loaded` are (path, tokenizer)."""
    first_path, first = loaded[0]
    expected = first.get_vocab()
    for path, tokenizer in loaded[1:]:
        if tokenizer.get_vocab() != expected:
            raise UsageError(
                f"{path} has another tokenizer than {first_path}, so they do not read the same text; leave one of them "
                "out, or give the full model that the checkpoints were made from"
            )
