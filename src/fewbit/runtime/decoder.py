"""What every decoder offers.

A decoder holds a model and a cache of keys and values in slots, one sequence each. Positions are the caller's: a token
at (slot, p) writes its key and value at p and sees positions 0 to p of its slot, so that writing again at a lower
position is all it takes to drop tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fewbit.runtime.batch import Batch


class Decoder(Protocol):
    """A model with a cache of `slots` sequences of up to `context` positions.

    `block` is the most tokens of one forward, `vocabulary` the width of the logits and `eos` the tokens that end a text.
    A token's result does not depend on what else is in its batch.
    """

    vocabulary: int
    context: int
    slots: int
    block: int
    eos: tuple[int, ...]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 `[W, vocabulary]` of the wanted tokens, valid until the next forward."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's cache to another's."""

    def close(self) -> None:
        """Free the weights and the cache."""
