"""PyTorch's own products of 8-bit and 4-bit weights on a CPU, in the place of a model's linears.

They are called as they are, without a compiler; torchao's 4-bit weights for CPUs end in the same operator. Inputs stay
in bfloat16. Weights are rounded to nearest: speed does not depend on how well they are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

GROUPS = (128, 64, 32)
"""What a scale of 4-bit weights may be shared by; the first one that divides a linear's inputs is taken."""


class Packed(nn.Module):
    """A linear `[N, K]` in 8 bits with a scale per row, or in 4 with one per group. Inputs and outputs bfloat16."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        rows, cols = weight.shape
        self.bias, self.group = linear.bias, 0
        if bits == 4:
            self.group = next(group for group in GROUPS if cols % group == 0)
        values = weight.view(rows, -1, self.group or cols)
        scales = (values.abs().amax(-1) / (2 ** (bits - 1) - 1)).clamp_min(1e-12)
        codes = (values / scales[..., None]).round().view(rows, cols)
        if bits == 4:
            # Unsigned, with the middle as zero; the second argument counts for GPUs alone.
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 2)
            self.scales = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()
        else:
            self.codes, self.scales = codes.to(torch.int8), scales.view(rows).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.group:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, self.group, self.scales)
        else:
            out = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.scales)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


def packed(model: Any, bits: int) -> Any:
    """`model`, in bfloat16, with its linears in `bits`, the head too; in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Packed(module, bits))
    return model
