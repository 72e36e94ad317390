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
    assert (
        table.splitlines()[2]
        == "| Q4_0 | 4.50 | avx2 | 1 | 10.0 | 40.0 | 0.30 | 3.00 x | 1.50 x | 2.00 x |  | 0.40 x |"
    )
    # Wall clock with two threads, and no figure for a matrix too small to share.
    assert table.splitlines()[3] == "| Q4_0 | 4.50 | avx2 | 2 | 11.0 |  |  | 4.50 x |  |  |  |  |"
    assert "a-package 1.2" in table


def test_a_kernel_has_one_row_and_a_column_for_each_instruction_set(tmp_path, monkeypatch):
    tables = load("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    few = {"kernel": "product of few tokens", "bits": 3}
    report = {
        "machine": {"cpu": "a processor"},
        "read_gigabytes_per_second": {"1": {"median": 10.0}},
        "rows": [
            gemv(1 << 30, 402.0, 30.0, **few),
            gemv(1 << 30, 402.0, 50.0, **few) | {"isa": "avx512"},
            gemv(1 << 30, 402.0, 70.0, **few) | {"isa": "avx512", "threads": 2},
            gemv(1 << 30, 402.0, 30.0, **few) | {"tokens": 2},
        ],
    }
    (tmp_path / "kernels.json").write_text(json.dumps(report))
    header, _, *lines = tables.kernels().splitlines()[:4]
    assert header == "| kernel | weights, or inputs | tokens | threads | unit | avx2 | avx512 |"
    shape = "product of few tokens | 1048576 x 1024, 402 MB | 1"
    assert lines == [f"| {shape} | 1 | G weights/s | 15.0 | 25.0 |", f"| {shape} | 2 | G weights/s |  | 35.0 |"]


def test_a_share_of_memory_s_speed_stands_beside_the_speed_it_was_measured_with_or_none(tmp_path, monkeypatch):
    tables = load("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    median = {"median": 2e10, "stdev": 0.0}
    row = {"model": "m", "program": "fewbit", "type": "3 bits", "threads": 1, "decode": median, "prefill": median}
    row["bandwidth_share"] = {"median": 0.5, "stdev": 0.0}
    report = {"rounds": 3, "generated_tokens": 64, "prompt_tokens": 512, "versions": {"a-package": "1.2"}}
    report |= {"environment": {"cpu": "a processor", "isa": "avx2"}}
    old = {**report, "read_bytes_per_second": {"1": 1e10}, "rows": [row]}
    (tmp_path / "end_to_end.json").write_text(json.dumps(old))
    # Measured apart and with ordinary pages: no speed to divide by.
    assert "GB/s" not in tables.end_to_end()
    slower = {**row, "read_bytes_per_second": {"median": 1.8e10, "stdev": 0.0}}
    new = {
        **report,
        "rows": [{**row, "read_bytes_per_second": median}, slower, {**row, "program": "torch", "type": "int8"}],
    }
    (tmp_path / "end_to_end.json").write_text(json.dumps(new))
    assert "(18.0-20.0 GB/s with 1 thread)" in tables.end_to_end()
    assert "torch's int8" in tables.end_to_end()
    assert "arithmetic" not in tables.end_to_end()
    multiplied = {"arithmetic_share": {"median": 0.421}, "operations_per_second": {"median": 2.1e11}}
    new["rows"][0] |= multiplied
    (tmp_path / "end_to_end.json").write_text(json.dumps(new))
    header, _, first, second, _ = tables.end_to_end().splitlines()[:5]
    assert "| share of memory bandwidth | prompt's share of arithmetic |" in header
    assert "| 50 % | 42 % |" in first
    assert "| 50 % |  |" in second
    assert "(0.21 TOP/s with 1 thread)" in tables.end_to_end()


def test_results_without_peers_say_how_to_get_them(tmp_path, monkeypatch):
    tables = load("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [], "peers": []}))
    assert "make bench-peers" in tables.peers()


FEWBIT = {"code": "trellis", "head": "bf16", "rounding": "ldlq", "rotate": True, "tune": None, "calib_tokens": 1024}
LLAMA = {"mix": "IQ3_S", "pad": False, "calib_tokens": 1024}
TWIN = {**FEWBIT, "code": "twin", "format": "twinquant", "rank": 128}


def score(bits: float, options: dict, **facts) -> dict:
    """A row of quality; 1000 weights of which all are in the layers."""
    scores = {"ratio": 1.1, "kl_mean": 0.1, "kl_p99": 1.0, "top1_agreement": 0.9, "bits_per_char": 1.0}
    text = {"tokens": 2048, "window": 512, "reference_perplexity": 10.0}
    return {"options": options, "bits_per_weight": {"body": bits, "total": bits}, **scores, **text, **facts}


def write_rows(path: Path, **rows: dict) -> None:
    named = {f"{name} | seed 0": row for name, row in rows.items()}
    path.write_text(json.dumps({"text": "a", "rows": named}))


@pytest.fixture
def quality_tables(tmp_path, monkeypatch):
    tables = load("quality_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tables, lambda benchmark, **rows: write_rows(tmp_path / f"{benchmark}-m.json", **rows)


def names_in(table: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:] if line.startswith("|")]


def test_rows_of_quality_stand_in_parts_by_their_options_and_there_by_bits(quality_tables):
    tables, write = quality_tables
    rows = {
        "unknown": score(1.0, {}),
        "trellis, nearest": score(3.0, {**FEWBIT, "rounding": "nearest"}),
        "HQQ": score(3.5, {"method": "hqq", "calib_tokens": 0}),
        "trellis 4 bits, no tuning": score(4.0, {**FEWBIT, "tune": False}),
        "llama.cpp IQ3_S, padded": score(4.3, {**LLAMA, "pad": True}),
        "llama.cpp IQ3_S": score(3.4, LLAMA),
        "trellis": score(3.1, FEWBIT),
        "trellis, no tuning": score(3.1, {**FEWBIT, "tune": False}),
    }
    write("quality", **rows)
    ready, packages, controls = (f"**{part}**" for part in tables.PARTS)
    # Without tuning stands for a whole row that is not measured, and not for one that is.
    own = [ready, "trellis", "llama.cpp IQ3_S", "trellis 4 bits, no tuning"]
    others = ["unknown", "trellis, nearest", "trellis, no tuning", "llama.cpp IQ3_S, padded"]
    assert names_in(tables.quality("m", "M")) == [*own, packages, "HQQ", controls, *others]


def test_sizes_are_those_of_the_whole_model_and_padding_is_told(quality_tables):
    tables, write = quality_tables
    padded = score(5.0, {**LLAMA, "pad": True})
    padded["bits_per_weight"] = {"body": 5.0, "body_without_padding": 4.0, "total": 8.0}
    write("quality", trellis=score(4.0, FEWBIT, bytes=7_000_000), padded=padded)
    table = tables.quality("m", "M")
    assert "| trellis | 4.000 | 7 |" in table
    assert "| padded | 5.000 (4.000) | 14 |" in table  # of as many weights as the row with a size has
    assert "In brackets" in table
    write("quality", trellis=score(4.0, FEWBIT, bytes=7_000_000))
    assert "In brackets" not in tables.quality("m", "M")


def test_twinquant_s_furthest_rows_stand_beside_the_others_under_a_name_that_says_how_far(quality_tables):
    tables, write = quality_tables
    write("quality", trellis=score(3.0, FEWBIT))
    rows = {
        "W4A8 full, not learned, not tuned": score(4.5, {**TWIN, "learn": False, "tune": False}),
        "W4A8 full": score(4.6, TWIN),
        "W4A4 full, not learned, not tuned": score(4.7, {**TWIN, "learn": False, "tune": False}),
        "W4A16 full": score(4.8, TWIN),
    }
    write("twinquant", **rows)
    own = ["trellis", "TwinQuant W4A8", "TwinQuant W4A4, not learned, not tuned"]
    assert names_in(tables.quality("m", "M")) == [f"**{tables.PARTS[0]}**", *own]


def test_the_readme_s_table_has_what_there_is_to_choose_from_on_each_model(quality_tables, monkeypatch):
    tables, write = quality_tables
    monkeypatch.setattr(tables, "SMALL", ("m", "M"))
    monkeypatch.setattr(tables, "LARGE", ("n", "N"))
    rows = {
        "trellis": score(3.1, FEWBIT),
        "trellis, no tuning": score(3.1, {**FEWBIT, "tune": False}),
        "trellis, 3.25 bits by sensitivity": score(3.3, FEWBIT),
        "trellis 4 bits, no tuning": score(4.0, {**FEWBIT, "tune": False}),
        "llama.cpp IQ3_S + imatrix": score(3.4, LLAMA),
        "llama.cpp IQ3_S + imatrix, padded": score(3.4, {**LLAMA, "pad": True}),
        "HQQ": score(3.5, {"method": "hqq", "calib_tokens": 0}),
    }
    write("quality", **rows)
    small = ["fewbit itq3_s 3 bits", "llama.cpp IQ3_S", "fewbit itq3_s 4 bits, not tuned"]
    assert names_in(tables.brief()) == ["**M**", *small, "**N**"]


def test_rows_with_a_branch_of_the_former_rounding_are_marked(quality_tables, monkeypatch):
    tables, write = quality_tables
    monkeypatch.setattr(tables, "FORMER", ("abcd",))
    rows = {
        "W4A4 full": score(4.5, TWIN, commit="abcd0123"),
        "W4A4 naive": score(4.1, {**TWIN, "rank": 0}, commit="abcd0123"),
        "W4A4 hadamard": score(4.5, TWIN, commit="0123456789"),
    }
    write("twinquant", **rows)
    table = tables.twinquant("m", "M")
    assert names_in(table) == ["W4A4 naive", "W4A4 hadamard", "W4A4 full †"]
    assert tables.FORMER_NOTE in table
    write("twinquant", **{"W4A4 full": score(4.5, TWIN, commit="0123456789")})
    assert "†" not in tables.twinquant("m", "M")


def test_each_machine_stands_with_what_it_made(tmp_path, monkeypatch):
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    old, new = ({"cpu": "a processor", "isa": isa, "cores": 2} for isa in ("avx2", "avx512"))
    rows = {"x": {"environment": old}, "y": {"environment": new}, "z": {"environment": new}}
    reports = {
        "cost": {"rows": rows},
        "context": {"environment": new, "rows": rows},
        "encode": {"machine": {"cpu": "another"}},
    }
    for name, report in {**reports, "storm": {"rows": []}, "gpu-model": {}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    assert tables.machines().splitlines()[2:] == [
        "| a processor, avx2, 2 cores | `cost` (1 of 3 rows) |",
        "| a processor, avx512, 2 cores | `context`, `cost` (2 of 3 rows) |",
        "| another | `encode` |",
        "| none: computed or compiled | `gpu-model` |",
        "| not recorded | `storm` |",
    ]


def test_the_papers_steps_stand_beside_the_same_steps_here(tmp_path, monkeypatch):
    tables = load("paper_tables")
    monkeypatch.setattr("quality_tables.RESULTS", tmp_path)
    monkeypatch.setattr("quality_tables.FORMER", ("abcd",))
    former = score(4.5, TWIN, commit="abcd0123", ratio=3.0)
    rows = {"W4A4 naive": score(4.1, {**TWIN, "rank": 0}, ratio=5.0), "W4A4 low-rank": former}
    write_rows(tmp_path / "twinquant-smollm2-135m.json", **rows)
    header, _, naive, low_rank, *others = tables.steps().splitlines()
    assert header.endswith("| SmolLM2-135M, W4A4 |")
    assert naive == "| naive | 10.651 | 5.000 |"
    assert low_rank == "| low-rank | 2.279 | 3.000 † |"
    assert others[-1].startswith("One seed, or mean and range over two. †")
    assert tables.learning().startswith("Not measured yet")
    assert tables.ranks("smollm2-135m", "S").startswith("Not measured yet")
    stages = {"running the full model": 30.0, "learning the axes": 90.0, "writing the checkpoint": 5.0}
    machine = {"cpu": "a processor", "isa": "avx2", "cores": 2}
    learned = {"learning": {"steps": 7}, "stage_seconds": stages, "quantize_seconds": 240.0, "environment": machine}
    rows = {"W4A4 full": score(4.5, TWIN, **learned), "resumed": score(4.5, TWIN, **learned, resumed=True)}
    write_rows(tmp_path / "twinquant-smollm2-135m.json", **rows)
    assert names_in(tables.learning()) == ["SmolLM2-135M, W4A4 full"]
    assert "| 7 | 2.0 min | 4.0 min |" in tables.learning()
    write_rows(tmp_path / "twinquant-smollm2-135m.json", **{"W4A4 full": score(4.5, TWIN, **learned, other_work=True)})
    assert names_in(tables.learning()) == ["SmolLM2-135M, W4A4 full (beside other work)"]
    assert "†" not in tables.steps()
