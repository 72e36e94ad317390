"""Rounds a model's linears with another Python package and writes the weights that its codes decode to.

Run by the package's own Python, which has no fewbit: `quantize.py REQUEST`. The request is a JSON file with `method`,
`settings` (bits, group_size, symmetric and the method's own), `reference` (a directory of safetensors in Hugging
Face's layout), `linears` (names of the modules to round), `windows` (a safetensors file with token ids int64
`[n, window]`) and `output`. There the decoded weights appear, float32 `[N, K]` under the names of the linears, and
beside them in a `.json` file the bits of all codes, scales and zeros, the seconds and the versions. Scales and zeros
that are no integers are rounded to 16 bits, so that the weights are those of the bits that are counted.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FLOAT_BITS = 16  # of a scale, or of a zero that is no integer
Answer = tuple[dict[str, torch.Tensor], dict[str, Any]]  # decoded weights, and facts about how they were made


def code_bits(rows: int, cols: int, bits: int, group_size: int | None, zero_bits: int) -> int:
    """Bits of `[rows, cols]` codes with a 16-bit scale and a zero of `zero_bits` per group, or per row without groups.

    Codes count as they are, without the gaps that some packages leave between them in memory.
    """
    group = group_size or cols
    if cols % group:
        raise ValueError(f"{cols} inputs are not a multiple of {group}: take a row with smaller groups")
    return rows * cols * bits + rows * cols // group * (FLOAT_BITS + zero_bits)


def full_weights(request: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and the float32 weight `[N, K]` of every linear to round."""
    wanted = set(request["linears"])
    for file in sorted(Path(request["reference"]).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.removesuffix(".weight") in wanted and name.endswith(".weight"):
                yield name.removesuffix(".weight"), tensor.float()


def load_model(request: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(request["reference"], dtype=dtype).eval()


def hqq(request: dict[str, Any]) -> Answer:
    """Half-quadratic quantization: no calibration, zeros that are no integers."""
    from hqq.core.quantize import Quantizer

    settings, decoded = request["settings"], {}
    for name, weight in full_weights(request):
        codes, meta = Quantizer.quantize(
            weight,
            nbits=settings["bits"],
            group_size=settings["group_size"],
            axis=1,
            bitpack=False,
            device="cpu",
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        decoded[name] = ((codes.float() - zero) * scale).view_as(weight)
    return decoded, {"zero_bits": FLOAT_BITS}


def torchao(request: dict[str, Any]) -> Answer:
    """Rounding to nearest as torchao does it on a CPU: integers per group, or per row."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    settings, decoded = request["settings"], {}
    kind = MappingType.SYMMETRIC if settings["symmetric"] else MappingType.ASYMMETRIC
    config: Any
    if settings["group_size"] is None:
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        dtype = getattr(torch, f"int{settings['bits']}")
        config = IntxWeightOnlyConfig(
            weight_dtype=dtype,
            granularity=PerGroup(settings["group_size"]),
            mapping_type=kind,
            scale_dtype=torch.bfloat16,
        )
    for name, weight in full_weights(request):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(linear, config)
        packed: Any = linear.weight
        packed.scale = packed.scale.half().float()
        decoded[name] = packed.dequantize().float()
    return decoded, {"zero_bits": 0 if settings["symmetric"] else settings["bits"]}


def auto_round(request: dict[str, Any]) -> Answer:
    """SignRound: rounding and ranges learned layer by layer on the calibration windows."""
    from auto_round import AutoRound

    settings = request["settings"]
    windows = load_file(request["windows"])["windows"]
    model = load_model(request, torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request["reference"]),
        scheme=f"W{settings['bits']}A16",
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        dataset=[window[None] for window in windows],
        iters=settings["iters"],
        lr=settings["lr"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=settings["batch_size"],
        device_map="cpu",
    )
    model, _ = rounding.quantize()
    decoded = {}
    for name in request["linears"]:
        linear: Any = model.get_submodule(name)
        scale = linear.scale.half().float().reshape(-1, 1)
        # The weights that it leaves are in bfloat16; the codes, which are integers all the same, decode to more digits.
        codes = (linear.weight.detach().float().reshape(len(scale), -1) / linear.scale.float().reshape(-1, 1)).round()
        decoded[name] = (codes * scale).view(linear.weight.shape)
    return decoded, {"zero_bits": 0 if settings["symmetric"] else settings["bits"]}


def gptq(request: dict[str, Any]) -> Answer:
    """GPTQ by GPTQModel with its defaults: every linear of a layer on what the rounded layers before it give."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings = request["settings"]
    if not settings["symmetric"]:
        raise ValueError("only symmetric codes are read")
    asked = {"bits": settings["bits"], "group_size": settings["group_size"], "sym": settings["symmetric"]}
    config = QuantizeConfig(**asked, offload_to_disk=False)
    model = GPTQModel.load(request["reference"], config, device="cpu", dtype=torch.float32)
    windows = load_file(request["windows"])["windows"]
    rows = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    model.quantize(rows, batch_size=settings["batch_size"], backend=BACKEND.TORCH)
    decoded = {}
    for name in request["linears"]:
        linear: Any = model.model.get_submodule(name)
        linear.scales = linear.scales.half().float()
        # Zeros are kept less one until a checkpoint is loaded; all of symmetric codes are the middle.
        linear.qzeros = torch.zeros_like(linear.qzeros)
        middle = 2.0 ** (settings["bits"] - 1) * linear.scales[linear.g_idx.long()]
        decoded[name] = (linear.dequantize_weight() - middle).T.float()
    return decoded, {"zero_bits": 0}


METHODS: dict[str, tuple[str, Callable[[dict[str, Any]], Answer]]] = {
    "hqq": ("hqq", hqq),
    "torchao": ("torchao", torchao),
    "auto_round": ("auto-round", auto_round),
    "gptq": ("gptqmodel", gptq),
}


def answer(request: dict[str, Any]) -> None:
    """Do what a request says; its weights appear once all is written. Raises `ValueError` for what does not fit."""
    package, method = METHODS[request["method"]]
    settings = request["settings"]
    # Before the work, which may be long.
    for _, weight in full_weights(request):
        code_bits(*weight.shape, settings["bits"], settings["group_size"], 0)
    started = time.monotonic()
    decoded, facts = method(request)
    missing = set(request["linears"]) - set(decoded)
    if missing:
        raise ValueError(f"{package} left {len(missing)} linears as they were: {sorted(missing)[0]}, ...")
    zero_bits = facts.pop("zero_bits")
    bits = sum(
        code_bits(*weight.shape, settings["bits"], settings["group_size"], zero_bits) for weight in decoded.values()
    )
    packages = ("torch", "transformers", package)
    facts |= {
        "bits": bits,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    output = Path(request["output"])
    output.with_suffix(".json").write_text(json.dumps(facts))
    part = output.with_suffix(".part")
    save_file({name: weight.contiguous() for name, weight in decoded.items()}, part)
    part.replace(output)


if __name__ == "__main__":
    answer(json.loads(Path(sys.argv[1]).read_text()))
