"""Every operator once: its signature, what it demands of its arguments, and its fake for torch.compile.

The kernels are registered in `fewbit.ops.cpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit.math.hadamard import MAX_BLOCK, MIN_BLOCK
from fewbit.ops.layouts import LANE_COLS, LANE_GROUPS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BITS = (2, 3, 4)
CODES = ("trellis", "lanes", "nibbles", "tiles", "ternary", "iq3_s")
GPU_CODES = ("tiles", "ternary", "iq3_s")  # layouts of graphics processors: ops/gpu_layouts.py
WIDTHS = {"nibbles": (4,), "ternary": (3,), "iq3_s": (3,)}
PLAIN = 16  # bits of inputs that are not quantized
LARGEST = {8: 127, 4: 7}  # by the bits of quantized inputs
ACTIVATIONS = ("silu", "gelu_tanh")
ROW_GROUP = 16
MAX_GROUP = 256

torch.library.define(
    "fewbit::rotate_quantize",
    "(Tensor x, Tensor? signs, int block, int group, int bits=8, Tensor? shift=None) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fewbit::rms_norm_rotate_quantize",
    "(Tensor x, Tensor weight, float eps, Tensor? signs, int block, int group, int bits=8, Tensor? shift=None) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fewbit::gated_rotate_quantize",
    "(Tensor gate, Tensor up, str activation, Tensor? signs, int block, int group, int bits=8, Tensor? shift=None) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fewbit::packed_linear",
    "(Tensor q, Tensor scale, Tensor sums, Tensor codes, Tensor scales, Tensor tensor_scale, Tensor? tables, "
    "Tensor? bias, int bits, str code, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "fewbit::linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor tensor_scale, Tensor? tables, Tensor? signs, Tensor? bias, "
    "int bits, int block, str code='trellis', int act_bits=8, Tensor? shift=None) -> Tensor",
)
torch.library.define(
    "fewbit::linear_inverse",
    "(Tensor x, Tensor codes, Tensor scales, Tensor tensor_scale, Tensor? tables, Tensor? signs, Tensor? bias, "
    "int bits, int block, str code='trellis') -> Tensor",
)
torch.library.define(
    "fewbit::linears",
    "(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] tensor_scale, Tensor?[] tables, Tensor? signs, "
    "Tensor?[] bias, int[] bits, int block, str code='trellis', int act_bits=8, Tensor? shift=None) -> Tensor[]",
)
torch.library.define(
    "fewbit::twin_linear",
    "(Tensor x, Tensor down_codes, Tensor down_scales, Tensor down_scale, Tensor codes, Tensor scales, "
    "Tensor tensor_scale, Tensor? signs, Tensor? bias, int block, int act_bits=8, Tensor? shift=None) -> Tensor",
)


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` unless an argument is what the operator demands."""
    if not condition:
        raise ValueError(message)


def _require_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")


def check_rotation(
    cols: int,
    dtype: torch.dtype,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
    name: str = "x",
) -> None:
    """Raise `ValueError` unless inputs of `cols` columns can be rotated and quantized like that."""
    require(dtype in FLOATS, f"{name} must be float32, bfloat16 or float16, not {dtype}")
    power = block > 0 and block & (block - 1) == 0
    require(
        block == 1 or (power and MIN_BLOCK <= block <= MAX_BLOCK),
        f"the block must be 32, 64, 128 or 256, not {block}; 1 stands for no rotation",
    )
    require(
        0 < group <= MAX_GROUP and group % MIN_BLOCK == 0,
        f"the scale group must be a multiple of {MIN_BLOCK} up to {MAX_GROUP}, not {group}",
    )
    require(
        group % block == 0 or block % group == 0,
        f"the scale group must be a multiple of the block {block} or divide it, not {group}",
    )
    require(cols % group == 0, f"{cols} inputs are not a multiple of the scale group {group}")
    require(cols % block == 0, f"{cols} inputs are not a multiple of the block {block}")
    require(bits in LARGEST, f"inputs are quantized to 8 or 4 bits, not {bits}")
    require(block > 1 or signs is None, "signs must be None for block 1: where nothing is rotated nothing changes sign")
    if signs is not None:
        _require_tensor("signs", signs, (-(-cols // 8),), torch.uint8)
    if shift is not None and (shift.shape != (cols,) or shift.dtype not in FLOATS):
        raise ValueError(f"shift must be float [{cols}], not {shift.dtype} {list(shift.shape)}")


def check_inputs_of(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    groups: int,
    act_bits: int,
    shift: torch.Tensor | None,
) -> None:
    """Raise `ValueError` unless a product over `groups` scale groups can take `x [..., K]` so, in 8, 4 or 16 bits."""
    bits = 8 if act_bits == PLAIN else act_bits
    check_rotation(x.shape[-1], x.dtype, signs, block, x.shape[-1] // groups, bits, shift)


def check_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Raise `ValueError` unless inputs `[T, K]` can be normalized with this gain."""
    require(x.dim() == 2, f"x must be [T, K], not {list(x.shape)}")
    require(
        weight.dtype in FLOATS and weight.shape == x.shape[1:],
        f"weight must be float [{x.shape[1]}], not {weight.dtype} {list(weight.shape)}",
    )
    require(0 <= eps <= 1, f"eps must be from 0 to 1, not {eps}")


def check_gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """Raise `ValueError` unless these are the two halves of a gated activation."""
    require(gate.dim() == 2, f"gate must be [T, K], not {list(gate.shape)}")
    require(
        up.dtype == gate.dtype and up.shape == gate.shape,
        f"up must be {gate.dtype} {list(gate.shape)} like gate, not {up.dtype} {list(up.shape)}",
    )
    require(activation in ACTIVATIONS, f"activation must be silu or gelu_tanh, not {activation!r}")


def _width_message(code: str, bits: int) -> str:
    if code in WIDTHS:
        return f"{code} have {WIDTHS[code][0]} bits, not {bits}"
    return f"the trellis has 2, 3 or 4 bits, not {bits}"


def _check_codes(
    codes: torch.Tensor, tables: torch.Tensor | None, shape: tuple[int, int, int], bits: int, code: str
) -> None:
    """Raise `ValueError` unless codes and tables are those of a matrix of `shape` (rows, columns, scale group)."""
    rows, cols, group = shape
    row_groups = -(-rows // ROW_GROUP)
    if code in ("ternary", "iq3_s"):
        unit, size = (16, 4) if code == "ternary" else (32, 14)
        _require_tensor("codes", codes, (cols // unit, size * ROW_GROUP * row_groups), torch.uint8)
        require(tables is not None, f"the code {code} needs its tables")
        assert tables is not None
        kind = ((rows, cols // group), torch.float16) if code == "ternary" else ((2048,), torch.int8)
        _require_tensor("tables", tables, *kind)
        return
    lanes = max(2, codes.shape[-1] // (2 * bits * cols)) if code == "lanes" else 1  # row groups in a row of codes
    require(code != "lanes" or lanes in LANE_GROUPS, f"lanes hold 2 or 4 row groups, not {lanes}")
    require(lanes == 1 or group % LANE_COLS == 0, f"lanes need scale groups of {LANE_COLS} n columns, not {group}")
    _require_tensor("codes", codes, (-(-rows // (lanes * ROW_GROUP)), lanes * 2 * bits * cols), torch.uint8)
    if tables is not None:
        _require_tensor("tables", tables, (128 if code == "tiles" else 40,), torch.int8)
    require(tables is not None or code == "nibbles", "the trellis needs its tables, int8 [40]")


def check_weights(
    cols: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    tables: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    code: str,
) -> None:
    """Raise `ValueError` unless these are the parts of a packed matrix with `cols` inputs."""
    require(code in CODES, f"the code must be one of {', '.join(CODES)}, not '{code}'")
    require(bits in WIDTHS.get(code, BITS), _width_message(code, bits))
    require(
        scales.dtype == torch.float16 and scales.dim() == 2 and 0 not in scales.shape,
        f"scales must be float16 [N, K / group], not {scales.dtype} {list(scales.shape)}",
    )
    rows, groups = scales.shape
    group = cols // groups
    require(
        cols == group * groups and group % MIN_BLOCK == 0 and 0 < group <= MAX_GROUP,
        f"{cols} inputs in {groups} scale groups: a group is a multiple of {MIN_BLOCK} up to {MAX_GROUP} columns",
    )
    _check_codes(codes, tables, (rows, cols, group), bits, code)
    _require_tensor("tensor_scale", tensor_scale, (1,), torch.float32)
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in FLOATS):
        raise ValueError(f"bias must be float [{rows}], not {bias.dtype} {list(bias.shape)}")


def check_twin(
    cols: int,
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    both: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
) -> None:
    """Raise `ValueError` unless these int4 parts (codes, scales, scale) make a twin layer of `cols` inputs."""
    check_weights(cols, *down, None, None, 4, "nibbles")
    rank, groups = down[1].shape
    group = cols // groups
    require(rank % group == 0, f"the rank {rank} is not a multiple of the scale group {group}")
    check_weights(cols + rank, *both, None, bias, 4, "nibbles")
    require((cols + rank) // both[1].shape[1] == group, f"both components need scale groups of {group} inputs")


def check_lists(codes: list[torch.Tensor], *others: list[Any]) -> None:
    """Raise `ValueError` unless there is at least one matrix and every list has an entry for each."""
    require(len(codes) > 0, "linears needs at least one matrix")
    for other in others:
        require(len(other) == len(codes), f"{len(codes)} matrices, but a list has {len(other)} entries")


def check_inputs(q: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor, groups: int) -> None:
    """Raise `ValueError` unless these are quantized inputs in `groups` scale groups."""
    require(q.dim() == 2 and q.dtype == torch.int8, f"q must be int8 [T, K], not {q.dtype} {list(q.shape)}")
    _require_tensor("scale", scale, (q.shape[0], groups), torch.float32)
    _require_tensor("sums", sums, (q.shape[0], groups), torch.int32)


def check_packed(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    bias: torch.Tensor | None,
    bits: int,
    code: str,
    dtype: torch.dtype,
) -> None:
    """Raise `ValueError` unless inputs `q, scale, sums` and a matrix's `codes, scales, tensor_scale, tables` fit."""
    check_weights(inputs[0].shape[-1], *parts, bias, bits, code)
    check_inputs(*inputs, parts[1].shape[1])
    require(dtype in FLOATS, f"dtype must be float32, bfloat16 or float16, not {dtype}")


def checked_matrices(
    x: torch.Tensor,
    lists: tuple[list[Any], ...],
    signs: torch.Tensor | None,
    block: int,
    code: str,
    act_bits: int,
    shift: torch.Tensor | None,
) -> list[tuple[Any, Any, Any, Any, Any, int]]:
    """`codes, scales, tensor_scale, tables, bias, bits` of every matrix of `linears`, from a list of each.

    Raises `ValueError` unless all of them fit the inputs `[..., K]`.
    """
    check_lists(*lists)
    matrices: list[tuple[Any, Any, Any, Any, Any, int]] = list(zip(*lists, strict=True))
    for parts in matrices:
        check_weights(x.shape[-1], *parts, code)
        check_inputs_of(x, signs, block, parts[1].shape[1], act_bits, shift)
    return matrices


def linear_of(linears: Callable[..., list[torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """The kernel of `linear` by way of that of `linears`, for devices whose kernels take several matrices at once."""

    def linear(
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
        act_bits: int = 8,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `reference.linear`; `ValueError` for arguments that do not fit."""
        parts = ([codes], [scales], [tensor_scale], [tables])
        return linears(x, *parts, signs, [bias], [bits], block, code, act_bits, shift)[0]

    return linear


def empty_quantized(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`q`, `scale` and `sums` for inputs `[T, K]`, not filled."""
    shape = (x.shape[0], x.shape[1] // group)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
    )


@torch.library.register_fake("fewbit::rotate_quantize")
def _rotate_quantize(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    require(x.dim() == 2, f"x must be [T, K], not {list(x.shape)}")
    check_rotation(x.shape[1], x.dtype, signs, block, group, bits, shift)
    return empty_quantized(x, group)


@torch.library.register_fake("fewbit::rms_norm_rotate_quantize")
def _rms_norm_rotate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_norm(x, weight, eps)
    check_rotation(x.shape[1], x.dtype, signs, block, group, bits, shift)
    return empty_quantized(x, group)


@torch.library.register_fake("fewbit::gated_rotate_quantize")
def _gated_rotate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    group: int,
    bits: int = 8,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_gate(gate, up, activation)
    check_rotation(gate.shape[1], gate.dtype, signs, block, group, bits, shift, "gate")
    return empty_quantized(gate, group)


@torch.library.register_fake("fewbit::packed_linear")
def _packed_linear(
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
    check_weights(q.shape[-1], codes, scales, tensor_scale, tables, bias, bits, code)
    check_inputs(q, scale, sums, scales.shape[1])
    return q.new_empty((q.shape[0], scales.shape[0]), dtype=dtype)


@torch.library.register_fake("fewbit::linear")
def _linear(
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
    act_bits: int = 8,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    check_weights(x.shape[-1], codes, scales, tensor_scale, tables, bias, bits, code)
    check_inputs_of(x, signs, block, scales.shape[1], act_bits, shift)
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.register_fake("fewbit::linear_inverse")
def _linear_inverse(
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
    return _linear(x, codes, scales, tensor_scale, tables, signs, bias, bits, block, code, PLAIN)


@torch.library.register_fake("fewbit::linears")
def _linears(
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
    check_lists(codes, scales, tensor_scale, tables, bias, bits)
    matrices = zip(codes, scales, tensor_scale, tables, bias, bits, strict=True)
    return [
        _linear(x, c, s, t, table, signs, b, width, block, code, act_bits, shift)
        for c, s, t, table, b, width in matrices
    ]


@torch.library.register_fake("fewbit::twin_linear")
def _twin_linear(
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
    check_twin(x.shape[-1], (down_codes, down_scales, down_scale), (codes, scales, tensor_scale), bias)
    check_inputs_of(x, signs, block, down_scales.shape[1], act_bits, shift)
    return x.new_empty((*x.shape[:-1], scales.shape[0]))
