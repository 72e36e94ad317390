"""Layers of a compressed model with a gain, 1 at first, for every number that is stored and may be tuned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbit.formats import get_format
from fewbit.formats.twinquant import TwinQuant
from fewbit.math.hadamard import rotate
from fewbit.math.straight_through import straight_through
from fewbit.pipeline.calibrate import full_precision
from fewbit.pipeline.jobs import Shard, tensor_signs
from fewbit.pipeline.plan import PlannedTensor


class GainLinear(nn.Module):
    """A linear with a fixed weight `[N, K]`, a learned gain per (row, group) `[N, G]` and one per bias."""

    def __init__(self, weight: torch.Tensor, groups: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.gain = nn.Parameter(torch.ones(weight.shape[0], groups))
        self.bias = bias
        self.bias_gain = None if bias is None else nn.Parameter(torch.ones_like(bias))

    @property
    def gains(self) -> dict[str, nn.Parameter]:
        """By the names of what is stored."""
        return {"scales": self.gain, **({} if self.bias_gain is None else {"bias": self.bias_gain})}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Scaled.apply(x, self.weight, self.gain)
        return y if self.bias is None or self.bias_gain is None else y + self.bias * self.bias_gain


class TwinGainLinear(nn.Module):
    """The same for a twinquant matrix, inputs and h quantized on the way: gains for the scales of `[R, V]` and of U,
    for the offset and for the bias. Gradients pass straight through the rounding."""

    def __init__(self, tensor: PlannedTensor, parts: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        spec = tensor.spec
        fmt = get_format("twinquant")
        assert spec is not None
        assert isinstance(fmt, TwinQuant)
        self.spec = spec
        self.signs = tensor_signs(tensor)
        found = fmt.components(parts, spec)
        self.both = torch.cat([found.residual, found.up], 1)
        self.down = found.down
        self.shift, self.offset, self.bias = parts["shift"].float(), parts["offset"], bias
        ones = {"scales": parts["scales"].shape, "offset": self.offset.shape}
        if spec.rank:
            ones["down_scales"] = parts["down_scales"].shape
        if bias is not None:
            ones["bias"] = bias.shape
        self.learned = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in ones.items()})

    @property
    def gains(self) -> dict[str, nn.Parameter]:
        return dict(self.learned.items())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec, gains = self.spec, self.learned
        with full_precision():
            x = x.float() - self.shift
            rotated = x if self.signs is None else rotate(x, self.signs, spec.block)
            seen = straight_through(rotated, spec.group, spec.act_bits)
        if spec.rank:
            h = _Scaled.apply(seen, self.down, gains["down_scales"]).float()
            seen = torch.cat([seen, straight_through(h, spec.group, spec.act_bits)], -1)
        y = _Scaled.apply(seen, self.both, gains["scales"]) + self.offset * gains["offset"]
        return y if self.bias is None else y + self.bias * gains["bias"]


def with_gains(tensor: PlannedTensor, shard: Shard, bias: torch.Tensor | None) -> GainLinear | TwinGainLinear:
    """The linear of a rounded tensor, with gains for everything that is stored of it as a number."""
    assert tensor.spec is not None
    if tensor.spec.format == "twinquant":
        return TwinGainLinear(tensor, shard.parts, bias)
    return GainLinear(shard.weight(tensor), tensor.spec.groups, bias)


class _Scaled(torch.autograd.Function):
    """The product with the scaled weight; a product of its own, because autograd would keep the scaled weight.

    Under autocast the way back is in bfloat16 too, and inputs are kept in it.
    """

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        context.save_for_backward(x, weight, gain)
        return nn.functional.linear(x, _scaled(weight, gain).to(x.dtype))

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x, weight, gain = context.saved_tensors
        out = gradients[0].reshape(-1, weight.shape[0]).to(x.dtype)
        to_input = (out @ _scaled(weight, gain).to(x.dtype)).view(x.shape)
        to_weight = (out.T @ x.reshape(-1, weight.shape[1])).to(weight.dtype)
        return to_input, None, to_weight.mul_(weight).view(*gain.shape, -1).sum(-1)


def _scaled(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return (weight.view(*gain.shape, -1) * gain[..., None]).view(weight.shape)


class Gain(nn.Module):
    """A parametrization: the stored tensor times a learned gain per channel."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones_like(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.gain
