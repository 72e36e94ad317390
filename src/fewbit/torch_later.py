"""torch for modules that must not import it: it is imported when something of it is first asked for.

Importing torch takes a second and 200 MB, and whoever runs a packed checkpoint needs none of it. Formats say in one
place how a matrix is stored and how it is computed; with this the first half is to be had without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            # The first half is what torch.compile can look through.
            return getattr(sys.modules.get("torch") or importlib.import_module("torch"), name)

    torch = _Torch()
