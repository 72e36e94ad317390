"""The weights of a full-precision model as native code takes them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from fewbit.checkpoint.source import Source
from fewbit.errors import UsageError
from fewbit.runtime.weights import PANEL, Dense, Weights


class PlainWeights(Weights):
    """A full-precision model, kept in bfloat16."""

    def __init__(self, native: ModuleType, source: Source) -> None:
        super().__init__(native)
        self.source, self.config = source, source.config
        self._names = set(source.names())

    def has(self, name: str) -> bool:
        return name in self._names

    def shape(self, module: str) -> tuple[int, ...]:
        return self.source.shape(f"{module}.weight")

    def vector(self, name: str) -> np.ndarray:
        # As `load_plain` rounds all parameters.
        found: np.ndarray = self.source.tensor(name).to(torch.bfloat16).float().numpy()
        return found

    def tokenizer(self) -> Any:
        try:
            return self.source.tokenizer()
        except UsageError:
            return None

    def _load(self, module: str) -> Dense:
        weight = self.source.tensor(f"{module}.weight")
        rows, cols = weight.shape
        panels = self.panels(rows, cols)
        # torch rounds and transposes in one pass, by all threads.
        memory = torch.from_numpy(panels).view(torch.bfloat16)
        whole = rows // PANEL
        memory[:whole] = weight[: whole * PANEL].view(whole, PANEL, cols).transpose(1, 2)
        if rows % PANEL:
            memory[whole, :, : rows % PANEL] = weight[whole * PANEL :].T
        return Dense(rows, cols, panels, self.maybe_vector(f"{module}.bias"))
