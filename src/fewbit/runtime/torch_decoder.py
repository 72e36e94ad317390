"""A decoder over a transformers model: one cache per slot, one call per sequence and step.

It runs every family that transformers runs, and slowly; programs of native steps take its place for those they know.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import USUAL_CONTEXT, longest_context


class TorchDecoder:
    """The `Decoder` protocol over a causal transformers model in evaluation mode.

    Sequences of a batch run one after the other, so that a result depends on nothing but its own sequence and on how
    that was cut into forwards (products of different heights may round differently).
    """

    def __init__(
        self, model: Any, slots: int = 1, context: int | None = None, block: int = 256, eos: tuple[int, ...] = ()
    ) -> None:
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        most = min(longest_context(config) or USUAL_CONTEXT, USUAL_CONTEXT)
        self.context = most if context is None else context
        self.slots = slots
        self.block = block
        self.eos = eos
        self._model = model
        # Made without the configuration, a cache keeps all positions of sliding layers, so that it can be cut anywhere.
        self._caches = [DynamicCache() for _ in range(slots)]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray:
        """See `Decoder.forward`; `ValueError` for a position beyond what its slot holds."""
        if batch.tokens.size > self.block:
            raise ValueError(f"{batch.tokens.size} tokens are more than a block of {self.block}")
        rows = []
        wanted = torch.from_numpy(batch.wanted).long()
        slots, lengths = torch.unique_consecutive(torch.from_numpy(batch.slots), return_counts=True)
        start = 0
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            inside = wanted[(wanted >= start) & (wanted < start + length)] - start
            logits = self._extend(slot, batch, slice(start, start + length), inside)
            if inside.numel():
                rows.append(logits)
            start += length
        return torch.cat(rows).numpy() if rows else np.empty((0, self.vocabulary), np.float32)

    def _extend(self, slot: int, batch: Batch, piece: slice, wanted: torch.Tensor) -> torch.Tensor:
        """Run one sequence's tokens; logits float32 of the wanted ones (of the last one if none is)."""
        cache = self._caches[slot]
        positions = torch.from_numpy(batch.positions[piece]).long()
        first = int(positions[0])
        if first > cache.get_seq_length():
            raise ValueError(f"slot {slot} holds {cache.get_seq_length()} positions; {first} cannot be written yet")
        _cut(cache, first)
        output = self._model(
            input_ids=torch.from_numpy(batch.tokens[piece]).long()[None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=wanted if wanted.numel() else 1,
        )
        return output.logits[0].float()

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder.copy`."""
        self._caches[target] = copy.deepcopy(self._caches[source])
        _cut(self._caches[target], length)

    def close(self) -> None:
        """Let go of the model and the caches."""
        self._model = None
        self._caches = []


def _cut(cache: Any, length: int) -> None:
    """Drop what a cache holds at `length` and above."""
    for layer in cache.layers:
        if layer.keys is not None and layer.keys.shape[-2] > length:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
