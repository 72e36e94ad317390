"""What this installation is and what it found on the machine.

Used by `fewbit info` and, in every published result, to say where a figure comes from.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from fewbit import __version__
from fewbit.formats import format_names
from fewbit.models import families
from fewbit.ops.extension import load_native
from fewbit.torch_later import torch

_PACKAGES = ("torch", "transformers", "safetensors", "gguf", "numpy")


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                facts[name.strip()] = value.strip()
    except OSError:
        pass
    return facts


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def cpu_revision() -> str:
    """Which processor it is where the name leaves that open, as x86 counts them; empty elsewhere."""
    facts, parts = _cpu_facts(), ("cpu family", "model", "stepping")
    return ", ".join(f"{part} {facts[part]}" for part in parts if part in facts).removeprefix("cpu ")


def memory_bytes() -> int | None:
    """The machine's memory, where the system tells it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def multiplies_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 faster than float32 here.

    With AMX, and on AMD's processors that have the AVX-512 instructions for it (twice as fast where it was measured);
    on Intel's that have no more than those it was half as fast.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and cpu_name().startswith("AMD")


def environment() -> dict[str, Any]:
    """Versions, processor, instruction sets, formats and families, ready for JSON."""
    native = load_native()
    return {
        "fewbit": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_revision": cpu_revision(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "native_extension": native is not None,
        "isa": native.isa() if native else "torch",
        "available_isas": list(native.available_isas()) if native else [],
        "formats": list(format_names()),
        "families": sorted(name for family in families() for name in family.model_types),
    }
