"""Mixtures of experts with one linear per matrix, where transformers holds all experts in one parameter.

Calibration hooks linears, quantization replaces them and tuning scales them, so all three want experts apart;
routing stays the family's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbit.models import Family


class Expert(nn.Module):
    """One gated feed-forward network, `[tokens, H]` to `[tokens, H]`."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj: nn.Module = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.up_proj: nn.Module = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.down_proj: nn.Module = nn.Linear(inner, hidden, bias=False, dtype=dtype)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SeparateExperts(nn.ModuleList):
    """Stands in for a transformers module with fused experts, and takes its arguments."""

    def __init__(self, fused: Any) -> None:
        """`fused` gives shapes, activation and dtype; its weights are copied unless they are on the meta device."""
        count, hidden, inner = fused.down_proj.shape
        weight = fused.down_proj
        with torch.device(weight.device):
            super().__init__(Expert(hidden, inner, fused.act_fn, weight.dtype) for _ in range(count))
        if weight.is_meta:
            return
        with torch.no_grad():
            experts: list[Any] = list(self)
            for expert, gate_up, down in zip(experts, fused.gate_up_proj, fused.down_proj, strict=True):
                expert.gate_proj.weight.copy_(gate_up[:inner])
                expert.up_proj.weight.copy_(gate_up[inner:])
                expert.down_proj.weight.copy_(down)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states `[tokens, H]`, the experts of each token and their weights, both `[tokens, k]`."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if token.numel():
                found = expert(hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, found.to(total.dtype))
        return total


def separate_experts(model: Any, family: Family) -> None:
    """Replace the fused experts of every layer that has some, in place."""
    if family.experts is None:
        return
    for layer in model.get_submodule(family.layers):
        try:
            fused = layer.get_submodule(family.experts.module)
        except AttributeError:
            continue
        if not isinstance(fused, SeparateExperts):
            layer.set_submodule(family.experts.module, SeparateExperts(fused))


def fuse_names(tensors: dict[str, torch.Tensor], family: Family | None) -> dict[str, torch.Tensor]:
    """A state dict with separate experts as the family's own modules want it; entries are taken out of `tensors`."""
    if family is None or family.experts is None:
        return tensors
    mark = f".{family.experts.module}."
    groups: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in [name for name in tensors if mark in name]:
        parent, _, rest = name.partition(mark)
        number, _, part = rest.partition(".")
        groups.setdefault(parent + mark, {}).setdefault(int(number), {})[part] = tensors.pop(name)
    for parent, found in groups.items():
        experts = [found[number] for number in sorted(found)]
        both = [torch.cat([expert["gate_proj.weight"], expert["up_proj.weight"]]) for expert in experts]
        tensors[f"{parent}gate_up_proj"] = torch.stack(both)
        tensors[f"{parent}down_proj"] = torch.stack([expert["down_proj.weight"] for expert in experts])
    return tensors
