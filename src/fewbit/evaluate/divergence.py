"""Per-position losses of one window: next-token loss, and divergence from reference logits.

Works through the positions in chunks, so that float32 copies of a large vocabulary's logits stay small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fewbit.errors import UsageError

CHUNK_VALUES = 1 << 23
"""Logits that are held as float32 at a time and per model (32 MB)."""


@dataclass
class PositionLosses:
    """Figures of every predicted position, float32 `[positions]`, in nats.

    `divergence` is KL(reference || model), `agreement` 1 where both rank the same token first, and `excess` by how
    much `nll` is above the reference's; all are None without a reference.
    """

    nll: torch.Tensor
    divergence: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    excess: torch.Tensor | None = None


def position_losses(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
) -> PositionLosses:
    """Compare `logits [positions, vocabulary]` with the true next tokens and with `reference` logits.

    `targets` is int64 `[positions]`. Raises `UsageError` when the two vocabularies differ in size.
    """
    if reference is not None and reference.shape != logits.shape:
        raise UsageError(
            f"the reference has a vocabulary of {reference.shape[-1]}, the model of {logits.shape[-1]}: "
            "a divergence is defined for one vocabulary; give the model that was quantized"
        )
    parts: list[tuple[torch.Tensor, ...]] = []
    for rows in _chunks(*logits.shape):
        scores = torch.log_softmax(logits[rows].float(), dim=-1)
        nll = -scores.gather(1, targets[rows, None]).squeeze(1)
        if reference is None:
            parts.append((nll,))
            continue
        expected = torch.log_softmax(reference[rows].float(), dim=-1)
        agreement = (scores.argmax(-1) == expected.argmax(-1)).float()
        divergence = torch.nn.functional.kl_div(scores, expected, reduction="none", log_target=True).sum(-1)
        parts.append((nll, divergence, agreement, nll + expected.gather(1, targets[rows, None]).squeeze(1)))
    return PositionLosses(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, CHUNK_VALUES // vocabulary)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))
