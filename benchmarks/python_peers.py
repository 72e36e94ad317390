"""Gives a model's linears the rounding of other Python packages, to be evaluated beside fewbit's.

The packages run in environments of their own under `build/`, made on first use with the versions below, and are
given the model's directory and fewbit's calibration windows (see peers/quantize.py). Embeddings and head stay as they
are, since it is the decoder layers that are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import run
from quantizers import OTHER_BITS, WINDOW, input_widths, linears
from safetensors.torch import load_file, save_file
from torch import nn

from fewbit.checkpoint.source import Source, open_source
from fewbit.models import get_family
from fewbit.pipeline.texts import CalibrationText, calibration_windows

RUNNER = Path(__file__).resolve().parent / "peers" / "quantize.py"
BUILD = Path(__file__).resolve().parent.parent / "build"
# A looser torch may be a CUDA build of several gigabytes.
COMMON = ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0", "safetensors==0.8.0")


@dataclass(frozen=True)
class Packages:
    """What an environment under `build/` holds: `tools` first, and `packages`, which see the tools when they are built
    unless they are `isolated`."""

    name: str
    tools: tuple[str, ...]
    packages: tuple[str, ...]
    isolated: bool = True


USUAL = Packages(
    "python-peers", (*COMMON, "numpy==2.4.6"), ("hqq==0.2.8.post1", "torchao==0.18.0", "auto-round==0.16.1")
)
# Newer ones that were tried cannot be imported beside this torch for CPUs: 6.0.3 asks transformers for a function that
# is gone, 7.3.6 needs torchvision, whose wheel is for CUDA, and 7.7.0 a newer torch.
GPTQ = Packages(
    "gptq-peer", (*COMMON, "numpy==2.2.6", "setuptools<82", "wheel", "requests"), ("gptqmodel==5.8.0",), False
)


@dataclass(frozen=True)
class PythonRecipe:
    """What a package is asked for: codes of `bits` with a scale per `group_size` inputs, or per row where it is None.

    `symmetric` codes have no zero. `extra` holds settings that the method has alone. A method that is `calibrated`
    reads the calibration windows.
    """

    method: str
    bits: int
    group_size: int | None
    symmetric: bool = False
    calibrated: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    environment: Packages = USUAL

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric, **self.extra}

    def options(self, calib_tokens: int) -> dict[str, Any]:
        """What a row of results says about how it was made."""
        recipe = {name: value for name, value in asdict(self).items() if name != "environment"}
        return {**recipe, "calib_tokens": calib_tokens if self.calibrated else 0, "dtype": "float32"}


# AutoRound's own light recipe; its default is 200 steps, which take four times as long.
LIGHT = {"iters": 50, "lr": 5e-3, "batch_size": 8}

PYTHON_PEERS = {
    "torchao int8": PythonRecipe("torchao", 8, None, symmetric=True),
    **{f"torchao int4 g{group}": PythonRecipe("torchao", 4, group, symmetric=True) for group in (64, 128)},
    **{f"torchao int4 with zeros g{group}": PythonRecipe("torchao", 4, group) for group in (64, 128)},
    **{f"HQQ {bits} bits g{group}": PythonRecipe("hqq", bits, group) for bits in (3, 4) for group in (64, 128)},
    **{
        f"GPTQModel {bits} bits g{group}": PythonRecipe("gptq", bits, group, True, True, {"batch_size": 4}, GPTQ)
        for bits in (3, 4)
        for group in (64, 128)
    },
    **{
        f"AutoRound {bits} bits g{group}": PythonRecipe("auto_round", bits, group, True, True, LIGHT)
        for bits in (3, 4)
        for group in (64, 128)
    },
}


def fitting(source: Source) -> list[str]:
    """The rows whose groups divide the inputs of every linear in the layers of a model."""
    inputs = input_widths(source)
    return [
        name
        for name, recipe in PYTHON_PEERS.items()
        if recipe.group_size is None or all(cols % recipe.group_size == 0 for cols in inputs)
    ]


def interpreter(environment: Packages) -> Path:
    """The Python of an environment, which is made if it is missing or holds other versions."""
    directory = BUILD / environment.name
    python, marker = directory / "bin" / "python", directory / ".packages"
    packages = "\n".join((*environment.tools, *environment.packages))
    if not marker.exists() or marker.read_text() != packages:
        base = getattr(sys, "_base_executable", sys.executable)
        run([base, "-m", "venv", "--clear", str(directory)], "make an environment")
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input"]
        run([*pip, *environment.tools], f"install {', '.join(environment.tools)}")
        isolation = [] if environment.isolated else ["--no-build-isolation"]
        run([*pip, *isolation, *environment.packages], f"install {', '.join(environment.packages)}")
        marker.write_text(packages)
    return python


def peer_weights(
    reference: Path, recipe: PythonRecipe, files: Sequence[Path], calib_tokens: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights that a package decodes to, float32 `[N, K]` by name of the linear, and the facts in its answer.

    Ends the benchmark with the package's own last words where it fails.
    """
    source = open_source(reference)
    config = source.config
    names = [name for _, name in linears(get_family(config.model_type), config.num_hidden_layers)]
    python = interpreter(recipe.environment)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        request = {
            "method": recipe.method,
            "settings": recipe.settings(),
            "reference": str(reference),
            "linears": names,
            "output": str(place / "weights.safetensors"),
        }
        if recipe.calibrated:
            windows, _ = calibration_windows(source, [CalibrationText(file) for file in files], calib_tokens, WINDOW)
            request["windows"] = str(place / "windows.safetensors")
            save_file({"windows": windows}, place / "windows.safetensors")
        (place / "request.json").write_text(json.dumps(request))
        # Nothing is to be fetched: model, tokenizer and text are all here. Some packages write where they stand.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        command = [str(python), str(RUNNER), str(place / "request.json")]
        done = subprocess.run(
            command, cwd=scratch, env=environment, capture_output=True, text=True, check=False, errors="replace"
        )
        if done.returncode:
            words = "\n".join((done.stderr.strip() or f"exit {done.returncode}").splitlines()[-20:])
            raise SystemExit(f"python_peers: {recipe.method} failed:\n{words}")
        facts = json.loads((place / "weights.json").read_text())
        return load_file(place / "weights.safetensors"), facts


@torch.no_grad()
def replace(
    model: nn.Module, source: Source, weights: dict[str, torch.Tensor], facts: dict[str, Any]
) -> dict[str, Any]:
    """Put a package's weights into the linears of `model`, which is that of `source`, in place; what the row says.

    Raises `ValueError` where a linear of the layers is missing, has another shape, or holds what is no number.
    """
    config = source.config
    for _, name in linears(get_family(config.model_type), config.num_hidden_layers):
        linear: Any = model.get_submodule(name)
        found = weights.get(name)
        if found is None or found.shape != linear.weight.shape or not bool(found.isfinite().all()):
            what = "nothing" if found is None else f"{list(found.shape)}, finite: {bool(found.isfinite().all())}"
            raise ValueError(f"{name}: the peer's answer holds {what} instead of {list(linear.weight.shape)} numbers")
        linear.weight = nn.Parameter(found.to(linear.weight.dtype), requires_grad=False)
    body = sum(weight.numel() for weight in weights.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - body
    bits = {"body": facts["bits"] / body, "total": (facts["bits"] + OTHER_BITS * others) / (body + others)}
    return {
        "peer": " ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "bits_per_weight": bits,
        "quantize_seconds": facts["seconds"],
    }
