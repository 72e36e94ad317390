"""Registers fewbit with other packages at the moment they are imported, whichever comes first.

Importing transformers takes seconds, and most of fewbit's command line does not need it; so `import
fewbit` only leaves a note here. PEFT may not be installed at all.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TRIGGERS = {
    "transformers.quantizers.auto": "fewbit.integrations.transformers",
    "peft.tuners.lora.model": "fewbit.integrations.peft",
}
"""By the module of a host that fewbit registers with: the module that does it when it is imported."""


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Finds one trigger module as usual, and registers fewbit once it has been executed."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # Where fewbit's module is what imports the host, it is on its way there already.
            importlib.import_module(TRIGGERS[fullname])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_hosts() -> None:
    """Register now with hosts that are imported already, and with others as soon as they are."""
    waiting = {finder.trigger for finder in sys.meta_path if isinstance(finder, _RegisterAfter)}
    for trigger, module in TRIGGERS.items():
        if trigger in sys.modules:
            importlib.import_module(module)
        elif trigger not in waiting:
            sys.meta_path.insert(0, _RegisterAfter(trigger))
