"""The published tables say what the committed results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_tables():
    spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_documentation_agrees_with_the_results():
    tables = load_tables()
    marked = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        marked += len(tables.MARKED.findall(text))
        assert tables.filled(text) == text, f"{page.name} is out of date: run python benchmarks/tables.py"
    assert marked >= 2
