"""The demo's page and its figures: complete, well-formed, and safe whatever the model said."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fewbit.demo import DemoSettings, is_from_plan, run_demo, speeds
from fewbit.demo_page import render_page, trade_svg
from fewbit.errors import UsageError

HOSTILE = "</p><script>alert('x')</script>&amp;\x1b[31m<img src=x onerror=y>"


def make_row(name: str, style: str, size: int, perplexity: float) -> dict:
    return {
        "name": name,
        "label": f"{name} row",
        "style": style,
        "bytes": size,
        "bits_per_weight": {"body": 3.08, "total": 3.3},
        "mean_relative_error": 0.03,
        "tokens_per_second": 12.5 if name in ("full", "trellis") else None,
        "perplexity": perplexity,
        "perplexity_stderr": 0.04 * perplexity,
        "kl_mean": 0.1,
        "kl_p99": 0.7,
        "top1_agreement": 0.81,
        "bits_per_char": 1.1,
    }


@pytest.fixture
def report() -> dict:
    """A small made-up report of the shape that `run_demo` returns."""
    centers = [index - 4.0 for index in range(9)]
    bell = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in centers]
    answer = {"text": "It guides ships.", "tokens": 5, "tokens_per_second": 9.0}
    return {
        "model": {
            "name": "Small",
            "type": "llama",
            "source": "small.gguf",
            "source_bytes": 10_000_000,
            "weights": 2_000_000,
            "calibration": ["a.txt", "b.txt"],
            "threads": 2,
        },
        "settings": {"calib_tokens": 1024, "calib_window": 512, "gen_tokens": 5},
        "evaluation": {"tokens": 2048, "window": 512, "stride": 512, "bos": False, "text_sha256": "ab" * 32},
        "rows": [
            make_row("full", "c4", 269_000_000, 17.0),
            make_row("trellis", "c2", 55_500_000, 21.0),
            make_row("iq3_s", "c3", 61_000_000, 21.4),
            make_row("ternary", "c1", 56_500_000, 400.0),
        ],
        "texts": [{"prompt": "What is it?", "chat": True, "answers": {"full": answer, "trellis": answer}}],
        "histogram": {
            "tensor": "model.layers.0.mlp.down_proj.weight",
            "block": 256,
            "group": 256,
            "centers": centers,
            "before": [0.0, 1e-4, 0.01, 0.1, 0.8, 0.1, 0.01, 1e-4, 1e-5],
            "after": bell,
            "kurtosis_before": 11.0,
            "kurtosis_after": 3.0,
            "error_before": 0.05,
            "error_after": 0.02,
        },
        "errors": {"q": [(0, 0.02), (1, 0.03)], "down": [(0, 0.04), (1, 0.01)]},
        "seconds": {"fetch": 1.0, "evaluate": 100.0},
        "environment": {"fewbit": "0", "cpu": "a processor", "cores": 2, "isa": "avx2", "torch": "2"},
    }


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def labels(svg: str) -> dict[str, tuple[float, float]]:
    texts = [node for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text") and node.get("x")]
    return {str(node.text): (float(node.get("x", 0)), float(node.get("y", 0))) for node in texts}


def test_page_has_every_section_and_every_figure(report):
    page = render_page(report)
    for section in ("results", "trade", "rotation", "errors", "text", "measured"):
        assert f'<h2 id="{section}">' in page
    pictures = [svg for svg in svgs(page) if svg.get("role") == "img"]
    assert len(pictures) == 3
    assert all(svg.get("aria-label") for svg in pictures)
    for row in report["rows"]:
        assert f"<td>{row['label']}</td>" in page
    assert page.count("not timed</td>") == 2
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_page_loads_nothing_from_elsewhere(report):
    page = render_page(report)
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(|(src|href)=", page)


def test_page_escapes_everything_that_comes_from_a_model(report):
    hostile = copy.deepcopy(report)
    hostile["texts"][0]["prompt"] = HOSTILE
    hostile["texts"][0]["answers"]["trellis"]["text"] = HOSTILE
    hostile["model"]["name"] = hostile["model"]["source"] = HOSTILE
    hostile["histogram"]["tensor"] = HOSTILE
    hostile["errors"] = {HOSTILE: [(0, 0.1), (1, 0.2)]}
    hostile["rows"][1]["name"] = HOSTILE
    page = render_page(hostile)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert svgs(page)


def test_page_of_a_single_window_has_no_standard_error(report):
    for row in report["rows"]:
        row["perplexity_stderr"] = None
    assert "&#177; 0" not in render_page(report)


def test_trade_figure_keeps_labels_of_close_points_apart(report):
    for row in report["rows"][1:]:
        row["perplexity"] = 21.0
    found = [place for text, place in labels(trade_svg(report["rows"])).items() if " MB" in text and ":" in text]
    assert len(found) == 4
    for (x, y), (other_x, other_y) in itertools.combinations(found, 2):
        assert abs(y - other_y) >= 15 or abs(x - other_x) >= 150


@pytest.mark.parametrize("width", [1180, 700])
def test_labels_of_the_page_keep_apart_in_a_browser(browser, overlaps, report, tmp_path, width):
    path = tmp_path / "demo.html"
    path.write_text(render_page(report), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    assert overlaps(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_speed_is_tokens_over_time_not_the_mean_of_rates():
    def text(tokens: int, rate: float) -> dict:
        return {"answers": {"full": {"tokens": tokens, "tokens_per_second": rate}}}

    assert speeds([text(11, 10.0), text(31, 10.0), text(1, 0.0)]) == {"full": pytest.approx(10.0)}
    assert speeds([text(11, 5.0), text(11, 20.0)]) == {"full": pytest.approx(8.0)}
    assert speeds([text(1, 0.0)]) == {"full": 0.0}


def test_checkpoint_of_other_options_is_not_taken_for_the_same():
    class Record:
        def __init__(self, fingerprint: str, options: dict) -> None:
            self.record = {"source_fingerprint": fingerprint, "options": options}
            self.fingerprint, self.options = fingerprint, options

    plan = Record("a", {"bits": 3, "calibration": "x"})
    assert is_from_plan(Record("a", {"bits": 3, "calibration": "x"}), plan)
    assert not is_from_plan(Record("b", {"bits": 3, "calibration": "x"}), plan)
    assert not is_from_plan(Record("a", {"bits": 3, "calibration": "y"}), plan)


@pytest.mark.slow
def test_demo_runs_reuses_its_checkpoints_and_spares_foreign_files(
    smollm2_dir, wiki_calib_path, wiki_eval, tmp_path, capsys
):
    text = tmp_path / "text.txt"
    text.write_text(wiki_eval[:4000], encoding="utf-8")
    settings = DemoSettings(
        model=str(smollm2_dir),
        calibration=(str(wiki_calib_path),),
        text=str(text),
        calib_tokens=128,
        calib_window=128,
        tune_steps=2,
        eval_tokens=256,
        eval_window=128,
        gen_tokens=4,
    )
    out = tmp_path / "demo"
    report = run_demo(out, False, True, settings)
    assert capsys.readouterr().out == ""
    assert [row["name"] for row in report["rows"]] == ["full", "trellis", "iq3_s", "ternary"]
    assert all(row["bytes"] < report["rows"][0]["bytes"] / 4 for row in report["rows"][1:])
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(report))
    assert len(svgs((out / "demo.html").read_text(encoding="utf-8"))) >= 3
    written = (out / "trellis" / "config.json").stat().st_mtime_ns
    again = run_demo(out, False, False, settings)
    assert (out / "trellis" / "config.json").stat().st_mtime_ns == written
    assert again["rows"][1]["perplexity"] == report["rows"][1]["perplexity"]
    assert "what 3 bits cost" in capsys.readouterr().out

    (out / "trellis" / "fewbit.json").unlink()
    with pytest.raises(UsageError, match="not a fewbit checkpoint"):
        run_demo(out, True, True, settings)
    assert (out / "trellis" / "config.json").exists()
