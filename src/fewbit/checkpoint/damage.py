"""Reads what files say of themselves so that nothing behind has to doubt it: JSON, sizes, what libraries stumble over.

A damaged or hostile file ends in `CorruptFile` here, whatever a library makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbit.checkpoint.tensors import first_line
from fewbit.errors import CorruptFile, FewbitError

MOST = (1 << 31) - 1
_LARGE_JSON = 1 << 26
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "sliding_window",
)
_FREE = ("max_position_embeddings", "sliding_window")  # no tensor has them as a dimension


@contextmanager
def damage_named(path: Path, remedy: str = "copy it again") -> Iterator[None]:
    """Whatever a library raises inside, for what a file holds, becomes `CorruptFile` with the path and the remedy."""
    try:
        yield
    except (FewbitError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise CorruptFile(f"{path}: {first_line(error)}; {remedy}") from error


def parse_json(text: str | bytes, path: Path, remedy: str = "make the checkpoint again") -> Any:
    """What a JSON text says; raises `CorruptFile` where it is none, or one nested too deep, with absurd numbers or with
    halves of characters, which no file can be written with."""
    try:
        found = json.loads(text)
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not JSON ({first_line(error)}); {remedy}") from error


def read_json(path: Path, remedy: str = "make the checkpoint again") -> Any:
    """Read JSON; raises `CorruptFile` where the file is none."""
    # A link may lead to a device, which never ends.
    if not path.is_file():
        raise CorruptFile(f"{path} is missing, or no plain file; {remedy}")
    try:
        if path.stat().st_size > _LARGE_JSON:
            raise CorruptFile(f"{path} is larger than any honest file of its kind; {remedy}")
        return parse_json(path.read_bytes(), path, remedy)
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def read_object(path: Path, remedy: str = "make the checkpoint again") -> dict[str, Any]:
    """The same for a file that holds a JSON object."""
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise CorruptFile(f"{path} holds no settings; {remedy}")
    return found


def shards(index: Path) -> dict[str, set[str]]:
    """The shards that an index names, to the tensors that it promises in each."""
    weight_map = read_object(index, "download the model again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{index}: not an index of shards; download the model again")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # Plain names only: links inside the directory are fine (the hub's cache is made of them).
        if not isinstance(file, str) or not _is_shard(file):
            raise CorruptFile(f"{index}: shard {shortened(file)} is not a plain .safetensors name in this directory")
        files.setdefault(file, set()).add(name)
    return files


def indexed_files(index: Path) -> dict[str, set[str]]:
    """The same, with all shards in the index's directory."""
    files = shards(index)
    for file in files:
        if not (index.parent / file).is_file():
            raise CorruptFile(f"{index.parent / file}: missing, though the index names it; download the model again")
    return files


def _is_shard(name: str) -> bool:
    plain = Path(name).name == name and name.isprintable() and "\\" not in name
    return plain and name.endswith(".safetensors") and len(name) < 256


def tried(tokenizer: Any) -> Any:
    """A tokenizer, after it encoded and decoded a text: libraries notice some damage no earlier."""
    tokenizer.decode(tokenizer("a")["input_ids"])
    return tokenizer


def is_size(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number that memory and native code can count."""
    return type(value) is int and least <= value <= MOST


def check_config(config: Any, weights: int, tensors: Collection[str], path: Path) -> None:
    """Refuse a configuration with sizes that no model of so many `weights` and `tensors` has.

    A model is built from its configuration, so that an absurd one would take the machine's memory before anything is
    compared with the files. `config` is one of transformers or its plain fields. Raises `CorruptFile`.
    """
    for name in _SIZES:
        value = getattr(config, name, None)
        # Some families have lists here; what makes no model at all is named when the model is built.
        if type(value) is not int:
            continue
        most = len(tensors) if name == "num_hidden_layers" else MOST if name in _FREE else weights
        if not 0 <= value <= most:
            raise CorruptFile(
                f"{path}: {name} is {shortened(value)}, and the files hold {len(tensors)} tensors with {weights} "
                "weights; copy config.json from the model"
            )


def shortened(value: Any) -> str:
    """A value that a file holds, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."
