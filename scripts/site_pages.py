"""Pages of the documentation's site that are not files in docs: the README, the changes, and the Python reference."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {
    "Using it": ("fewbit.loading", "fewbit.pipeline.options", "fewbit.pipeline.run", "fewbit.errors"),
    "Generating": ("fewbit.runtime.engine", "fewbit.runtime.sampling"),
    "Measuring": ("fewbit.evaluate.perplexity", "fewbit.evaluate.offgrid"),
    "Formats": ("fewbit.formats.base", "fewbit.math.hadamard", "fewbit.math.rounding"),
    "Operators": ("fewbit.ops.reference",),
}


def on_files(files: Files, config: Any) -> Files:
    for path, text in (("index.md", _readme()), ("changes.md", _changes()), ("reference.md", _reference())):
        files.append(File.generated(config, path, content=text))
    return files


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _readme() -> str:
    """The README with links as they are from inside docs; files that are no pages lead nowhere and lose theirs."""
    text = _read("README.md").replace("](docs/", "](").replace("](CHANGELOG.md)", "](changes.md)")
    return re.sub(r"\[([^\]]+)\]\((?!\w+\.md|images/|#|https?:)[^)]+\)", r"\1", text)


def _changes() -> str:
    return _read("CHANGELOG.md").replace("](docs/", "](")


def _reference() -> str:
    parts = ["# Python reference\n"]
    for title, modules in REFERENCE.items():
        parts.append(f"\n## {title}\n")
        parts += [f"\n::: {module}\n    options: {{heading_level: 3}}\n" for module in modules]
    return "".join(parts)
