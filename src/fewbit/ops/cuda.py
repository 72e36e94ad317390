"""The operators on NVIDIA graphics processors, by Triton; `register` enters them for the device "cuda".

Integers are the specification's. Rotated inputs come from tensor cores and may differ from it in the last bits, so that
an integer close to the middle between two may be the other one; where K is split, sums are added in another order.
"""

from __future__ import annotations

from typing import Any

import torch

from fewbit.ops import schemas, triton_launch
from fewbit.ops.gpu_layouts import GpuMatrix, tile_tables
from fewbit.ops.layouts import from_lanes
from fewbit.ops.triton_configs import folds
from fewbit.ops.triton_launch import Rotation, Source

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rotate_quantize(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> Inputs:
    """See `reference.rotate_quantize`; `ValueError` for arguments that do not fit."""
    schemas.require(x.dim() == 2, f"x must be [T, K], not {list(x.shape)}")
    schemas.check_rotation(x.shape[1], x.dtype, signs, block, group, bits, shift)
    return _quantize(Source(x.contiguous()), Rotation(signs, block, group, bits, shift))


def rms_norm_rotate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> Inputs:
    """See `reference.rms_norm_rotate_quantize`; `ValueError` for arguments that do not fit."""
    schemas.check_norm(x, weight, eps)
    schemas.check_rotation(x.shape[1], x.dtype, signs, block, group, bits, shift)
    source = Source(x.contiguous(), "norm", weight=weight.contiguous(), eps=eps)
    return _quantize(source, Rotation(signs, block, group, bits, shift))


def gated_rotate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> Inputs:
    """See `reference.gated_rotate_quantize`; `ValueError` for arguments that do not fit."""
    schemas.check_gate(gate, up, activation)
    schemas.check_rotation(gate.shape[1], gate.dtype, signs, block, group, bits, shift, "gate")
    source = Source(gate.contiguous(), activation, up=up.contiguous())
    return _quantize(source, Rotation(signs, block, group, bits, shift))


def _quantize(source: Source, rotation: Rotation) -> Inputs:
    found = schemas.empty_quantized(source.x, rotation.group)
    if source.x.shape[0]:
        triton_launch.rotate_quantize(source, rotation, found).run()
    return found


def _rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotated inputs of 16 bits; float32 becomes bfloat16."""
    out = torch.empty_like(x, dtype=torch.bfloat16 if x.dtype == torch.float32 else x.dtype)
    if x.shape[0]:
        triton_launch.rotate_quantize(Source(x), rotation, (out, None, None)).run()
    return out


def gpu_matrix(
    cols: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    bits: int,
    code: str,
) -> GpuMatrix:
    """An operator's matrix of `cols` inputs as kernels take it. What was placed at load passes through; a stored
    trellis needs its sums first, which is quick, and lanes are put back in order, which is not."""
    if code == "lanes":
        row_groups = -(-scales.shape[0] // schemas.ROW_GROUP)
        codes, code = from_lanes(codes, row_groups, cols, bits), "trellis"
    if code == "trellis":
        assert tables is not None
        tables, code = tile_tables(tables), "tiles"
    return GpuMatrix(codes.contiguous(), scales, tensor_scale, tables, code)


def packed_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    code: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `reference.packed_linear`; `ValueError` for arguments that do not fit."""
    schemas.check_packed((q, scale, sums), (codes, scales, tensor_scale, tables), bias, bits, code, dtype)
    matrix = gpu_matrix(q.shape[1], codes, scales, tensor_scale, tables, bits, code)
    return _product((q.contiguous(), scale.contiguous(), sums.contiguous()), matrix, bits, bias, dtype)


def _product(
    inputs: Inputs, matrix: GpuMatrix, bits: int, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = inputs[0].new_empty((inputs[0].shape[0], matrix.scales.shape[0]), dtype=dtype)
    if out.numel():
        for launch in triton_launch.packed_linear(inputs, matrix, bits, bias, out):
            launch.run()
    return out


def linears(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    tensor_scale: list[torch.Tensor],
    tables: list[torch.Tensor | None],
    signs: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    bits: list[int],
    block: int,
    code: str = "trellis",
    act_bits: int = 8,
    shift: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """See `reference.linears`; `ValueError` for arguments that do not fit. 16 bits are for the trellis and int4."""
    lists = (codes, scales, tensor_scale, tables, bias, bits)
    matrices = schemas.checked_matrices(x, lists, signs, block, code, act_bits, shift)
    cols = x.shape[-1]
    rows = x.reshape(-1, cols).contiguous()
    inputs: dict[int, Any] = {}  # by scale group: matrices that share one share their inputs
    outs = []
    for c, s, t, table, b, width in matrices:
        matrix, group = gpu_matrix(cols, c, s, t, table, width, code), cols // s.shape[1]
        rotation = Rotation(signs, block, group, act_bits, shift)
        if group not in inputs:
            whole = act_bits == schemas.PLAIN
            inputs[group] = _rotate(rows, rotation) if whole else _quantize(Source(rows), rotation)
        if act_bits == schemas.PLAIN:
            out = _plain_product(inputs[group], matrix, width, b, x.dtype)
        else:
            out = _product(inputs[group], matrix, width, b, x.dtype)
        outs.append(out.view(*x.shape[:-1], s.shape[0]))
    return outs


linear = schemas.linear_of(linears)


def _plain_product(
    x: torch.Tensor, matrix: GpuMatrix, bits: int, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    schemas.require(matrix.code not in ("ternary", "iq3_s"), f"{matrix.code} takes inputs of 8 or 4 bits")
    out = x.new_empty((x.shape[0], matrix.scales.shape[0]), dtype=dtype)
    if out.numel():
        triton_launch.plain_linear(x, matrix, bits, bias, out).run()
    return out


def linear_inverse(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    signs: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    code: str = "trellis",
) -> torch.Tensor:
    """See `reference.linear_inverse`; `ValueError` for arguments that do not fit. Float32 inputs become bfloat16."""
    parts = (codes, scales, tensor_scale, tables)
    schemas.check_weights(x.shape[-1], *parts, bias, bits, code)
    schemas.check_inputs_of(x, signs, block, scales.shape[1], schemas.PLAIN, None)
    group = x.shape[-1] // scales.shape[1]
    schemas.require(
        block > 1 and group % block == 0,
        f"the weight-side transform needs whole blocks of {block} in a scale group of {group}",
    )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    rows = rows.bfloat16() if rows.dtype == torch.float32 else rows
    out = rows.new_empty((rows.shape[0], scales.shape[0]), dtype=x.dtype)
    if out.numel():
        matrix = gpu_matrix(x.shape[-1], *parts, bits, code)
        triton_launch.inverse_linear(rows, matrix, bits, signs, block, bias, out).run()
    return out.view(*x.shape[:-1], scales.shape[0])


def twin_linear(
    x: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    signs: torch.Tensor | None,
    bias: torch.Tensor | None,
    block: int,
    act_bits: int = 8,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.twin_linear`; `ValueError` for arguments that do not fit."""
    down, both = (down_codes, down_scales, down_scale), (codes, scales, tensor_scale)
    cols, rank = x.shape[-1], down_scales.shape[0]
    schemas.check_twin(cols, down, both, bias)
    schemas.check_inputs_of(x, signs, block, down_scales.shape[1], act_bits, shift)
    rows = x.reshape(-1, cols).contiguous()
    matrices = gpu_matrix(cols, *down, None, 4, "nibbles"), gpu_matrix(cols + rank, *both, None, 4, "nibbles")
    rotation = Rotation(signs, block, cols // down_scales.shape[1], act_bits, shift)
    size = rotation.group
    schemas.require(size & (size - 1) == 0, f"the fused product needs scale groups of a power of two, not {size}")
    fold = folds(rows.shape[0], scales.shape[0], cols, rank, act_bits)
    return twin_product(rows, matrices, rotation, bias, x.dtype, fold).view(*x.shape[:-1], scales.shape[0])


def twin_product(
    x: torch.Tensor,
    matrices: tuple[GpuMatrix, GpuMatrix],
    rotation: Rotation,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fold: bool,
) -> torch.Tensor:
    """U and `[R, V]` times inputs `[T, K]`: h in the quantizing kernel (`fold`), or in every column tile."""
    down, both = matrices
    tokens, cols = x.shape
    out = x.new_empty((tokens, both.scales.shape[0]), dtype=dtype)
    if not out.numel():
        return out
    if fold:
        joined = schemas.empty_quantized(x.new_empty(tokens, cols + down.scales.shape[0]), rotation.group)
        triton_launch.folded(x, rotation, down, joined).run()
        return _product(joined, both, 4, bias, dtype)
    whole = rotation.bits == schemas.PLAIN
    inputs = _rotate(x, rotation) if whole else _quantize(Source(x), rotation)
    triton_launch.twin_linear(inputs, matrices, rotation.bits, bias, out).run()
    return out


def register() -> None:
    """Enter the kernels for tensors on CUDA devices; a second call would be refused by torch."""
    for name, kernel in KERNELS.items():
        torch.library.impl(f"fewbit::{name}", "CUDA")(kernel)


KERNELS: dict[str, Any] = {
    "rotate_quantize": rotate_quantize,
    "rms_norm_rotate_quantize": rms_norm_rotate_quantize,
    "gated_rotate_quantize": gated_rotate_quantize,
    "packed_linear": packed_linear,
    "linear": linear,
    "linears": linears,
    "linear_inverse": linear_inverse,
    "twin_linear": twin_linear,
}
