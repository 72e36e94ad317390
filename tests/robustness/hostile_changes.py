"""Damages files as an attacker or a bad disk would, knowing where their structure hurts.

Files are a dictionary of names to bytes, or to a `Link`. Every change is a function of `random.Random`, so that a case
is repeated from its number.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Link:
    """A symbolic link instead of a file."""

    target: str


Files = dict[str, "bytes | Link"]

INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64,
            10**30)  # fmt: skip
ESCAPES = ("../outside/secret", "../../outside/secret", "/etc/passwd", "..", ".", "", "a/b.safetensors", "x\0y", "\\x",
           "x" * 5000, "\ud800", "model.safetensors/../../outside/secret")  # fmt: skip
VALUES: tuple[Any, ...] = (*INTEGERS, *ESCAPES, None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), {},
                           [], [[]], [1, "a"], {"a": 1}, [0] * 999, "gpt2", "F64", "I8", "F8_E4M3")  # fmt: skip
TEXTS = ("", "{", "null", "[]", "3", '"x"', "NaN", "1" * 6000, "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "{}" * 2)
LINKS = ("/dev/zero", "/dev/null", "/etc/passwd", ".", "..", "nowhere", "config.json", "../outside/secret")
WORDS = tuple(struct.pack("<q", value) for value in INTEGERS if -(2**63) <= value < 2**63)
NUMBERS = (b"\xff\xff", b"\x00\x7c", b"\x00\x7e", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f")
HEADER = 4096  # bytes of a GGUF file that hold most of what says how to read the rest


def change(random: Random, files: Files) -> Files:
    """A copy with one to three changes, most of them to one file."""
    found = dict(files)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(sorted(found))
        data = found[name]
        if isinstance(data, Link) or random.random() < 0.05:
            _replace(random, found, name)
        else:
            found[name] = changed(random, name, data)
    return found


def changed(random: Random, name: str, data: bytes) -> bytes:
    """Another content of the file of that name."""
    by_suffix: dict[str, tuple[Callable[[Random, bytes], bytes], ...]] = {
        ".json": (json_value, json_value, json_value, json_value, json_text, raw),
        ".safetensors": (tensor_header, tensor_header, tensor_header, tensor_data, raw),
        ".gguf": (gguf_field, gguf_field, gguf_field, raw),
    }
    return random.choice(by_suffix.get(Path(name).suffix, (raw,)))(random, data)


def raw(random: Random, data: bytes) -> bytes:
    """Bits flipped, pieces cut out, doubled, overwritten or cut off."""
    found = bytearray(data)
    kind = random.randrange(6)
    at = random.randrange(len(found) + 1)
    size = min(random.choice((1, 2, 8, 64, 4096)), len(found) - at)
    if kind == 0:
        for _ in range(random.choice((1, 1, 8)) if found else 0):
            found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    elif kind == 1:
        found[at : at + size] = random.choice((b"\0", b"\xff", random.randbytes(1))) * size
    elif kind == 2:
        del found[at:]
    elif kind == 3:
        found[at:at] = found[at : at + size] * random.choice((1, 100))
    elif kind == 4:
        del found[at : at + size]
    else:
        found += random.randbytes(random.choice((1, 7, 4096)))
    return bytes(found)


def json_text(random: Random, data: bytes) -> bytes:
    """Something that is no JSON, or another kind of it."""
    return random.choice(TEXTS).encode("utf-8", "surrogatepass")


def json_value(random: Random, data: bytes) -> bytes:
    """One value of a JSON text replaced, removed, moved or given twice."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return raw(random, data)
    text = json.dumps(_edited(random, tree))
    if random.random() < 0.05 and text.startswith("{"):
        text = '{"' + random.choice(("model_type", "tensors", "modules", "weight_map")) + '": 0, ' + text[1:]
    return text.encode()


def _edited(random: Random, tree: Any) -> Any:
    nodes = list(_nodes(tree))
    if not nodes:
        return random.choice(VALUES)
    # Long lists of one kind would otherwise take all the changes.
    depth = random.choice(sorted({depth for depth, _, _ in nodes}))
    _, parent, key = random.choice([node for node in nodes if node[0] == depth])
    kind = random.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice((*ESCAPES[:8], str(key) + "x"))] = parent.pop(key)
    elif kind == 2:
        _, other, place = random.choice(nodes)
        parent[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(parent[key], int | float):
        parent[key] = random.choice((-parent[key], parent[key] + 1, parent[key] * 2, parent[key] - 1, str(parent[key])))
    else:
        parent[key] = random.choice(VALUES)
    return tree


def _nodes(tree: Any, depth: int = 0) -> Any:
    """Every value with its depth, its parent and its key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield depth, tree, key
        yield from _nodes(value, depth + 1)


def tensor_header(random: Random, data: bytes) -> bytes:
    """Another header of a safetensors file, with its length right or wrong."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(6)
    if kind == 0:
        header = json_text(random, header)
    elif kind == 1:
        return random.choice(WORDS) + data[8:]
    elif kind == 2:
        header = _swapped(random, header)
    else:
        header = json_value(random, header)
    return len(header).to_bytes(8, "little") + header + rest


def _swapped(random: Random, header: bytes) -> bytes:
    """Two tensors with each other's places, shapes or types: files that agree in themselves."""
    try:
        tree = json.loads(header)
        names = sorted(name for name in tree if name != "__metadata__")
        one, other = random.choice(names), random.choice(names)
        field = random.choice(("data_offsets", "shape", "dtype"))
        if random.random() < 0.5:
            tree[one], tree[other] = tree[other], tree[one]
        elif field == "shape":
            tree[one][field] = random.choice((tree[one][field][::-1], [1, *tree[one][field]], [*tree[one][field], 1]))
        else:
            tree[one][field], tree[other][field] = tree[other][field], tree[one][field]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return raw(random, header)
    return json.dumps(tree).encode()


def tensor_data(random: Random, data: bytes) -> bytes:
    """Other numbers behind an honest header: random ones, NaN, infinity or the largest."""
    start = min(8 + int.from_bytes(data[:8], "little"), len(data))
    found = bytearray(data)
    for _ in range(random.choice((1, 50))):
        at = start + random.randrange(max(1, len(data) - start)) // 4 * 4
        piece = random.choice(NUMBERS) * random.choice((1, 64)) if random.random() < 0.8 else random.randbytes(256)
        found[at : at + len(piece)] = piece
    return bytes(found[: len(data)])


def gguf_field(random: Random, data: bytes) -> bytes:
    """A count, length, type or value of a GGUF header replaced, or a name changed."""
    found = bytearray(data)
    end = min(HEADER, len(found))
    if end < 32:
        return raw(random, data)
    kind = random.randrange(4)
    if kind == 0:
        at = random.choice((4, 8, 16))
    elif kind == 1:
        # Behind a known word stand its type and its value, or its dimensions.
        words = [word for word in (b".count", b"_length", b"head_count", b"epsilon", b"base", b"weight", b"tokens",
                                   b"merges", b"token_id", b"token_type") if word in data]  # fmt: skip
        if not words:
            return raw(random, data)
        word = random.choice(words)
        at = data.index(word) + len(word) + random.choice((0, 4, 8, 12))
    else:
        at = random.randrange(24, end)
    piece = random.choice(WORDS)[: random.choice((1, 4, 8))] if kind < 3 else random.randbytes(random.choice((1, 4)))
    found[at : at + len(piece)] = piece
    return bytes(found)


def _replace(random: Random, files: Files, name: str) -> None:
    """A file that is missing, a link, or another file's content."""
    kind = random.randrange(3)
    if kind == 0:
        del files[name]
        if not files:
            files["empty"] = b""
    elif kind == 1:
        files[name] = Link(random.choice(LINKS))
    else:
        files[name] = files[random.choice(sorted(files))]


def read_files(directory: Path) -> Files:
    """The files of a directory and those below it."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def write_files(files: Files, directory: Path) -> int:
    """Write them and return how many bytes they have."""
    total = 0
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Link):
            path.symlink_to(data.target)
        else:
            path.write_bytes(data)
            total += len(data)
    return total
