"""Reads tensors of safetensors files as numpy arrays, all of one or a piece."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fewbit.dtypes import NAMES, numpy_dtype
from fewbit.errors import CorruptFile

MAX_HEADER = 100_000_000
"""Bytes that the header of a safetensors or GGUF file may take."""


class SafetensorsFile:
    """Reads pieces of a safetensors file.

    The library would map it; pages of a mapped file count as this process's memory, the whole model in the end, and
    one that is cut off while it is mapped ends the process without a word.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # A link may lead to a device or a pipe, which never ends.
        if not path.is_file():
            raise CorruptFile(f"{path} is missing, or no plain file; download it again")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise CorruptFile(f"{path}: header of {size} bytes, allowed are {MAX_HEADER}; the file is damaged")
            try:
                # The library checks that the header and the file fit together.
                with safe_open(path, framework="numpy"):
                    header = json.loads(file.read(size))
            except (SafetensorError, OSError, ValueError) as error:
                raise self._damaged(error) from error
        header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        """Dtype, shape and place in the file."""
        for name, entry in header.items():
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            # Of two entries of one name the library may have looked at the other.
            if dtype in NAMES and stop - start != math.prod(shape) * numpy_dtype(dtype).itemsize:
                raise self._damaged(ValueError(f"the place of {name} does not fit its shape"))
            self.tensors[name] = (dtype, shape, 8 + size + start)

    def _damaged(self, error: Exception) -> CorruptFile:
        return CorruptFile(f"{self.path}: {first_line(error)}; the file is cut off or damaged, download it again")

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """`count` numbers of a tensor from the number `first` on, `[count]`; by default all of it, in its own shape.

        The array is new and of the stored dtype, bfloat16 as its bits uint16.
        """
        dtype, shape, _ = self.tensors[name]
        if dtype not in NAMES:
            raise CorruptFile(f"{self.path}: {name} has dtype {dtype}; known are {', '.join(NAMES)}")
        numbers = np.empty(shape if count is None else count, numpy_dtype(dtype))
        self.read_into(numbers, name, first)
        return numbers

    def read_into(self, numbers: np.ndarray, name: str, first: int = 0) -> None:
        """Fill a contiguous array of the stored dtype with a tensor's numbers from the number `first` on."""
        left = numbers.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.tensors[name][2] + first * numbers.itemsize)
                while left:
                    done = file.readinto(left)
                    if not done:
                        raise OSError(f"{name} ends too early")
                    left = left[done:]
        except OSError as error:
            raise self._damaged(error) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
