"""Number types by the names that safetensors gives them, and what they are to numpy and to torch.

numpy has no bfloat16; its numbers are held as their bits, uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbit.torch_later import torch

# Widest first, the order in which the safetensors library writes tensors.
_TORCH_NAMES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES = tuple(_TORCH_NAMES)
FLOATS = ("F64", "F32", "F16", "BF16")
_NUMPY = {name: np.dtype(np.uint16 if name == "BF16" else known) for name, known in _TORCH_NAMES.items()}
_OF_TORCH = {f"torch.{known}": name for name, known in _TORCH_NAMES.items()}
_NAN = 0x7FC0


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's type for numbers of a type; `KeyError` for one that is not known here."""
    return _NUMPY[name]


def torch_dtype(name: str) -> torch.dtype:
    """torch's type of that name; `KeyError` for one that is not known here."""
    found: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return found


def name_of(dtype: torch.dtype) -> str:
    """The name of a type of torch; `KeyError` for one that has none here."""
    return _OF_TORCH[str(dtype)]


def to_float32(numbers: np.ndarray, name: str) -> np.ndarray:
    """Stored numbers of a type as float32, of the same shape; a view where they are float32 already."""
    if name == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32, copy=False)


def to_bfloat16(numbers: np.ndarray, name: str) -> np.ndarray:
    """Stored numbers of a type rounded to the nearest bfloat16, ties to even, as bits uint16 of the same shape."""
    if name == "BF16":
        return numbers
    values = numbers.astype(np.float32, copy=False)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_NAN), rounded)
