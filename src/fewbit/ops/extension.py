"""Finds the native extension, once, and says so plainly when there is none.

Everything in fewbit works without it, in pure torch and slowly; callers ask `load_native()` and take the
torch path on None.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

from fewbit.errors import UsageError

ISA_VARIABLE = "FEWBIT_ISA"


@functools.cache
def load_native() -> ModuleType | None:
    """The native module, or None after one RuntimeWarning if it was not built.

    The environment variable FEWBIT_ISA (portable, avx2, avxvnni, avx512, amx, or amx-emulated for tests) forces an
    instruction set; `UsageError` if this machine or build lacks it.
    """
    try:
        from fewbit import _native
    except ImportError as error:
        warnings.warn(
            f"fewbit's native extension is missing ({error}): running in pure torch, which gives the same results "
            "many times more slowly. Install a C++ compiler (g++ or clang) and reinstall fewbit to build it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            _native.select_isa(wanted)
        except ValueError as error:
            raise UsageError(f"{ISA_VARIABLE}={wanted}: {error}; unset {ISA_VARIABLE} to choose by itself") from None
    return _native


def has_native() -> bool:
    """Whether the native extension is there (warns once if not)."""
    return load_native() is not None
