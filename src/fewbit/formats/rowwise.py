"""What formats share whose stored parts have one row per output row and nothing across rows.

Such parts are joined along the inputs, and any rows of them decode by themselves.
"""

from __future__ import annotations

from fewbit.formats.base import EncodedGroup, GroupFormat, TensorSpec
from fewbit.torch_later import torch


class RowwiseFormat(GroupFormat):
    """A format whose parts are all `[N, ...]`, but for those named in `shared`, which every row needs."""

    shared: tuple[str, ...] = ()

    def assemble(self, groups: list[EncodedGroup], spec: TensorSpec, tensor_scale: float) -> dict[str, torch.Tensor]:
        names = [name for name in self.layout(spec) if name not in self.shared]
        return {name: torch.cat([group.parts[name] for group in groups], dim=1) for name in names}

    def dequantize_rows(self, parts: dict[str, torch.Tensor], spec: TensorSpec, rows: torch.Tensor) -> torch.Tensor:
        """Decodes only the rows asked for (int64 `[n]`): float32 `[n, cols]`."""
        chosen = {name: part if name in self.shared else part[rows] for name, part in parts.items()}
        return self.dequantize(chosen, spec)
