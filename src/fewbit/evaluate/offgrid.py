"""Moves a model's weights off a quantization grid without changing what the model computes.

Models that come out of quantized files have weights that already lie on a 4-bit grid, and rounding to 4
bits then looks free of loss. Turning the residual stream by a small rotation mends that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.plain import load_plain, write_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import UsageError
from fewbit.models import Family, get_family

_ROWS = 8192
"""Rows of a table that are held in float64 at a time."""


def small_rotation(size: int, angle: float, seed: int) -> torch.Tensor:
    """A reproducible orthogonal matrix, float64 `[size, size]`: expm of a random skew matrix.

    Its rows have norm `angle` (radians) on average, so a channel keeps about cos(angle) of itself and
    outlier channels stay outliers, which a full random rotation would hide.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.matrix_exp((noise - noise.T) * (angle / (2 * size) ** 0.5))


@torch.no_grad()
def off_grid(model: Any, angle: float = 0.3, seed: int = 0) -> Any:
    """Rotate the residual stream of a transformers model in place, and return the model.

    With Q the rotation: each norm's gain g is fused into the linears it feeds, `W -> W diag(g) Q`; the
    embedding becomes `E Q` and what writes to the stream `Q' W`. A new gain `sqrt((Q*Q)' g^2)`, which is
    what becomes of the old one's energy, is then split off again so that columns keep their norms. A tied
    head is untied. Raises `UsageError` for mixtures of experts and for families whose norms do not all commute with
    a rotation.
    """
    family = get_family(model.config.model_type)
    if family.experts is not None:
        raise UsageError(f"models of type '{model.config.model_type}' have experts, which are not taken off the grid")
    rotation = small_rotation(model.config.hidden_size, angle, seed)
    _check_norms(model, family)
    embed, head = model.get_submodule(family.embed), model.get_submodule(family.head)
    if head.weight is embed.weight:
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=embed.weight.requires_grad)
        model.config.tie_word_embeddings = False
    _scale_and_turn(embed, None, rotation, None)
    for layer in model.get_submodule(family.layers):
        for shared in family.inputs:
            linears = [layer.get_submodule(name) for name in shared.linears]
            if shared.norm is not None:
                _turn_input(layer.get_submodule(shared.norm), linears, rotation)
            if shared.writes_residual:
                for linear in linears:
                    _turn_output(linear, rotation)
    _turn_input(model.get_submodule(family.final_norm), [head], rotation)
    return model


def write_off_grid(
    source_path: str | Path, out_dir: str | Path, angle: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float16
) -> None:
    """Write a plain Hugging Face directory with the off-grid form of a model.

    float16 by default: its three further bits of mantissa make the stored model a closer copy than bfloat16.
    """
    source = open_source(source_path)
    model = off_grid(load_plain(source, torch.float32), angle, seed)
    source.copy_tokenizer(out_dir)
    write_plain(out_dir, model.config, model.state_dict().items(), dtype)


def _check_norms(model: Any, family: Family) -> None:
    """Refuse models with a norm on the residual stream that no linear absorbs (Gemma's post-norms)."""
    size = model.get_submodule(family.embed).weight.shape[1]
    layers = list(model.get_submodule(family.layers).named_children())
    known = {family.final_norm}
    for number, _ in layers:
        known.update(f"{family.layers}.{number}.{shared.norm}" for shared in family.inputs if shared.norm)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") and parameter.numel() == size and name.removesuffix(".weight") not in known:
            raise UsageError(f"{name}: a gain that feeds no linear cannot be rotated; this family has no off-grid form")


def _turn_input(norm: Any, linears: Iterable[Any], rotation: torch.Tensor) -> None:
    """Rotate what `linears` read, and split off the gain that `norm` keeps."""
    old = norm.weight.double()
    # Dividing by the old gain instead would blow up the columns of channels with a small one.
    new = ((rotation * rotation).T @ (old * old)).sqrt()
    for linear in linears:
        _scale_and_turn(linear, old, rotation, new)
    norm.weight.copy_(new)


def _scale_and_turn(
    module: Any, gain: torch.Tensor | None, rotation: torch.Tensor, divisor: torch.Tensor | None
) -> None:
    """`W -> W diag(gain) Q diag(1 / divisor)` in float64, some rows at a time."""
    for rows in module.weight.split(_ROWS):
        turned = (rows.double() if gain is None else rows.double() * gain) @ rotation
        rows.copy_(turned if divisor is None else turned / divisor)


def _turn_output(linear: Any, rotation: torch.Tensor) -> None:
    linear.weight.copy_(rotation.T @ linear.weight.double())
    if linear.bias is not None:
        linear.bias.copy_(rotation.T @ linear.bias.double())
