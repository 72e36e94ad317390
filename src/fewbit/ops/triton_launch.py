"""From an operator's arguments to launches of Triton kernels: grids, tile sizes, workspaces, all from shapes alone.

Nothing here reads a tensor's values, waits for the device or allocates but through torch, so that launches can be
captured in CUDA graphs. The same launches are compiled without a device by `benchmarks/gpu_static.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from fewbit.ops import triton_linear, triton_rotate, triton_twin
from fewbit.ops.gpu_layouts import GpuMatrix
from fewbit.ops.triton_configs import Config, candidates, columns, splits


@dataclass(frozen=True)
class Launch:
    """One kernel with all that it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    def run(self) -> None:
        tensor = next(argument for argument in self.arguments.values() if isinstance(argument, torch.Tensor))
        # Triton launches on the current device, which need not be the one that the tensors are on.
        with torch.cuda.device_of(tensor):
            # Multiplications and additions are rounded one by one, as the specification has it.
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.config.warps,
                num_stages=self.config.stages,
                enable_fp_fusion=False,
            )


@dataclass(frozen=True)
class Rotation:
    """How inputs `[T, K]` become a product's: see `reference.rotate_quantize`."""

    signs: torch.Tensor | None
    block: int
    group: int
    bits: int
    shift: torch.Tensor | None

    def constants(self, short: bool) -> dict[str, Any]:
        return {
            "BITS": self.bits,
            "BLOCK": self.block,
            "G": self.group,
            "SPAN": max(self.block, self.group),
            "HAS_SIGNS": self.signs is not None,
            "HAS_SHIFT": self.shift is not None,
            "SHORT": short and self.shift is None,
            "NORMALIZED": float(torch.tensor(self.block, dtype=torch.float64).rsqrt().float()),
        }


@dataclass(frozen=True)
class Source:
    """What is rotated: `x`, or it after a norm with gain `weight`, or the activation `kind` of it times `up`."""

    x: torch.Tensor
    kind: str = "plain"
    up: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    eps: float = 0.0

    @property
    def short(self) -> bool:
        """Whether the values that are rotated have at most 11 significant bits."""
        return self.kind == "plain" and self.x.dtype != torch.float32


def rotate_quantize(
    source: Source,
    rotation: Rotation,
    out: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    config: Config | None = None,
) -> Launch:
    """Into `out`: q, scale and sums, or with 16 bits the rotated inputs alone."""
    tokens, cols = source.x.shape
    config = config or candidates("rotate", tokens)[0]
    span = max(rotation.block, rotation.group)
    tile = triton.next_power_of_2(span)
    size = max(config.tokens, 256 // tile)
    names = ("q", "scale", "sums")
    return Launch(
        triton_rotate.rotate_quantize_kernel,
        (cols // span, triton.cdiv(tokens, size)),
        {
            "x": source.x,
            "up": source.up,
            "weight": source.weight,
            "shift": rotation.shift,
            "signs": rotation.signs,
            **dict(zip(names, out, strict=True)),
            "T": tokens,
            "K": cols,
            "eps": source.eps,
        },
        {"KIND": source.kind, "TILE": tile, "TOKENS": size, **rotation.constants(source.short)},
        config,
    )


def _matrix_arguments(matrix: GpuMatrix, down: bool = False) -> dict[str, Any]:
    prefix = "down_" if down else ""
    words = matrix.codes.view(torch.int32)
    return {
        f"{prefix}codes": words,
        f"{prefix}scales": matrix.scales,
        "down_scale" if down else "tensor_scale": matrix.tensor_scale,
    }


def _strides(matrix: GpuMatrix, prefix: str = "") -> dict[str, int]:
    return {f"{prefix}row_stride": matrix.scales.stride(0), f"{prefix}group_stride": matrix.scales.stride(1)}


def packed_linear(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    matrix: GpuMatrix,
    bits: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> list[Launch]:
    """The product of quantized inputs into `out [T, N]`; where K is split, a second launch adds the parts in order."""
    q, scale, sums = inputs
    (tokens, cols), (rows, groups) = q.shape, matrix.scales.shape
    config = config or candidates("packed, iq3_s" if matrix.code == "iq3_s" else "packed", tokens)[0]
    group = cols // groups
    split, each = splits(tokens, rows, groups, config)
    target = out if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=q.device)
    launch = Launch(
        triton_linear.packed_kernel,
        (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), split),
        {
            "q": q,
            "scale": scale,
            "sums": sums,
            **_matrix_arguments(matrix),
            "tables": matrix.tables,
            "bias": bias if split == 1 else None,
            "out": target,
            "T": tokens,
            "N": rows,
            "K": cols,
            **_strides(matrix),
            "per_split": each,
        },
        {
            "CODE": matrix.code,
            "BITS": bits,
            "G": group,
            "BM": config.tokens,
            "BN": config.rows,
            "BK": 32 if matrix.code == "iq3_s" else columns(config.cols, group),
            "SPLIT": split,
            "HAS_BIAS": bias is not None and split == 1,
        },
        config,
    )
    return [launch] if split == 1 else [launch, _reduce(target, bias, out)]


def _reduce(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Launch:
    split, tokens, rows = parts.shape
    return Launch(
        triton_linear.reduce_kernel,
        (triton.cdiv(rows, 256), tokens),
        {"parts": parts, "bias": bias, "out": out, "T": tokens, "N": rows},
        {"SPLIT": split, "BN": 256, "HAS_BIAS": bias is not None},
        Config(1, 256, 0, 4, 1),
    )


def plain_linear(
    x: torch.Tensor,
    matrix: GpuMatrix,
    bits: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> Launch:
    """The product of rotated inputs of 16 bits `[T, K]` into `out [T, N]`."""
    (tokens, cols), (rows, groups) = x.shape, matrix.scales.shape
    config = config or candidates("plain", tokens)[0]
    return Launch(
        triton_linear.plain_kernel,
        (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens)),
        {
            "x": x,
            **_matrix_arguments(matrix),
            "tables": matrix.tables,
            "bias": bias,
            "out": out,
            "T": tokens,
            "N": rows,
            "K": cols,
            **_strides(matrix),
        },
        {
            "CODE": matrix.code,
            "BITS": bits,
            "G": cols // groups,
            "BM": config.tokens,
            "BN": config.rows,
            "BK": columns(config.cols, cols // groups),
            "HAS_BIAS": bias is not None,
        },
        config,
    )


def inverse_linear(
    x: torch.Tensor,
    matrix: GpuMatrix,
    bits: int,
    signs: torch.Tensor | None,
    block: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> Launch:
    """The product of plain inputs of 16 bits with weights that are turned back on chip, into `out [T, N]`."""
    (tokens, cols), (rows, groups) = x.shape, matrix.scales.shape
    config = config or candidates("inverse", tokens)[0]
    return Launch(
        triton_linear.inverse_kernel,
        (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens)),
        {
            "x": x,
            **_matrix_arguments(matrix),
            "tables": matrix.tables,
            "signs": signs,
            "bias": bias,
            "out": out,
            "T": tokens,
            "N": rows,
            "K": cols,
            **_strides(matrix),
        },
        {
            "CODE": matrix.code,
            "BITS": bits,
            "G": cols // groups,
            "BLOCK": block,
            "BM": config.tokens,
            "BN": config.rows,
            "NORMALIZED": block**-0.5,
            "HAS_SIGNS": signs is not None,
            "HAS_BIAS": bias is not None,
        },
        config,
    )


def folded(
    x: torch.Tensor,
    rotation: Rotation,
    down: GpuMatrix,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    config: Config | None = None,
) -> Launch:
    """Inputs rotated and quantized, and their quantized low-rank products behind them, into q, scale and sums."""
    (tokens, cols), rank = x.shape, down.scales.shape[0]
    config = config or candidates("folded", tokens)[0]
    constants = rotation.constants(x.dtype != torch.float32)
    return Launch(
        triton_twin.folded_kernel,
        (triton.cdiv(tokens, config.tokens),),
        {
            "x": x,
            "shift": rotation.shift,
            "signs": rotation.signs,
            **_matrix_arguments(down, down=True),
            **dict(zip(("q", "scale", "sums"), out, strict=True)),
            "T": tokens,
            "K": cols,
            "R": rank,
            **_strides(down),
        },
        {
            **constants,
            "TOKENS": config.tokens,
            "BR": triton.next_power_of_2(rank),
            "BK": columns(config.cols, rotation.group),
        },
        config,
    )


def twin_linear(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor,
    matrices: tuple[GpuMatrix, GpuMatrix],
    act_bits: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> Launch:
    """`[x~, h] [R, V]'` into `out [T, N]`, h computed on chip; `inputs` are q, scale and sums, or with 16 bits the
    rotated inputs; `matrices` are U and `[R, V]`."""
    down, both = matrices
    plain = isinstance(inputs, torch.Tensor)
    first = {"x": inputs} if plain else dict(zip(("q", "scale", "sums"), inputs, strict=True))
    (tokens, cols), (rows, _), rank = next(iter(first.values())).shape, both.scales.shape, down.scales.shape[0]
    config = config or candidates("twin", tokens)[0]
    group = cols // down.scales.shape[1]
    return Launch(
        triton_twin.twin_plain_kernel if plain else triton_twin.twin_kernel,
        (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens)),
        {
            **first,
            **_matrix_arguments(down, down=True),
            **_matrix_arguments(both),
            "bias": bias,
            "out": out,
            "T": tokens,
            "N": rows,
            "K": cols,
            "R": rank,
            **_strides(down, "down_"),
            **_strides(both),
        },
        {
            **({} if plain else {"BITS": act_bits}),
            "G": group,
            "BR": triton.next_power_of_2(rank),
            "BM": config.tokens,
            "BN": config.rows,
            "BK": columns(config.cols, group),
            "HAS_BIAS": bias is not None,
        },
        config,
    )
