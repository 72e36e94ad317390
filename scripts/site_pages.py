"""Pages of the documentation's site that are not files in docs: the README, the changes, the examples' code, and the
Python reference."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {
    "Using it": ("fewbit.loading", "fewbit.pipeline.options", "fewbit.pipeline.run", "fewbit.errors"),
    "Generating": (
        "fewbit.runtime.engine",
        "fewbit.runtime.sampling",
        "fewbit.runtime.decoder",
        "fewbit.runtime.batch",
    ),
    "Measuring": ("fewbit.evaluate.perplexity", "fewbit.evaluate.tasks", "fewbit.evaluate.offgrid"),
    "Formats": ("fewbit.formats.base", "fewbit.formats.trellis", "fewbit.formats.twinquant"),
    "Mathematics": (
        "fewbit.math.hadamard",
        "fewbit.math.rounding",
        "fewbit.math.lowrank",
        "fewbit.math.manifolds",
    ),
    "Families": ("fewbit.models.base",),
    "Operators": ("fewbit.ops.reference",),
}
_EXAMPLE_LINK = re.compile(r"\]\((?:\.\./)?examples/(\w+)\.py\)")


def on_files(files: Files, config: Any) -> Files:
    made = {"index.md": _readme(), "changes.md": _changes(), "examples.md": _examples(), "reference.md": _reference()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _to_examples(markdown)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _to_examples(text: str) -> str:
    """Links to scripts, which are no pages, lead to their code."""
    return _EXAMPLE_LINK.sub(r"](examples.md#\1py)", text)


def _readme() -> str:
    """The README with links as they are from inside docs; files that are no pages lead nowhere and lose theirs."""
    text = _to_examples(_read("README.md")).replace("](docs/", "](").replace("](CHANGELOG.md)", "](changes.md)")
    return re.sub(r"\[([^\]]+)\]\((?!\w+\.md|images/|#|https?:)[^)]+\)", r"\1", text)


def _changes() -> str:
    return _read("CHANGELOG.md").replace("](docs/", "](")


def _examples() -> str:
    parts = ["# Examples\n\nScripts to start from, in the repository's directory `examples`.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"\n## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    return "".join(parts)


def _reference() -> str:
    parts = ["# Python reference\n"]
    for title, modules in REFERENCE.items():
        parts.append(f"\n## {title}\n")
        parts += [f"\n::: {module}\n    options: {{heading_level: 3}}\n" for module in modules]
    return "".join(parts)
