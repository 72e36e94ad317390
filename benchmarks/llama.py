"""Builds llama.cpp's own tools from the sources that peers.py fetches, and makes files for them.

`llama-bench` measures how fast a file is decoded, and `llama-quantize` makes files of its types out of another one.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from peers import cmake_build, fetch, run

from fewbit.assets import default_cache_dir

SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
}
# GCC 12 drops stores to the tile configuration, and ggml's AMX kernels crash with it.
NO_AMX = "-mno-amx-tile"
TOOLS = ("llama-bench", "llama-quantize")


def tools() -> Path:
    """The directory of the built tools."""
    cache = default_cache_dir() / "peers"
    flags = {"CMAKE_C_FLAGS": NO_AMX, "CMAKE_CXX_FLAGS": NO_AMX} if accepted(NO_AMX) else {}
    return cmake_build(fetch(cache), cache, "llama", {**SETTINGS, **flags}, list(TOOLS)) / "bin"


def accepted(flag: str) -> bool:
    """Whether the compiler, which other processors have others of, knows a flag."""
    command = [os.environ.get("CXX", "c++"), flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def made_file(source: Path, kind: str, directory: Path) -> Path:
    """A GGUF file in one of llama.cpp's types ("Q4_K_M", ...), made once from a file of any type.

    The source may be rounded already, and types that ask for an importance matrix are given none: how fast they are
    depends on neither.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{kind}.gguf"
    if target.exists():
        return target
    part = target.with_suffix(".part")
    command = [str(tools() / "llama-quantize"), "--allow-requantize", str(source), str(part), kind]
    run(command, f"quantize to {kind}")
    os.replace(part, target)
    return target


def speeds(file: Path, prompt: int, generated: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """What llama-bench reports of one file: a row for the prompt and one for the tokens after it."""
    numbers = ["-p", str(prompt), "-n", str(generated), "-t", str(threads), "-r", str(repeats)]
    command = [str(tools() / "llama-bench"), "-m", str(file), *numbers, "-ngl", "0", "-o", "json"]
    return json.loads(run(command, f"measure {file.name}"))
