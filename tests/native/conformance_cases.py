"""Writes what the torch reference computes as cases for conformance.cpp, which says what the file looks like.

Usage: conformance_cases.py FILE. One function per operator yields its cases; nothing here runs native code.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fewbit.formats import trellis
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import reference
from fewbit.ops.layouts import to_lanes

Fields = dict[str, "torch.Tensor | int | None"]
Case = tuple[str, Fields]
BITS = (2, 3, 4)


def _bytes(value: torch.Tensor | int) -> bytes:
    if isinstance(value, int):
        return struct.pack("<q", value)
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _framed(data: bytes) -> bytes:
    return _bytes(len(data)) + data


def _generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(part * 1009**place for place, part in enumerate(seed)))


def _codes(rows: int, cols: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (-(-rows // 16), 2 * bits * cols), dtype=torch.uint8, generator=generator)


def _inputs(tokens: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Ordinary inputs, and where there are tokens enough a zero group, NaN, infinity, tiny and huge ones and ties."""
    x = torch.randn(tokens, cols, generator=generator)
    if tokens >= 7:
        x[0, : cols // 2] = 0
        x[1, -1] = torch.nan
        x[2, 0] = -torch.inf
        x[3] *= 1e-30
        x[4] *= 1e-39
        x[5] *= 1e36
        x[6] = torch.arange(cols) % 3 - 1
    return x


def rotate_quantize() -> Iterator[Case]:
    shapes = (
        (32, 32, 64),
        (32, 96, 96),
        (64, 64, 192),
        (64, 192, 576),
        (128, 256, 256),
        (256, 256, 512),
        (256, 128, 256),
    )
    shapes = (*shapes, (1, 64, 192))
    for (block, group, cols), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        for signs in (None, pack_signs(random_signs(cols, block))) if block > 1 else (None,):
            x = _inputs(9, cols, _generator(block, cols)).to(dtype)
            bits = 4 if signs is None else 8
            found = reference.rotate_quantize(x, signs, block, group, bits)
            yield _quantized(f"{'no ' if signs is None else ''}signs", x, block, group, bits, found, {"signs": signs})
    for dtype in (torch.float32, torch.bfloat16):
        generator = _generator(7)
        x, up = _inputs(9, 576, generator).to(dtype), torch.randn(9, 576, generator=generator).to(dtype)
        weight = torch.randn(576, generator=generator)
        found = reference.rms_norm_rotate_quantize(x, weight, 1e-5, None, 64, 192)
        norm: Fields = {"weight": weight, "eps": torch.tensor([1e-5])}
        yield _quantized("after a norm", x, 64, 192, 8, found, norm)
        shift = torch.randn(576, generator=generator)
        found = reference.rms_norm_rotate_quantize(x, weight, 1e-5, None, 64, 192, 4, shift)
        yield _quantized("shifted after a norm", x, 64, 192, 4, found, {**norm, "shift": shift})
        for activation in ("silu", "gelu_tanh"):
            found = reference.gated_rotate_quantize(x, up, activation, None, 64, 192)
            gate = {"up": up, "gelu": int(activation == "gelu_tanh")}
            yield _quantized(f"after {activation}", x, 64, 192, 8, found, gate)


def _quantized(
    label: str, x: torch.Tensor, block: int, group: int, bits: int, found: tuple[torch.Tensor, ...], more: Fields
) -> Case:
    tokens, cols = x.shape
    sizes = {"tokens": tokens, "cols": cols, "block": block, "group": group, "bits": bits}
    expected = dict(zip(("expected q", "expected scale", "expected sums"), found, strict=True))
    return (
        f"{cols} inputs, block {block}, group {group}, {x.dtype}, {bits} bits, {label}",
        {"x": x, **sizes, "bf16": int(x.dtype == torch.bfloat16), **more, **expected},
    )


def packed_linear() -> Iterator[Case]:
    shapes = ((1, 64, 64, (1, 2, 9)), (15, 576, 192, (3, 7)), (17, 96, 32, (1, 8)), (40, 1024, 256, (4, 13, 33)))
    dtypes = (torch.float32, torch.bfloat16)
    for (rows, cols, group, batches), bits, dtype in itertools.product((*shapes, (33, 64, 64, (400,))), BITS, dtypes):
        for tokens in batches:
            generator = _generator(rows, bits, tokens)
            codes, tables = _codes(rows, cols, bits, generator), trellis.load_tables(bits)[0]
            yield _product((rows, cols, group, bits), tokens, dtype, codes, tables, 1, generator)
    for lane_groups, bits in itertools.product((2, 4), BITS):
        generator = _generator(lane_groups, bits)
        codes, tables = _codes(70, 192, bits, generator), trellis.load_tables(bits)[0]
        lanes = to_lanes(codes, bits, lane_groups)
        yield _product((70, 192, 192, bits), 5, torch.float32, lanes, tables, lane_groups, generator)
    for rows, cols, group, tokens in ((1, 32, 32, 3), (17, 576, 64, 9), (40, 256, 128, 1)):
        generator = _generator(rows, tokens)
        codes = _codes(rows, cols, 4, generator)
        yield _product((rows, cols, group, 4), tokens, torch.bfloat16, codes, None, 1, generator)


def _product(
    shape: tuple[int, int, int, int],
    tokens: int,
    dtype: torch.dtype,
    codes: torch.Tensor,
    tables: torch.Tensor | None,
    lane_groups: int,
    generator: torch.Generator,
) -> Case:
    rows, cols, group, bits = shape
    code = "nibbles" if tables is None else "lanes" if lane_groups > 1 else "trellis"
    q, scale, sums = reference.rotate_quantize(_inputs(tokens, cols, generator), None, min(group & -group, 256), group)
    scales = (torch.rand(rows, cols // group, generator=generator) - 0.2).half()
    scales[0, 0] = 3e-6  # a subnormal half
    bias = torch.randn(rows, generator=generator) if rows % 2 else None
    parts = (codes, scales, torch.tensor([0.003]), tables, bias)
    out = reference.packed_linear(q, scale, sums, *parts, bits, code, dtype)
    if dtype == torch.bfloat16:  # which NaN torch rounds to depends on the machine
        out.view(torch.int16)[out.isnan()] = 0x7FC0
    names = ("q", "scale", "sums", "codes", "scales", "tensor_scale", "tables", "bias")
    sizes = {"tokens": tokens, "rows": rows, "cols": cols, "group": group, "bits": bits, "lane_groups": lane_groups}
    return (
        f"{rows} x {cols}, group {group}, {code}, {bits} bits, {tokens} tokens, {dtype}",
        {
            **dict(zip(names, (q, scale, sums, *parts), strict=True)),
            **sizes,
            "bf16": int(dtype == torch.bfloat16),
            "expected out": out,
        },
    )


def trellis_dequantize() -> Iterator[Case]:
    shapes = ((1, 32, 32), (16, 64, 16), (19, 192, 96), (40, 512, 256))
    for (rows, cols, group), bits in itertools.product(shapes, BITS):
        generator = _generator(rows, bits)
        codes = _codes(rows, cols, bits, generator)
        scales = torch.randn(rows, cols // group, generator=generator)
        tables = torch.randint(-31, 32, (40,), dtype=torch.int8, generator=generator)
        yield (
            f"{rows} x {cols}, group {group}, {bits} bits",
            {
                "codes": codes,
                "scales": scales,
                "values": trellis.window_values(tables).to(torch.int8),
                "rows": rows,
                "cols": cols,
                "group": group,
                "bits": bits,
                "expected out": trellis.dequantize_torch(codes, scales, tables, bits, group),
            },
        )


def trellis_encode_group() -> Iterator[Case]:
    shapes = [(*shape, bits) for shape in ((17, 64, True), (20, 32, False), (1, 16, True)) for bits in BITS]
    for rows, group, with_factor, bits in (*shapes, (16, 256, True, 3)):
        generator = _generator(rows, bits, group)
        weight = torch.randn(rows, group, generator=generator)
        tables, unit = trellis.load_tables(bits)
        scale = weight.square().mean(1).sqrt() / unit
        scale[-1] = 0 if rows > 1 else scale[-1]
        inverse = torch.where(scale > 0, trellis.LEVELS_PER_UNIT / scale, torch.zeros_like(scale))
        upper = torch.triu(torch.randn(group, group, generator=generator), 1)
        factor = torch.eye(group) + 0.1 * upper / group**0.5 if with_factor else None
        levels = trellis.state_levels(tables, bits)
        padded = (trellis.pad_rows(x) for x in (weight, scale, inverse))
        codes, values, error = trellis.encode_torch(trellis.GroupJob(*padded, factor, levels, bits))
        values, error = values[:rows].contiguous(), error[:rows].contiguous()
        fields = {
            "weight": weight,
            "scales": scale,
            "inverse": inverse,
            "factor": factor,
            "levels": (levels * trellis.LEVELS_PER_UNIT).to(torch.int16),
            "rows": rows,
            "group": group,
            "bits": bits,
            "expected codes": codes,
            "expected values": values,
        }
        if factor is not None:
            fields |= {"expected error": error, "expected weighted": trellis.weigh_torch(values, factor)}
        yield f"{rows} x {group}, {bits} bits, {'a' if with_factor else 'no'} factor", fields


def trellis_encode_streams() -> Iterator[Case]:
    for bits, steps in ((2, 512), (3, 256), (4, 512)):
        x = (torch.randn(3, steps, generator=_generator(bits)) * 9000).clamp(-32768, 32767).to(torch.int16)
        levels = trellis.state_levels(trellis.load_tables(bits)[0], bits)
        states, symbols = torch.zeros(3, dtype=torch.int64), []
        for first in range(0, steps, trellis.STEPS):
            search = trellis.Search(levels, bits, states)
            search.advance(x[:, first : first + trellis.STEPS + trellis.LOOK].int())
            symbols.append(search.trace()[:, : trellis.STEPS])
            states = trellis.follow(symbols[-1], states, bits)[:, -1]
        fields = {
            "x": x,
            "levels": (levels * trellis.LEVELS_PER_UNIT).to(torch.int16),
            "streams": 3,
            "steps": steps,
            "bits": bits,
            "expected symbols": torch.cat(symbols, 1).to(torch.uint8),
        }
        yield f"{steps} steps, {bits} bits", fields


OPERATORS = (rotate_quantize, packed_linear, trellis_dequantize, trellis_encode_group, trellis_encode_streams)


def write(path: Path) -> None:
    """Write the cases of all operators; fields that are None are left out."""
    with path.open("wb") as file:
        for operator in OPERATORS:
            for label, fields in operator():
                given = {name: _bytes(value) for name, value in fields.items() if value is not None}
                file.write(_framed(operator.__name__.encode()) + _framed(label.encode()) + _bytes(len(given)))
                for name, data in given.items():
                    file.write(_framed(name.encode()) + _framed(data))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]))
