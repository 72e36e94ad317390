"""The operators' kernels: native code on the CPU, Triton on NVIDIA devices, the reference everywhere else.

Importing this module makes `torch.ops.fewbit` usable.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch

from fewbit.ops import reference, schemas
from fewbit.ops.extension import load_native
from fewbit.ops.schemas import FLOATS as FLOATS

NATIVE_FLOATS = (torch.float32, torch.bfloat16)
KERNEL_DEVICES = {"cpu"}  # types of the devices that the operators are fast on


def rotate_quantize(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.rotate_quantize`; `ValueError` for arguments that do not fit."""
    schemas.require(x.dim() == 2, f"x must be [T, K], not {list(x.shape)}")
    schemas.check_rotation(x.shape[1], x.dtype, signs, block, group, bits, shift)
    native = load_native()
    if native is None:
        return reference.rotate_quantize(x, signs, block, group, bits, shift)
    found = schemas.empty_quantized(x, group)
    native.rotate_quantize(_floats(x), _contiguous(signs), block, group, bits, *found, _shift(shift))
    return found


def rms_norm_rotate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.rms_norm_rotate_quantize`; `ValueError` for arguments that do not fit."""
    schemas.check_norm(x, weight, eps)
    schemas.check_rotation(x.shape[1], x.dtype, signs, block, group, bits, shift)
    native = load_native()
    if native is None:
        return reference.rms_norm_rotate_quantize(x, weight, eps, signs, block, group, bits, shift)
    found = schemas.empty_quantized(x, group)
    native.rms_norm_rotate_quantize(
        _floats(x), weight.float().contiguous(), eps, _contiguous(signs), block, group, bits, *found, _shift(shift)
    )
    return found


def gated_rotate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.gated_rotate_quantize`; `ValueError` for arguments that do not fit."""
    schemas.check_gate(gate, up, activation)
    schemas.check_rotation(gate.shape[1], gate.dtype, signs, block, group, bits, shift, "gate")
    native = load_native()
    if native is None:
        return reference.gated_rotate_quantize(gate, up, activation, signs, block, group, bits, shift)
    found = schemas.empty_quantized(gate, group)
    native.gated_rotate_quantize(
        _floats(gate), _floats(up), activation, _contiguous(signs), block, group, bits, *found, _shift(shift)
    )
    return found


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
    native = _native_for(code)
    if native is None:
        return reference.packed_linear(q, scale, sums, codes, scales, tensor_scale, tables, bias, bits, code, dtype)
    out = torch.empty(q.shape[0], scales.shape[0], dtype=dtype if dtype in NATIVE_FLOATS else torch.float32)
    matrix = native_matrix(native, q.shape[1], codes, scales, tensor_scale, tables, bias, bits, code)
    native.packed_linear(q.contiguous(), scale.contiguous(), sums.contiguous(), matrix, _bits(out))
    return out.to(dtype)


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
    """See `reference.linears`; `ValueError` for arguments that do not fit."""
    lists = (codes, scales, tensor_scale, tables, bias, bits)
    matrices = schemas.checked_matrices(x, lists, signs, block, code, act_bits, shift)
    native = _native_for(code, act_bits)
    if native is None:
        return reference.linears(
            x, codes, scales, tensor_scale, tables, signs, bias, bits, block, code, act_bits, shift
        )
    cols = x.shape[-1]
    rows = x.reshape(-1, cols).contiguous()
    dtype = x.dtype if x.dtype in NATIVE_FLOATS else torch.float32
    outs = [torch.empty(rows.shape[0], s.shape[0], dtype=dtype) for s in scales]
    native.linear(
        _bits(rows.to(dtype)),
        _contiguous(signs),
        block,
        act_bits,
        [native_matrix(native, cols, *parts, code) for parts in matrices],
        [_bits(out) for out in outs],
        _shift(shift),
    )
    return [out.to(x.dtype).view(*x.shape[:-1], out.shape[1]) for out in outs]


linear = schemas.linear_of(linears)


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
    cols, rank = x.shape[-1], down_scales.shape[0]
    down, both = (down_codes, down_scales, down_scale), (codes, scales, tensor_scale)
    schemas.check_twin(cols, down, both, bias)
    schemas.check_inputs_of(x, signs, block, down_scales.shape[1], act_bits, shift)
    native = _native_for("nibbles", act_bits)
    if native is None:
        return reference.twin_linear(x, *down, *both, signs, bias, block, act_bits, shift)
    dtype = x.dtype if x.dtype in NATIVE_FLOATS else torch.float32
    rows = x.reshape(-1, cols)
    out = torch.empty(rows.shape[0], scales.shape[0], dtype=dtype)
    native.twin_linear(
        _floats(rows),
        _contiguous(signs),
        block,
        act_bits,
        native_matrix(native, cols, *down, None, None, 4, "nibbles"),
        native_matrix(native, cols + rank, *both, None, bias, 4, "nibbles"),
        _bits(out),
        _shift(shift),
    )
    return out.to(x.dtype).view(*x.shape[:-1], scales.shape[0])


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
    """See `reference.linear_inverse`; `ValueError` for arguments that do not fit."""
    parts = (codes, scales, tensor_scale, tables)
    schemas.check_weights(x.shape[-1], *parts, bias, bits, code)
    schemas.check_inputs_of(x, signs, block, scales.shape[1], schemas.PLAIN, None)
    return reference.linear_inverse(x, *parts, signs, bias, bits, block, code)


def _native_for(code: str, act_bits: int = 8) -> ModuleType | None:
    """Native code, where it knows this code and inputs of so many bits."""
    return None if code in schemas.GPU_CODES or act_bits == schemas.PLAIN else load_native()


def native_matrix(
    native: ModuleType,
    cols: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    code: str,
) -> Any:
    """The parts of a packed matrix as native code takes them."""
    return native.Matrix(
        codes.contiguous(),
        _bits(scales.contiguous()),
        tensor_scale.item(),
        None if tables is None else tables.contiguous(),
        None if bias is None else bias.float().contiguous(),
        cols,
        bits,
        code,
    )


def _floats(x: torch.Tensor) -> torch.Tensor:
    """Inputs as native code takes them: contiguous float32, or the bits of bfloat16."""
    return _bits(x.contiguous() if x.dtype in NATIVE_FLOATS else x.float().contiguous())


def _contiguous(signs: torch.Tensor | None) -> torch.Tensor | None:
    return None if signs is None else signs.contiguous()


def _shift(shift: torch.Tensor | None) -> torch.Tensor | None:
    return None if shift is None else shift.float().contiguous()


def _bits(x: torch.Tensor) -> torch.Tensor:
    """16-bit floats as the integers that native code takes them as; others as they are."""
    return x.view(torch.uint16) if x.dtype in (torch.bfloat16, torch.float16) else x


# Devices without a kernel of their own compute what the specification says.
for _name, _native, _reference in (
    ("rotate_quantize", rotate_quantize, reference.rotate_quantize),
    ("rms_norm_rotate_quantize", rms_norm_rotate_quantize, reference.rms_norm_rotate_quantize),
    ("gated_rotate_quantize", gated_rotate_quantize, reference.gated_rotate_quantize),
    ("packed_linear", packed_linear, reference.packed_linear),
    ("linear", linear, reference.linear),
    ("linear_inverse", linear_inverse, reference.linear_inverse),
    ("linears", linears, reference.linears),
    ("twin_linear", twin_linear, reference.twin_linear),
):
    torch.library.impl(f"fewbit::{_name}", "CPU")(_native)
    torch.library.impl(f"fewbit::{_name}", "CompositeExplicitAutograd")(_reference)

# AMD's devices call themselves "cuda" too, and have no kernels here.
if torch.cuda.is_available() and torch.version.hip is None and importlib.util.find_spec("triton"):
    from fewbit.ops import cuda

    cuda.register()
    KERNEL_DEVICES.add("cuda")
