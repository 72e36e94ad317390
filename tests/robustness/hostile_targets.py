"""What reads files that come from elsewhere: every way into fewbit, as a function of a directory and an output.

Each opens everything there is to open and, where the files make a model, runs one forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_seeds import PLAN_OPTIONS

from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.export import export
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import load_tokenizer, open_source
from fewbit.checkpoint.store import read_tensors
from fewbit.checkpoint.tensors import SafetensorsFile
from fewbit.errors import FewbitError
from fewbit.loading import load, load_any
from fewbit.pipeline.jobs import PLAN_FILE, RoundJob, read_shard, round_tensor
from fewbit.pipeline.plan import Plan
from fewbit.pipeline.run import Placement, quantize
from fewbit.pipeline.workdir import earlier_plan
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import open_decoder
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams
from fewbit.runtime.tokenizer import open_tokenizer

TEXT = "Some words (12)."
Target = Callable[[Path, Path], None]


def _forward(model: Any) -> None:
    with torch.no_grad():
        model(torch.tensor([[0]]))


def safetensors(path: Path, out: Path) -> None:
    for file in sorted(path.rglob("*.safetensors")):
        held = SafetensorsFile(file)
        for name in held.tensors:
            held.read(name)
        read_tensors(file)


def source(path: Path, out: Path) -> None:
    found = open_source(path)
    for name in found.names():
        found.tensor(name)
    found.fingerprint()
    found.tokenizer()


def plain(path: Path, out: Path) -> None:
    _forward(load_plain(open_source(path)))


def inspect(path: Path, out: Path) -> None:
    json.dumps(Artifact.open(path).inspect())


def verify(path: Path, out: Path) -> None:
    list(Artifact.open(path).verify())


def loading(path: Path, out: Path) -> None:
    model, _ = load(path)
    _forward(model)


def loading_any(path: Path, out: Path) -> None:
    model, _ = load_any(path)
    _forward(model)


def decoder(path: Path, out: Path) -> None:
    found, _ = open_decoder(path, threads=1, block=8)
    start = np.array([0], np.int32)
    found.forward(Batch(start, start, start, start))


def engine(path: Path, out: Path) -> None:
    with Engine(path, threads=1, slots=1, block=32) as found:
        found.generate(TEXT, SamplingParams(max_tokens=2, temperature=0.0))


def exported(path: Path, out: Path) -> None:
    export(path, out / "exported")


def quantized(path: Path, out: Path) -> None:
    quantize(path, out / "quantized", PLAN_OPTIONS)


def tokenizer(path: Path, out: Path) -> None:
    found = open_tokenizer(path, "llama")
    if found is not None:
        found.decode(found(TEXT)["input_ids"])
    load_tokenizer(path)


def plan(path: Path, out: Path) -> None:
    """Every job of a plan, in a work directory that is itself the output."""
    work = path / "work"
    Plan.load(work / PLAN_FILE)
    found = earlier_plan(work)
    for tensor in found.quantized if found else ():
        read_shard(work, found, tensor)
        round_tensor(RoundJob(str(work), tensor.name))


def resumed(path: Path, out: Path) -> None:
    placement = Placement(work=path / "work")
    quantize(path / "source", out / "quantized", PLAN_OPTIONS, placement=placement)


_MODEL: tuple[Target, ...] = (source, plain, decoder, engine, exported, quantized)
_CHECKPOINT: tuple[Target, ...] = (inspect, verify, loading, decoder, engine, exported, safetensors)
TARGETS: dict[str, tuple[Target, ...]] = {
    "plain": (*_MODEL, loading_any, safetensors),
    "sharded": _MODEL,
    "trellis": _CHECKPOINT,
    "twinquant": _CHECKPOINT,
    "gguf": _MODEL,
    "tokenizer": (tokenizer,),
    "plan": (plan, resumed),
}
"""Ways in, by the kind of files (`hostile_seeds.make_seeds`)."""

MAY_WRITE = {"plan": ("work",), "resumed": ("work", "work.lock")}
"""What of the input belongs to the run and is written to."""

TYPED = FewbitError
