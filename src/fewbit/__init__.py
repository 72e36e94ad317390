"""fewbit compresses language models to 3 and 4 bits and runs them fast.

`fewbit.quantize` makes a checkpoint, `fewbit.Engine` generates text with it, and `fewbit.load` gives it back as a
transformers model. Importing the package makes transformers and PEFT know the format.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewbit.integrations.on_import import register_with_hosts

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewbit.loading import load
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize
    from fewbit.runtime.engine import Engine
    from fewbit.runtime.sampling import SamplingParams

_PUBLIC = {
    "load": "fewbit.loading",
    "quantize": "fewbit.pipeline.run",
    "QuantizeOptions": "fewbit.pipeline.options",
    "Engine": "fewbit.runtime.engine",
    "SamplingParams": "fewbit.runtime.sampling",
}

__all__ = ["Engine", "QuantizeOptions", "SamplingParams", "__version__", "load", "quantize"]

register_with_hosts()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fewbit' has no attribute '{name}'")
