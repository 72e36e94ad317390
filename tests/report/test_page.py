"""The page of a report: complete, safe, readable in Chromium at every width, in light and in dark."""

from __future__ import annotations

import copy
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from fewbit.drawing import NARROW, WIDE
from fewbit.report.collect import front
from fewbit.report.figures import bits_class, bits_svg, outliers_svg, trade_svg
from fewbit.report.page import render_report

HOSTILE = "</p><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">&amp;\x1b[31m"
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
LAYERS = 30


def checkpoint(bits: int, mixed: bool = False, tuned: bool = False) -> dict:
    chosen = {kind: [(i, float(bits + (mixed and (i + len(kind)) % 3 == 0))) for i in range(LAYERS)] for kind in KINDS}
    return {
        "formats": ["twinquant" if bits == 4 else "trellis"],
        "method": "trellis, rounded to nearest, not tuned",
        "options": {"calibration": "ab" * 32},
        "fewbit_version": "0.1.0",
        "source_fingerprint": "cd" * 32,
        "made_from_reference": True,
        "mean_relative_error": 0.3**bits,
        "errors": {
            kind: [(i, 0.3**bits * (1 + 0.1 * math.sin(i + len(kind)))) for i in range(LAYERS)] for kind in KINDS
        },
        "bits": chosen,
        "tables": {"embed": 4, "head": 4},
        "tuning": {"before": 0.4, "after": 0.2, "steps": 32} if tuned else None,
    }


def model(name: str, size: int, kl: float, record: dict | None, reference: bool = False) -> dict:
    speed = {
        "decode": [{"batch": 1, "tokens_per_second": 40e9 / size / 3, "stdev": 1.0}],
        "prefill": [{"prompt_tokens": 256, "tokens_per_second": 800.0, "stdev": 9.0}],
        "settings": {"repeats": 3},
        "threads": 2,
        "isa": "avx512",
        "kv": "bf16",
        "cpu": "a processor",
        "weight_bytes_per_token": size,
        "read_bytes_per_second": 40_000_000_000,
        "limit": 40e9 / size,
        "share": 0.333,
    }
    return {
        "name": name,
        "path": f"models/{name}",
        "reference": reference,
        "checkpoint": record,
        "model_type": "llama",
        "bytes": size,
        "weights": 135_000_000,
        "bits_per_weight": {"body": 3.08, "total": 3.4},
        "perplexity": 17.0 * math.exp(kl),
        "perplexity_stderr": 0.5,
        "kl_mean": kl,
        "kl_p99": 5 * kl,
        "top1_agreement": math.exp(-kl),
        "bits_per_char": 1.1,
        "speed": speed,
    }


def make_report(models: list[dict]) -> dict:
    cells = [[1.0 + (x % 9) * (y % 5) for x in range(48)] for y in range(48)]
    centers = [index / 2 - 4 for index in range(17)]
    bell = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in centers]
    tails = {
        "model": "trellis-2", "tensor": "model.layers.0.mlp.down_proj.weight", "rows": 576, "cols": 1536, "block": 256,
        "group": 256, "centers": centers, "before": bell, "after": bell, "kurtosis_before": 11.0, "kurtosis_after": 3.0,
        "largest_before": 33.0, "largest_after": 5.0, "outliers_before": cells, "outliers_after": cells,
    }  # fmt: skip
    environment = dict.fromkeys(
        ("fewbit", "python", "torch", "transformers", "safetensors", "numpy", "platform"), "1.0"
    )
    return {
        "models": models,
        "reference": models[0]["name"],
        "fronts": {score: front(models, score) for score in ("kl_mean", "perplexity")},
        "tails": tails,
        "missing": {},
        "read_bytes_per_second": 40_000_000_000,
        "conditions": {"tokens": 2048, "window": 512, "stride": 512, "bos": False, "text_sha256": "ab" * 32},
        "environment": {**environment, "cpu": "a processor", "cores": 2, "isa": "avx512"},
    }


@pytest.fixture
def report() -> dict:
    return make_report(
        [
            model("smollm2-135m", 269_000_000, 0.0, None, reference=True),
            model("trellis-2", 52_000_000, 0.9, checkpoint(2)),
            model("trellis-3", 66_000_000, 0.2, checkpoint(3, tuned=True)),
            model("trellis-3.25", 69_000_000, 0.15, checkpoint(3, mixed=True)),
            model("twin-4", 90_000_000, 0.25, checkpoint(4)),
        ]
    )


@pytest.fixture
def crowd() -> dict:
    """Twelve models with long names, nearly all in one place."""
    names = [f"SmolLM2-135M-Instruct-of-somebody-trellis-{i}-bits" for i in range(12)]
    models = [model(name, 60_000_000 + 9000 * i, 0.2 - 0.0001 * i, checkpoint(3)) for i, name in enumerate(names)]
    return make_report([model("full", 269_000_000, 0.0, None, reference=True), *models])


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_page_has_every_section_and_says_every_figure_in_words(report):
    page = render_report(report)
    for section in ("trade", "results", "errors", "bits", "rotation", "speed", "conditions"):
        assert f'<h2 id="{section}">' in page
    words = words_of(page)
    for row in report["models"]:
        assert row["name"] in words
        assert f"{row['perplexity']:.3f} ± 0.500" in words
        assert row["reference"] or f"{row['kl_mean']:.4f}" in words
    for expected in ("0.4 to 0.2 nats in 32 steps", "3 bits in every linear of every layer; embeddings in 4 bits",
                     "4 bits in layers", "from 11.00 to 3.00", "33 %", "ab" * 32, "40.0 GB/s"):  # fmt: skip
        assert expected in words, expected
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_page_has_no_scripts_and_loads_nothing_from_elsewhere(report):
    page = render_report(report)
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(|(src|href)=", page)


def test_sections_that_cannot_be_there_say_how_to_get_them(report):
    for row in report["models"]:
        row.update(reference=False, speed=None, kl_mean=None, kl_p99=None, top1_agreement=None)
    report.update(reference=None, tails=None, read_bytes_per_second=None)
    report["fronts"]["kl_mean"] = []
    report["missing"] = {"kl": "Give --reference MODEL.", "rotation": "Give another.", "speed": "Leave out --no-speed."}
    words = words_of(render_report(report))
    for expected in ("Give --reference MODEL.", "Give another.", "Leave out --no-speed.", "not measured", "not timed"):
        assert expected in words
    alone = make_report([model("full", 269_000_000, 0.0, None, reference=True)])
    alone["missing"] = {"errors": "None is a checkpoint."}
    alone["models"][0]["speed"] = {"problem": "no room"}
    words = words_of(render_report(alone))
    assert "None is a checkpoint." in words
    assert "full was not timed: no room" in words


def test_a_single_window_has_no_standard_error(report):
    for row in report["models"]:
        row["perplexity_stderr"] = None
    assert "± 0.000" not in render_report(report)
    assert "None" not in words_of(render_report(report))


def test_the_front_holds_what_nothing_else_beats(report):
    models = report["models"]
    assert front(models, "kl_mean") == ["trellis-2", "trellis-3", "trellis-3.25"]
    assert front(models, "perplexity")[-1] == "smollm2-135m"
    assert front([dict(row, kl_mean=None) for row in models], "kl_mean") == []


def hostile(report: dict) -> dict:
    changed = copy.deepcopy(report)
    for row in changed["models"]:
        row["name"] = row["path"] = row["model_type"] = f"{row['name']}{HOSTILE}"
        if row["checkpoint"]:
            for key in ("errors", "bits"):
                row["checkpoint"][key][HOSTILE] = row["checkpoint"][key].pop("q")
            row["checkpoint"]["method"] = row["checkpoint"]["fewbit_version"] = HOSTILE
            row["checkpoint"]["options"]["calibration"] = HOSTILE
    changed["models"][1]["speed"] = {"problem": HOSTILE}
    changed["reference"] = changed["tails"]["tensor"] = changed["tails"]["model"] = HOSTILE
    changed["fronts"] = {score: front(changed["models"], score) for score in ("kl_mean", "perplexity")}
    return changed


def test_everything_that_comes_from_a_model_or_a_path_is_escaped(report):
    page = render_report(hostile(report))
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("frame", [WIDE, NARROW])
def test_one_model_or_equal_models_make_a_figure(report, frame):
    one = report["models"][1]
    for rows in ([one], [report["models"][0]], [one, dict(one, name="other")], [dict(one, kl_mean=0.0)]):
        for score in ("kl_mean", "perplexity"):
            if any(not row["reference"] or score == "perplexity" for row in rows):
                ElementTree.fromstring(trade_svg(rows, [], score, score, frame))


@pytest.mark.parametrize("frame", [WIDE, NARROW])
def test_bars_of_the_standard_error_are_whole_and_to_scale(report, frame):
    models = [dict(row, perplexity=17 + index / 10) for index, row in enumerate(report["models"])]
    for factor in (1, 10):
        spreads = (0.2, 0.4, 0.8, 1.6)
        for row, spread in zip(models[1:], spreads, strict=True):
            row["perplexity"] *= factor
            row["perplexity_stderr"] = spread
        root = ElementTree.fromstring(trade_svg(models, [], "perplexity", "perplexity", frame))
        bars = [node for node in root.iter() if node.get("x1") and node.get("x1") == node.get("x2")]
        bars = [node for node in bars if node.get("class") != "grid"]
        ends = [(float(bar.get("y1", "")), float(bar.get("y2", ""))) for bar in bars]
        assert all(frame.top < high < low < frame.bottom for low, high in ends)
        lengths = [low - high for low, high in ends]
        assert lengths == sorted(lengths)
        if factor == 1:
            assert lengths == pytest.approx([lengths[0] * spread / 0.2 for spread in spreads], rel=0.05)


def test_a_strip_has_a_cell_for_every_linear_also_of_deep_models():
    deep = {kind: [(layer, 3.0) for layer in range(96)] for kind in KINDS}
    for frame in (WIDE, NARROW):
        svg = bits_svg(deep, "deep", frame)
        assert svg.count("<rect") == 96 * 7
        assert ">3</text>" not in svg
        assert svg.count(">layer</text>") == 1
    assert [bits_class(bits) for bits in (2, 3, 3.25, 4, 8, 16)] == ["b2", "b3", "b3", "b4", "b8", "b16"]


def test_an_outlier_map_covers_every_cell_once():
    svg = outliers_svg([[1.0, 1.0, 30.0], [4.5, 30.0, 1.0]], "a map")
    runs = [int(run) for path in re.findall(r' d="([^"]*)"', svg) for run in re.findall(r"h(\d+)v", path)]
    assert sum(runs) == 6
    assert svg.count("<path") == 3


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_have_the_contrast_that_readers_need(report):
    style = re.search(r"<style>(.*?)</style>", render_report(report), re.DOTALL)[1]
    roots = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    light, dark = roots[0] | roots[2], roots[1] | roots[3]
    for theme in (light, dark):
        for ground in (theme["page"], theme["panel"]):
            for text in ("ink", "soft"):
                assert contrast(theme[text], ground) >= 4.5
            for line in range(1, 9):
                assert contrast(theme[f"c{line}"], ground) >= 3
        for bits in ("b2", "b3", "b4", "b8", "b16"):
            assert contrast(theme["on-bits"], theme[bits]) >= 4.5, bits


VIEWS = [(1180, "light"), (1180, "dark"), (700, "light"), (390, "light"), (390, "dark"), (320, "light")]


@pytest.fixture
def look(browser, tmp_path):
    """`look(page, width, scheme)` opens a page's text; requests for anything else fail the test."""
    contexts, requests = [], []

    def open_page(page: str, width: int, scheme: str):
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        opened = context.new_page()
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(path.as_uri())
        assert requests == [path.as_uri()]
        requests.clear()
        return opened

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("which", ["report", "crowd", "hostile"])
def test_nothing_overflows_or_overlaps_in_a_browser(request, look, overlaps, which, width, scheme):
    data = hostile(request.getfixturevalue("report")) if which == "hostile" else request.getfixturevalue(which)
    page = look(render_report(data), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overflowing = """[...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && e.getClientRects().length
      && getComputedStyle(e).position !== 'absolute' && !e.closest('thead')
      && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(overflowing) == []
    assert overlaps(page) == []
    assert page.title() != "hit"
    shown = page.evaluate(
        "[...document.querySelectorAll('.on-wide, .on-narrow')].map(e => getComputedStyle(e).display)"
    )
    assert shown.count("none") == len(shown) / 2
    if which == "crowd":
        labels = """[...document.querySelectorAll('#trade ~ .pair svg')].filter(s => s.getClientRects().length)
          .slice(0, 2).map(s => s.querySelectorAll('text.of-ink').length)"""
        assert page.evaluate(labels) == [12, 12]


def test_dark_readers_get_a_dark_page(look, report):
    grounds = [look(render_report(report), 900, scheme).evaluate("getComputedStyle(document.body).backgroundColor")
               for scheme in ("light", "dark")]  # fmt: skip
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_a_sheet_of_paper_is_wide_enough(look, overlaps, report):
    page = look(render_report(report), 700, "light")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.evaluate("getComputedStyle(document.querySelector('.cards td')).display") == "table-cell"
    assert overlaps(page) == []


def test_tables_keep_their_roles_and_their_headings_as_cards_on_a_phone(look, report):
    page = look(render_report(report), 390, "light")
    table = page.get_by_role("table", name="Size, quality and speed of every model")
    assert table.get_by_role("row").count() == 6
    assert table.get_by_role("rowheader").count() == 5
    assert table.get_by_role("columnheader").count() == 10
    assert page.evaluate("getComputedStyle(document.querySelector('.cards td'), '::before').content") == '"size"'
    assert page.get_by_role("img").count() == len([row for row in report["models"] if row["checkpoint"]]) + 7


def test_a_column_of_names_and_its_heading_begin_at_one_line(look, report):
    page = look(render_report(report), 1180, "light")
    starts = """[...document.querySelectorAll('table')].map(table => ['thead th', 'tbody th'].map(cell => {
      const range = document.createRange();
      range.selectNodeContents(table.querySelector(cell));
      return range.getBoundingClientRect().left; }))"""
    found = page.evaluate(starts)
    assert len(found) == 6
    assert all(heading == pytest.approx(name, abs=0.5) for heading, name in found)


def test_the_pictures_of_the_docs_are_of_whole_sections_in_all_their_colours(
    browser, report, import_benchmark, tmp_path
):
    pictures = import_benchmark("report_pictures")
    page = tmp_path / "page.html"
    page.write_text(render_report(report), encoding="utf-8")
    pictures.take(browser, page, tmp_path)
    taken = {name: Image.open(tmp_path / f"report-{name}.png") for name in pictures.PARTS}
    for name, part in pictures.PARTS.items():
        picture = taken[name].convert("RGB")
        assert picture.width == pictures.WIDTH * pictures.SCALE
        assert picture.height > 500
        ground = (255, 255, 255) if part.scheme == "light" else (20, 23, 27)
        assert is_near(picture.getpixel((2, 2)), ground)
    # A few dozen of a million pixels: the point of two components.
    violet = [one for _, one in taken["quality"].convert("RGB").getcolors() if is_near(one, (124, 58, 237))]
    assert violet


def is_near(one: tuple, other: tuple) -> bool:
    return all(abs(a - b) <= 8 for a, b in zip(one, other, strict=True))


def test_the_docs_show_every_picture_that_the_script_makes(import_benchmark):
    pictures = import_benchmark("report_pictures")
    names = {f"report-{name}.png" for name in pictures.PARTS}
    assert {path.name for path in pictures.IMAGES.glob("report-*.png")} == names
    page = (pictures.ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(images/(report-[\w-]+\.png)\)", page)) == names
    assert all((pictures.IMAGES / name).stat().st_size < 400_000 for name in names)
    assert all(name in page for name in pictures.CHECKPOINTS)
