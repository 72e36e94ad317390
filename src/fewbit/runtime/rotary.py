"""Tables of rotary positions, as transformers computes them: the common types in numpy, others by its own code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fewbit.errors import CannotLower

LENGTH_DEPENDENT = ("dynamic", "longrope")  # frequencies that change with the length of the text


def rotary_tables(config: Any, kind: str, head_dim: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines float32 `[context, head_dim / 2]` of the layers of a kind, as transformers has them.

    Raises `CannotLower` for positions that have no native step.
    """
    parameters = config.rope_parameters
    if parameters is None:
        raise CannotLower("a model without rotary positions has no native steps")
    by_kind = kind in parameters
    own = parameters[kind] if by_kind else parameters
    rope_type = own["rope_type"]
    if rope_type in LENGTH_DEPENDENT or own.get("partial_rotary_factor", 1.0) != 1.0:
        raise CannotLower(f"rotary positions of the type {rope_type} have no native step")
    scaling = 1.0
    if rope_type in FREQUENCIES:
        frequencies = FREQUENCIES[rope_type](own, head_dim)
    else:
        from torch import device
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        more = {"layer_type": kind} if by_kind else {}
        found, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, device("cpu"), **more)
        frequencies = found.float().numpy()
    # The product is rounded to float32, as transformers has it, and the functions of that number are exact.
    angles = (np.arange(context, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return _scaled(np.cos(angles), scaling), _scaled(np.sin(angles), scaling)


def _scaled(values: np.ndarray, scaling: float) -> np.ndarray:
    return values.astype(np.float32) * np.float32(scaling)


def _plain(own: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """`theta^(-2 i / head_dim)`, float32 `[head_dim / 2]`."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(float(own["rope_theta"]), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


def _linear(own: Mapping[str, Any], head_dim: int) -> np.ndarray:
    return _plain(own, head_dim) / np.float32(own.get("factor", 1.0))


def _llama3(own: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Low frequencies are divided by a factor, high ones stay, and those between are a mixture."""
    factor, low, high = (np.float32(own[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = np.float32(own["original_max_position_embeddings"])
    plain = _plain(own, head_dim)
    waves = np.float32(2 * math.pi) / plain
    slow, fast = waves > length / low, waves < length / high
    found = np.where(slow, plain / factor, plain)
    smooth = (length / waves - low) / (high - low)
    mixed = (1 - smooth) * found / factor + smooth * found
    return np.where(slow | fast, found, mixed)


FREQUENCIES: dict[str, Callable[[Mapping[str, Any], int], np.ndarray]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
}
