"""Perplexity of a model on a text, and how far its predictions are from a reference model's.

Text is cut into windows that do not overlap; every token of a window but the first is predicted from the
ones before it. Models run in their own dtype, one window at a time, and no logits outlive their window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fewbit.errors import UsageError
from fewbit.evaluate.divergence import PositionLosses, position_losses
from fewbit.evaluate.windows import adds_bos, windows

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids int64 `[1, window]` to logits `[1, window, vocabulary]`."""


@dataclass(frozen=True)
class EvalResult:
    """What one model scores on one text.

    Standard errors come from the spread of means over windows, those of perplexities by the delta method; None from a
    single window. `kl_mean` and `kl_p99` are KL(reference || model) in nats over all predicted positions,
    `top1_agreement` is the share of them where both models rank the same token first, and `perplexity_ratio` is over
    the reference's perplexity, its error that of losses compared position by position; None without a reference.
    `bits_per_char` divides the total loss by the characters of the predicted tokens. `tokens` counts the tokens in all
    windows.
    """

    perplexity: float
    perplexity_stderr: float | None
    perplexity_ratio: float | None
    perplexity_ratio_stderr: float | None
    kl_mean: float | None
    kl_stderr: float | None
    kl_p99: float | None
    top1_agreement: float | None
    bits_per_char: float
    tokens: int
    window: int
    stride: int
    bos: bool
    text_sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: torch.nn.Module | Logits,
    tokenizer: Any,
    text: str,
    reference: torch.nn.Module | Logits | None = None,
    **settings: Any,
) -> EvalResult:
    """Evaluate one model; arguments, settings and errors are those of `evaluate_many`."""
    return evaluate_many({"model": model}, tokenizer, text, reference, **settings)["model"]


@torch.inference_mode()
def evaluate_many(
    models: Mapping[str, torch.nn.Module | Logits],
    tokenizer: Any,
    text: str,
    reference: torch.nn.Module | Logits | None = None,
    *,
    window: int = 512,
    tokens: int = 20480,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, EvalResult]:
    """Evaluate several models against one run of the reference.

    Models are transformers modules or plain functions from ids to logits. `bos` starts every window with
    that token (None: when the tokenizer does so by itself). `progress` is called with (windows done,
    windows in all). Raises `UsageError` for a text shorter than one window or differing vocabularies.
    """
    cuts = windows(tokenizer, text, window, tokens, bos)
    losses: dict[str, list[PositionLosses]] = {name: [] for name in models}
    for number, ids in enumerate(cuts):
        if progress is not None:
            progress(number, len(cuts))
        expected = None if reference is None else _run(reference, ids)
        for name, model in models.items():
            # The reference itself need not run twice.
            found = expected if model is reference and expected is not None else _run(model, ids)
            losses[name].append(position_losses(found, ids[1:], expected))
    if progress is not None:
        progress(len(cuts), len(cuts))
    with_bos = adds_bos(tokenizer) if bos is None else bos
    facts = {
        "tokens": cuts.numel(),
        "window": window,
        "stride": window,
        "bos": with_bos,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    characters = _characters(tokenizer, cuts)
    return {name: _summary(parts, characters, facts) for name, parts in losses.items()}


def _run(model: torch.nn.Module | Logits, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[window - 1, vocabulary]` of the positions whose next token is known."""
    if isinstance(model, torch.nn.Module):
        device = next(model.parameters()).device
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits
    else:
        logits = model(ids[None])
    if not torch.isfinite(logits[0, -1]).all():
        raise UsageError("the logits hold NaN or infinity; the model is damaged, or its dtype too narrow: use float32")
    return logits[0, :-1].cpu()


def _characters(tokenizer: Any, cuts: torch.Tensor) -> int:
    """Characters of all predicted tokens, behind the first of each window: alone, some tokenizers leave out the space
    that a text's first token begins with."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole, first = (tokenizer.batch_decode(ids, **options) for ids in (cuts, cuts[:, :1]))
    return max(1, sum(map(len, whole)) - sum(map(len, first)))


def _summary(parts: list[PositionLosses], characters: int, facts: dict[str, Any]) -> EvalResult:
    nll = torch.stack([part.nll for part in parts]).double()
    perplexity, ratio = math.exp(nll.mean()), None
    divergence = [part.divergence for part in parts if part.divergence is not None]
    agreement = [part.agreement for part in parts if part.agreement is not None]
    excess = [part.excess for part in parts if part.excess is not None]
    nats = torch.stack(divergence).double() if divergence else None
    if excess:
        ratio = math.exp(torch.stack(excess).double().mean())
    return EvalResult(
        perplexity=perplexity,
        perplexity_stderr=_stderr(nll, perplexity),
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=None if ratio is None else _stderr(torch.stack(excess).double(), ratio),
        kl_mean=None if nats is None else nats.mean().item(),
        kl_stderr=None if nats is None else _stderr(nats, 1.0),
        kl_p99=None if nats is None else nats.flatten().sort().values[int(0.99 * (nats.numel() - 1))].item(),
        top1_agreement=torch.cat(agreement).mean().item() if agreement else None,
        bits_per_char=nll.sum().item() / math.log(2) / characters,
        **facts,
    )


def _stderr(values: torch.Tensor, factor: float) -> float | None:
    """`factor` times the standard error of the mean of `values [windows, positions]`; None for one window."""
    windows = values.shape[0]
    return factor * (values.mean(1).std() / windows**0.5).item() if windows > 1 else None
