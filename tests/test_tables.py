"""The published tables say what the committed results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """As for a script that is run: modules of its directory are found."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_s_picture_shows_what_the_results_say():
    pictures = load("pictures")
    assert "(docs/images/quality.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
    (description,) = ElementTree.parse(pictures.PICTURE).iter("{http://purl.org/dc/elements/1.1/}description")
    assert json.loads(description.text) == json.loads(json.dumps(pictures.points())), "run make tables"


def test_every_table_of_the_documentation_agrees_with_the_results():
    tables = load("tables")
    marked = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        marked += len(tables.MARKED.findall(text))
        assert tables.filled(text) == text, f"{page.name} is out of date: run python benchmarks/tables.py"
    assert marked >= 2


def gemv(weights: int, megabytes: float, median: float, **labels) -> dict:
    rate = {"median": median / 2, "median_per_cpu_second": median}
    shape = {"rows": weights // 1024, "cols": 1024, "tokens": 1, "megabytes": megabytes}
    return {"isa": "avx2", "threads": 1, **shape, "billion_weights_per_second": rate, **labels}


def gemm(median: float, **labels) -> dict:
    rate = {"median": median / 2, "median_per_cpu_second": median}
    shape = {"rows": 1024, "cols": 1024, "tokens": 512}
    return {"isa": "avx2", "threads": 1, **shape, "tera_operations_per_second": rate, **labels}


def test_peers_are_compared_at_their_fastest_and_place_by_place(tmp_path, monkeypatch):
    tables = load("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    large, small = 1 << 30, 1 << 20
    theirs = {"type": "Q4_0", "bits_per_weight": 4.5}
    report = {
        "machine": {"cpu": "a processor"},
        "peer_versions": {"a-package": "1.2"},
        "call_microseconds": 30.0,
        "rows": [
            {"kernel": "rotate_quantize", "isa": "avx2", "threads": 1, "tokens": 512},
            gemv(large, 402.0, 30.0, bits=3),
            gemv(small, 0.4, 60.0, bits=3),
            gemm(0.6, bits=3),
            gemv(small, 0.6, 16.0, bits=4),
            gemv(large, 402.0, 99.0, bits=3) | {"threads": 2},
        ],
        "peers": [
            gemv(large, 604.0, 8.0, path="vec_dot", **theirs),
            gemv(large, 604.0, 10.0, path="repacked", **theirs),
            gemv(small // 2, 0.3, 40.0, path="repacked", **theirs),
            gemm(0.2, path="mul_mat", **theirs),
            gemm(0.3, path="repacked", **theirs),
            gemv(large, 604.0, 22.0, path="repacked", **theirs) | {"threads": 2},
            gemv(small // 2, 0.3, 1.0, path="repacked", **theirs) | {"threads": 2},
        ],
    }
    (tmp_path / "kernels.json").write_text(json.dumps(report))
    table = tables.peers()
    assert table.splitlines()[2] == "| Q4_0 | 4.50 | avx2 | 1 | 10.0 | 40.0 | 0.30 | 3.00 | 1.50 | 2.00 |  | 0.40 |"
    # Wall clock with two threads, and no figure for a matrix too small to share.
    assert table.splitlines()[3] == "| Q4_0 | 4.50 | avx2 | 2 | 11.0 |  |  | 4.50 |  |  |  |  |"
    assert "a-package 1.2" in table


def test_results_without_peers_say_how_to_get_them(tmp_path, monkeypatch):
    tables = load("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [], "peers": []}))
    assert "make bench-peers" in tables.peers()
