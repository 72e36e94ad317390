"""Puts extreme numbers through every kernel and prints what comes out, for comparing instruction sets.

`FEWBIT_ISA=... python hostile_numbers.py CHECKPOINT [missing]` prints JSON: "exact" are digests of operators whose
results are equal bit for bit everywhere, "bounded" the logits of whole models, which are compared with a bound.
"missing" hides the extension, which leaves pure torch and no models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbit.checkpoint.store import read_tensors, write_tensors
from fewbit.errors import FewbitError
from fewbit.formats import get_format
from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.math.rounding import quantize_rotated
from fewbit.ops import cpu  # noqa: F401  # registers the operators
from fewbit.runtime.batch import Batch

ROWS, COLS, TOKENS, GROUP = 33, 256, 9, 128
ops = torch.ops.fewbit


def fills() -> dict[str, torch.Tensor]:
    """Inputs float32 `[TOKENS, COLS]` by what is extreme about them."""
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(TOKENS, COLS, generator=generator)
    found = {
        "usual": usual,
        "zeros": torch.zeros_like(usual),
        "negative zeros": -torch.zeros_like(usual),
        "subnormal": usual * 1e-40,
        "smallest": torch.full_like(usual, 1e-45),
        "1e30": usual * 1e30,
        "largest": torch.full_like(usual, 3.4e38) * usual.sign(),
        "one outlier": usual.clone(),
        "NaN": usual.clone(),
        "infinity": usual.clone(),
        "both infinities": usual.clone(),
    }
    found["one outlier"][:, 17] = 1e4
    found["NaN"][1, 3] = found["NaN"][4, 200] = torch.nan
    found["infinity"][2, 0] = torch.inf
    found["both infinities"][3, 9], found["both infinities"][3, 10] = torch.inf, -torch.inf
    return found


SCALES = {
    "usual": 0.02,
    "zero": 0.0,
    "subnormal": 6e-8,
    "largest": 65504.0,
    "infinity": float("inf"),
    "NaN": float("nan"),
}
TENSOR_SCALES = (0.5, 0.0, 1e-40, 1e30, float("inf"), float("nan"))


def digest(tensors: Any) -> str:
    """A hash of results; all NaN are one, because processors differ in which they make."""
    state = hashlib.sha256()
    for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
        plain = tensor.contiguous()
        if plain.is_floating_point():
            plain = torch.where(plain.isnan(), torch.full_like(plain, torch.nan), plain)
        state.update((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes())
    return state.hexdigest()[:16]


def inputs() -> Iterator[tuple[str, str]]:
    """Quantizing inputs, after a norm or a gate where asked."""
    signs = pack_signs(random_signs(COLS, 0))
    weight = torch.rand(COLS, generator=torch.Generator().manual_seed(1)) + 0.5
    for name, x in fills().items():
        for dtype in (torch.float32, torch.bfloat16):
            for bits in (8, 4):
                case, own = f"{name}, {dtype}, {bits} bits", x.to(dtype)
                yield f"rotate_quantize, {case}", digest(ops.rotate_quantize(own, signs, 256, GROUP, bits))
                norm = ops.rms_norm_rotate_quantize(own, weight.to(dtype), 1e-6, signs, 256, GROUP, bits)
                yield f"rms_norm_rotate_quantize, {case}", digest(norm)
                for activation in ("silu", "gelu_tanh"):
                    gated = ops.gated_rotate_quantize(own, own.flip(1), activation, signs, 256, GROUP, bits)
                    yield f"gated_rotate_quantize, {activation}, {case}", digest(gated)


def packed(code: str) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Codes of random bits, which all mean something, and the tables that they are read with."""
    bits = 4 if code == "nibbles" else 3
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (-(-ROWS // 16), 2 * bits * COLS), generator=generator, dtype=torch.uint8)
    return codes, None if code == "nibbles" else load_tables(bits)[0], bits


def products() -> Iterator[tuple[str, str]]:
    """Products of packed matrices whose codes are any bits and whose scales are extreme."""
    signs = pack_signs(random_signs(COLS, 0))
    for code in ("trellis", "nibbles"):
        codes, tables, bits = packed(code)
        for scale_name, value in SCALES.items():
            scales = torch.full((ROWS, COLS // GROUP), 0.02).half()
            scales[3, 1] = value
            for tensor_scale in TENSOR_SCALES:
                given = torch.tensor([tensor_scale])
                x = fills()["usual"]
                found = ops.linear(x, codes, scales, given, tables, signs, None, bits, 256, code)
                yield f"linear, {code}, scale {scale_name}, tensor scale {tensor_scale}", digest(found)
        scales = torch.full((ROWS, COLS // GROUP), 0.02).half()
        for name, x in fills().items():
            for dtype in (torch.float32, torch.bfloat16):
                found = ops.linear(
                    x.to(dtype), codes, scales, torch.tensor([0.5]), tables, signs, None, bits, 256, code
                )
                yield f"linear, {code}, {name}, {dtype}", digest(found)


def twins() -> Iterator[tuple[str, str]]:
    """Products of two components, the first one's quantized in between."""
    generator = torch.Generator().manual_seed(3)

    def codes(rows: int, cols: int) -> torch.Tensor:
        return torch.randint(0, 256, (-(-rows // 16), 8 * cols), generator=generator, dtype=torch.uint8)

    signs = pack_signs(random_signs(COLS, 0))
    down, both = codes(GROUP, COLS), codes(ROWS, COLS + GROUP)
    down_scales, scales = torch.full((GROUP, 2), 0.02).half(), torch.full((ROWS, 3), 0.02).half()
    for name, x in fills().items():
        for first in (0.5, 1e30, float("nan")):
            found = ops.twin_linear(
                x, down, down_scales, torch.tensor([first]), both, scales, torch.tensor([0.5]), signs, None, 256
            )
            yield f"twin_linear, {name}, scale {first}", digest(found)


def codecs() -> Iterator[tuple[str, str]]:
    """Encoding extreme weights, and decoding extreme scales; what cannot be encoded is a typed error."""
    for name, x in fills().items():
        weight = x[:, :64].repeat(4, 1)[:ROWS].contiguous()
        for bits in (2, 3, 4):
            fmt = get_format("trellis")
            spec = fmt.spec(ROWS, 64, bits)
            try:
                done = quantize_rotated(fmt, weight, spec, None)
            except FewbitError as error:
                yield f"encode, {name}, {bits} bits", type(error).__name__
                continue
            yield f"encode, {name}, {bits} bits", digest(done.parts[part] for part in sorted(done.parts))
            for scale_name, value in SCALES.items():
                parts = {**done.parts, "scales": torch.full_like(done.parts["scales"], value)}
                yield f"decode, {name}, {bits} bits, scales {scale_name}", digest(fmt.dequantize(parts, spec))


def models(checkpoint: Path) -> Iterator[tuple[str, list[str]]]:
    """Logits of a checkpoint whose norms, scales or tables are extreme."""
    from fewbit.runtime.decoder import open_decoder

    values = {"zero": 0.0, "subnormal": 1e-40, "1e30": 1e30, "outlier": 1e4, "NaN": torch.nan, "infinity": torch.inf}
    places = ("model.layers.0.input_layernorm.weight", "model.norm.weight", "model.layers.0.self_attn.v_proj.scale",
              "model.layers.0.mlp.down_proj.scale", "model.embed_tokens.scale")  # fmt: skip
    tensors, metadata = read_tensors(checkpoint / "model.safetensors")
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(checkpoint, copy)
        for place in places:
            for name, value in values.items():
                changed = tensors[place].clone()
                changed.view(-1)[0] = value
                write_tensors(copy / "model.safetensors", {**tensors, place: changed}, metadata)
                for kv in ("bf16", "int8", "float32"):
                    decoder, _ = open_decoder(copy, threads=1, block=8, kv=kv, fallback=False)
                    tokens = np.array([5, 6, 7, 8, 9], np.int32)
                    at = np.arange(5, dtype=np.int32)
                    logits = decoder.forward(Batch(tokens, at, np.zeros_like(at), at[-1:]))
                    yield f"{place} {name}, cache {kv}", [repr(float(value)) for value in logits[0]]


BOUND = 1e-6
"""Squared differences of logits over the squares of the logits: models add in another order where vectors are wider."""


def differing(one: dict[str, Any], other: dict[str, Any], kind: str) -> list[str]:
    """Cases whose results are not those of the other: not equal, or, of models, not finite in the same places or
    farther apart than rounding explains."""
    names = sorted({*one[kind], *other[kind]})
    if kind == "exact":
        return [name for name in names if one[kind].get(name) != other[kind].get(name)]
    return [name for name in names if not _near(one[kind].get(name, []), other[kind].get(name, []))]


def _near(one: list[str], other: list[str]) -> bool:
    a, b = (np.array([float(value) for value in values]) for values in (one, other))
    if a.shape != b.shape or not a.size or not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    usable = np.isfinite(a)
    return bool(((a - b)[usable] ** 2).sum() <= BOUND * (a[usable] ** 2).sum())


def measure(checkpoint: Path, native: bool) -> dict[str, Any]:
    """All cases by name."""
    exact = {name: found for part in (inputs, products, twins, codecs) for name, found in part()}
    return {"exact": exact, "bounded": dict(models(checkpoint)) if native else {}}


if __name__ == "__main__":
    if "missing" in sys.argv:
        sys.modules["fewbit._native"] = None  # type: ignore[assignment]
        warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]), "missing" not in sys.argv)))
