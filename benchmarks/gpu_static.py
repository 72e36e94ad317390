"""Compiles every Triton kernel for every architecture, without a device, and writes down what the machine code holds.

Registers, spills and shared memory, tensor-core instructions, and instructions per weight in the loop that decodes:
`results/gpu-static.json`. Needs Triton (`pip install 'fewbit[gpu]'`), whose wheel brings the assembler and the
disassembler. Nothing is run and nothing is timed. Usage: gpu_static.py [--arch 80 ...] [--kernel NAME ...] [--print]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbit.ops import triton_launch
from fewbit.ops.gpu_layouts import GpuMatrix
from fewbit.ops.triton_launch import Launch, Rotation, Source

RESULTS = Path(__file__).parent / "results" / "gpu-static.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
COLS, ROWS, RANK = 4096, 4096, 128
PRODUCTS = re.compile(r"^(IMMA|HMMA|IGMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|DMMA)")
FLOAT = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matrix(code: str, bits: int, rows: int = ROWS, cols: int = COLS, group: int = 256) -> GpuMatrix:
    """A matrix in the layout `code`, without data."""
    shapes = {"ternary": (cols // 16, 4 * rows), "iq3_s": (cols // 32, 14 * rows)}
    tables = {
        "tiles": meta(128, dtype=torch.int8),
        "nibbles": None,
        "ternary": meta(rows, cols // group, dtype=torch.float16),
        "iq3_s": meta(2048, dtype=torch.int8),
    }
    codes = meta(*shapes.get(code, (rows // 16, 2 * bits * cols)), dtype=torch.uint8)
    scales = meta(cols // group, rows, dtype=torch.float16).t()
    return GpuMatrix(codes, scales, meta(1, dtype=torch.float32), tables[code], code)


def inputs(tokens: int, cols: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (tokens, cols // group)
    return (
        meta(tokens, cols, dtype=torch.int8),
        meta(*shape, dtype=torch.float32),
        meta(*shape, dtype=torch.int32),
    )


def rotation(group: int, bits: int, shifted: bool = False) -> Rotation:
    signs = meta(COLS // 8, dtype=torch.uint8)
    return Rotation(signs, 256, group, bits, meta(COLS, dtype=torch.float16) if shifted else None)


def rotate(kind: str, bits: int, tokens: int) -> Launch:
    x = meta(tokens, COLS, dtype=FLOAT)
    source = Source(x, kind, up=x if kind == "silu" else None, weight=x[0] if kind == "norm" else None, eps=1e-5)
    group = 256 if bits == 8 else 128
    return triton_launch.rotate_quantize(source, rotation(group, bits), inputs(tokens, COLS, group))


def packed(code: str, bits: int, tokens: int) -> Launch:
    group = 128 if code == "nibbles" else 256
    out = meta(tokens, ROWS, dtype=FLOAT)
    launches = triton_launch.packed_linear(
        inputs(tokens, COLS, group), matrix(code, bits, group=group), bits, meta(ROWS, dtype=FLOAT), out
    )
    return launches[0]


def reduce(tokens: int) -> Launch:
    out = meta(tokens, ROWS, dtype=FLOAT)
    return triton_launch.packed_linear(inputs(tokens, COLS, 256), matrix("tiles", 3), 3, None, out)[1]


def plain(code: str, bits: int, tokens: int) -> Launch:
    group = 128 if code == "nibbles" else 256
    x, out = meta(tokens, COLS, dtype=FLOAT), meta(tokens, ROWS, dtype=FLOAT)
    return triton_launch.plain_linear(x, matrix(code, bits, group=group), bits, None, out)


def inverse(code: str, bits: int, tokens: int) -> Launch:
    x, out = meta(tokens, COLS, dtype=FLOAT), meta(tokens, ROWS, dtype=FLOAT)
    signs = meta(COLS // 8, dtype=torch.uint8)
    return triton_launch.inverse_linear(x, matrix(code, bits), bits, signs, 256, None, out)


def folded(bits: int, tokens: int) -> Launch:
    down = matrix("nibbles", 4, rows=RANK, group=128)
    x = meta(tokens, COLS, dtype=FLOAT)
    return triton_launch.folded(x, rotation(128, bits, True), down, inputs(tokens, COLS + RANK, 128))


def twin(bits: int, tokens: int) -> Launch:
    matrices = matrix("nibbles", 4, rows=RANK, group=128), matrix("nibbles", 4, cols=COLS + RANK, group=128)
    x: Any = meta(tokens, COLS, dtype=FLOAT) if bits == 16 else inputs(tokens, COLS, 128)
    bias, out = meta(ROWS, dtype=torch.float32), meta(tokens, ROWS, dtype=FLOAT)
    return triton_launch.twin_linear(x, matrices, bits, bias, out)


def kernels() -> dict[str, Callable[[], Launch]]:
    """Every kernel in every way it is used: one token, many, and a prompt where that has tiles of its own."""
    found: dict[str, Callable[[], Launch]] = {}
    for kind in ("plain", "norm", "silu"):
        for bits in (8, 4):
            found[f"rotate_quantize, {kind}, {bits} bits"] = lambda kind=kind, bits=bits: rotate(kind, bits, 512)
    for tokens, name in ((1, "gemv"), (128, "gemm")):
        for bits in (2, 3, 4):
            found[f"{name}, trellis, {bits} bits"] = lambda b=bits, t=tokens: packed("tiles", b, t)
        for code in ("ternary", "iq3_s"):
            found[f"{name}, {code}"] = lambda c=code, t=tokens: packed(c, 3, t)
        found[f"{name}, int4"] = lambda t=tokens: packed("nibbles", 4, t)
        found[f"{name}, 16-bit inputs, trellis, 3 bits"] = lambda t=tokens: plain("tiles", 3, t)
        found[f"{name}, inverse, trellis, 3 bits"] = lambda t=tokens: inverse("tiles", 3, t)
        found[f"{name}, inverse, ternary"] = lambda t=tokens: inverse("ternary", 3, t)
        found[f"{name}, inverse, iq3_s"] = lambda t=tokens: inverse("iq3_s", 3, t)
        for bits in (4, 8, 16):
            found[f"{name}, twin, W4A{bits}"] = lambda b=bits, t=tokens: twin(b, t)
    for bits in (2, 3, 4):
        found[f"prompt, trellis, {bits} bits"] = lambda b=bits: packed("tiles", b, 512)
    found["prompt, ternary"] = lambda: packed("ternary", 3, 512)
    found["prompt, int4"] = lambda: packed("nibbles", 4, 512)
    found["gemv, reduction"] = lambda: reduce(1)
    for bits in (4, 8):
        found[f"rotate_quantize with h, {bits} bits"] = lambda b=bits: folded(b, 512)
    return found


def source(launch: Launch) -> ASTSource:
    """What the just-in-time compiler would be given for these arguments."""
    names = {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.float16: "fp16", torch.bfloat16: "bf16",
             torch.float32: "fp32"}  # fmt: skip
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = {**launch.arguments, **launch.constants}
    for position, name in enumerate(launch.kernel.arg_names):
        value = given[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = (
            f"*{names[value.dtype]}"
            if isinstance(value, torch.Tensor)
            else "fp32" if isinstance(value, float) else "i32"
        )  # fmt: skip
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[position,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def instructions(sass: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Addresses and operations of a disassembled kernel, and its backward jumps (from, to)."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str]] = []
    waiting: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            waiting.append(label[1])
        elif code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*);", line):
            address = int(code[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            found.append((address, code[2]))
            if code[2].startswith("BRA") and (target := re.search(r"\.L_x_\d+", code[3])):
                jumps.append((address, target[0]))
    ends = [(start, labels[to]) for start, to in jumps if to in labels and labels[to] < start]
    return found, ends


def decoding_loop(found: list[tuple[int, str]], jumps: list[tuple[int, int]]) -> int:
    """Instructions of the innermost loop with the most products; 0 where there is none."""
    best, most = 0, 0
    for end, start in jumps:
        if any(start <= other_start and other_end < end for other_end, other_start in jumps):
            continue
        inside = [operation for address, operation in found if start <= address <= end]
        products = sum(bool(PRODUCTS.match(operation)) for operation in inside)
        if products > most:
            best, most = len(inside), products
    return best


def bytes_per_weight(launch: Launch) -> float | None:
    """What a program reads of codes, scales and per-group tables, for every weight of a tile."""
    arguments, constants = launch.arguments, launch.constants
    if "codes" not in arguments:
        return None
    scales = arguments["scales"]
    weights = scales.shape[0] * (scales.shape[1] * constants["G"])
    total = arguments["codes"].numel() * 4 + scales.numel() * 2
    if constants.get("CODE") == "ternary":
        total += arguments["tables"].numel() * 2
    return total / weights


def inspect(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile for one architecture and read the machine code."""
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages, "enable_fp_fusion": False}
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found, jumps = instructions(sass)
    products = sorted({operation for _, operation in found if PRODUCTS.match(operation)})
    spilled = sum(operation.startswith(("STL", "LDL")) for _, operation in found)
    row: dict[str, Any] = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "spill_instructions": spilled,
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "instructions": len(found),
        "tensor_core": products,
    }
    constants = launch.constants
    loop = decoding_loop(found, jumps)
    if "BN" in constants and loop:
        width = constants.get("BK") or constants.get("BLOCK")
        row["loop_instructions"] = loop
        row["loop_instructions_per_weight"] = round(loop * row["threads"] / (constants["BN"] * width), 2)
    if (size := bytes_per_weight(launch)) is not None:
        row["bytes_per_weight"] = round(size, 4)
    return row


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return run.stdout


def rows(chosen: list[str], architectures: list[int]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for name, make in kernels().items():
        if chosen and name not in chosen:
            continue
        for arch in architectures:
            print(f"{name}, sm_{arch}", file=sys.stderr, flush=True)
            yield name, arch, inspect(make(), arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="*", default=[])
    parser.add_argument("--print", action="store_true", help="print JSON and leave the results alone")
    options = parser.parse_args()
    report: dict[str, Any] = {} if options.print or not RESULTS.exists() else json.loads(RESULTS.read_text())
    table = report.setdefault("kernels", {})
    for name, arch, row in rows(options.kernel, options.arch):
        table.setdefault(name, {})[str(arch)] = row
    report["triton"] = triton.__version__
    report["shape"] = {"rows": ROWS, "cols": COLS, "rank": RANK}
    if options.print:
        print(json.dumps(report))
    else:
        RESULTS.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
