"""What one forward of a decoder works on: tokens of one or several sequences.

Nothing here knows how a decoder computes; schedulers and decoders meet at this type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Tokens, each with its place; tokens of one slot stand together, their positions ascending.

    `tokens` int32 `[T]` are token ids, `positions` int32 `[T]` the position of each in its sequence, `slots` int32
    `[T]` the cache slot of its sequence, and `wanted` int32 `[W]` ascending indices into T whose logits are wanted.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray
