"""Registers fewbit with transformers at the moment transformers is imported, whichever comes first.

Importing transformers takes seconds, and most of fewbit's command line does not need it; so `import
fewbit` only leaves a note here.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TRIGGER = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Finds the trigger module as usual, and registers fewbit once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    # The module registers itself; where it is what imports transformers, it is on its way there already.
    importlib.import_module("fewbit.integrations.transformers")


def register_with_transformers() -> None:
    """Register now where transformers is imported already, otherwise as soon as it is."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfter())
