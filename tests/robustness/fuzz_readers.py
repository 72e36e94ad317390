"""Readers of headers and JSON under atheris: anything but an answer or a typed error ends the run (scripts/fuzz.sh)."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fewbit"]):
    from fewbit.checkpoint.artifact import checked_record, modules_from_json
    from fewbit.checkpoint.damage import indexed_files, parse_json
    from fewbit.checkpoint.gguf_source import check_header
    from fewbit.checkpoint.tensors import SafetensorsFile
    from fewbit.errors import FewbitError
    from fewbit.pipeline.plan import Plan

HERE = Path(tempfile.mkdtemp(prefix="fewbit-fuzz-"))
SPEC = {"format": "trellis", "bits": 3, "rows": 64, "cols": 64, "block": 64, "group": 64}
SEEDS = (
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    {"weight_map": {"a": "model.safetensors"}},
    {"a": {"kind": "body", **SPEC}},
    {"options": {}, "source_fingerprint": "", "tensors": [{"name": "a", "kind": "body", "sha256": "", "bytes": 1,
     "weights": 1, "shape": [1], "format": "", "bits": 0, "dtype": "float32"}]},
    {"source": "", "model_type": "llama", "fingerprint": "", "options": {}, "tensors": [
        {"name": "a.weight", "shape": [64, 64], "kind": "body", "bytes": 1, "spec": SPEC}]},
)  # fmt: skip


def read_safetensors(data: bytes) -> None:
    file = HERE / "x.safetensors"
    size = data.find(b"\n") if b"\n" in data else len(data)
    file.write_bytes(size.to_bytes(8, "little") + data[:size] + data[size + 1 :])
    found = SafetensorsFile(file)
    for name in found.tensors:
        found.read(name)


def read_index(data: bytes) -> None:
    file = HERE / "model.safetensors.index.json"
    file.write_bytes(data)
    indexed_files(file)


def read_gguf(data: bytes) -> None:
    file = HERE / "x.gguf"
    file.write_bytes(b"GGUF\3\0\0\0" + data)
    check_header(file)


READERS = (
    read_safetensors,
    read_index,
    read_gguf,
    lambda data: modules_from_json(parse_json(data, HERE)),
    lambda data: checked_record(parse_json(data, HERE), HERE),
    lambda data: Plan.from_json(parse_json(data, HERE)),
)


def one(data: bytes) -> None:
    if not data:
        return
    with contextlib.suppress(FewbitError):
        READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    for number, reader in enumerate((0, 1, 3, 4, 5)):
        (corpus / f"seed-{number}").write_bytes(bytes([reader]) + json.dumps(SEEDS[number]).encode())
    (corpus / "seed-gguf").write_bytes(b"\2" + b"\0" * 16)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
