"""`fewbit report` from end to end on tiny models: its figures are those of eval, inspect and bench."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fewbit.checkpoint.artifact import Artifact
from fewbit.report.collect import SCORES


@pytest.fixture(scope="module")
def checkpoints(tiny_models, calibration_text, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the tied model: trellis codes at 2 and 3 bits, a tuned one, one of mixed bits, two components."""
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize

    place = tmp_path_factory.mktemp("report")
    calibrated = {"calib_tokens": 512, "calib_window": 64}
    options = {
        "two": QuantizeOptions(bits=2, rounding="nearest", tune=False),
        "tuned": QuantizeOptions(bits=3, tune=True, tune_steps=2, **calibrated),
        "mixed": QuantizeOptions(bits=3.25, tune=False, **calibrated),
        "twin": QuantizeOptions(format="twinquant", rounding="nearest", tune=False, rank=8),
    }
    for name, chosen in options.items():
        texts = [calibration_text] if chosen.rounding == "ldlq" else []
        quantize(tiny_models["tied"], place / name, chosen, texts)
    return {name: place / name for name in options}


@pytest.fixture(scope="module")
def settings(calibration_text) -> tuple:
    return ("--text", calibration_text, "--window", 64, "--tokens", 256)


def test_figures_are_those_of_eval_and_inspect(run, checkpoints, tiny_models, settings, tmp_path):
    page = tmp_path / "page.html"
    reference = tiny_models["tied"]
    code, stdout, stderr = run(
        "report", *checkpoints.values(), "--reference", reference, *settings, "--no-speed", "--json", "-o", page
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["output"] == str(page)
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == [reference.name, *checkpoints]
    assert report["reference"] == reference.name
    for name, path in checkpoints.items():
        scores = json.loads(run("eval", path, "--reference", reference, *settings, "--json")[1])
        assert {key: rows[name][key] for key in SCORES} == pytest.approx({key: scores[key] for key in SCORES})
        assert {key: report["conditions"][key] for key in report["conditions"]}.items() <= scores.items()
        inspected = json.loads(run("inspect", path, "--json")[1])
        for key in ("bytes", "weights", "bits_per_weight"):
            assert rows[name][key] == inspected[key]
        errors = rows[name]["checkpoint"]["errors"]
        recorded = {entry["name"]: entry["relative_error"] for entry in inspected["tensors"] if entry["format"]}
        assert errors["down"][1][1] == recorded["model.layers.1.mlp.down_proj.weight"]
        assert rows[name]["checkpoint"]["made_from_reference"]
        assert rows[name]["speed"] is None
    assert rows[reference.name]["kl_mean"] == pytest.approx(0, abs=1e-6)
    tuning = Artifact.open(checkpoints["tuned"]).record["tuning"]
    assert rows["tuned"]["checkpoint"]["tuning"]["before"] == tuning["rounded"]
    assert rows["two"]["checkpoint"]["tuning"] is None
    bits = {value for series in rows["mixed"]["checkpoint"]["bits"].values() for _, value in series}
    assert bits == {entry["bits"] for entry in Artifact.open(checkpoints["mixed"]).record["tensors"]
                    if entry["kind"] == "body"}  # fmt: skip
    assert report["tails"]["model"] == "two"
    assert report["tails"]["kurtosis_before"] > 0
    words = re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))
    for row in rows.values():
        assert f"{row['perplexity']:.3f}" in words
        assert f"{row['bits_per_char']:.4f}" in words
    assert report["conditions"]["text_sha256"] in words


def test_speeds_are_there_with_the_limit_that_memory_sets(run, checkpoints, settings, tmp_path):
    page = tmp_path / "page.html"
    code, stdout, stderr = run("report", checkpoints["two"], *settings, "--json", "-o", page)
    assert code == 0, stderr
    report = json.loads(stdout)
    (row,) = report["models"]
    speed = row["speed"]
    assert speed["decode"][0]["tokens_per_second"] > 0
    assert speed["prefill"][0]["prompt_tokens"] == 64
    if report["read_bytes_per_second"]:
        limit = report["read_bytes_per_second"] / speed["weight_bytes_per_token"]
        assert speed["limit"] == pytest.approx(limit, rel=1e-3)
        assert speed["share"] == pytest.approx(speed["decode"][0]["tokens_per_second"] / limit, rel=1e-2, abs=1e-4)
    assert report["reference"] is None
    assert row["kl_mean"] is None
    assert "--reference MODEL" in report["missing"]["kl"]
    assert "--reference MODEL" in page.read_text(encoding="utf-8")


def test_without_json_a_table_and_the_page_are_what_it_says(run, checkpoints, tiny_models, settings, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("an older page")
    code, stdout, stderr = run("report", tiny_models["tied"], checkpoints["two"], *settings, "--no-speed", "-o", page)
    assert code == 0, stderr
    assert "reference" in stdout
    assert str(page) in stdout.replace("\n", "")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_full_models_alone_and_checkpoints_of_another_model_still_make_a_page(
    run, checkpoints, tiny_models, settings, tmp_path
):
    page = tmp_path / "page.html"
    code, stdout, _ = run("report", tiny_models["odd"], *settings, "--no-speed", "--json", "-o", page)
    assert code == 0
    assert {"errors", "rotation", "speed"} == set(json.loads(stdout)["missing"])
    arguments = (checkpoints["two"], "--reference", tiny_models["odd"], *settings, "--no-speed", "--json", "-o", page)
    code, stdout, _ = run("report", *arguments)
    assert code == 0
    report = json.loads(stdout)
    assert "as it is now" in report["missing"]["rotation"]
    assert report["models"][1]["kl_mean"] > 0


def test_names_that_would_like_to_be_code_are_text(run, checkpoints, settings, tmp_path):
    place = tmp_path / "<img src=x>" / "<script>alert(1)&amp;"
    shutil.copytree(checkpoints["two"], place)
    page = tmp_path / "page.html"
    code, _, stderr = run("report", place, *settings, "--no-speed", "-o", page)
    assert code == 0, stderr
    found = page.read_text(encoding="utf-8")
    assert "<script" not in found
    assert "<img" not in found
    assert "&lt;script&gt;" in found


def test_wrong_requests_get_one_line_with_a_remedy_before_anything_is_written(
    run, checkpoints, tiny_models, settings, tmp_path
):
    wider = shutil.copytree(checkpoints["two"], tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    empty = tmp_path / "empty"
    empty.mkdir()
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"GGUF, let us say")
    two, full, page = checkpoints["two"], tiny_models["tied"], tmp_path / "page.html"
    cases = [
        ((), 2, None),
        ((tmp_path / "nothing", "-o", page), 2, "no such file or directory"),
        ((empty, "-o", page), 2, "holds neither"),
        ((wider, "--reference", full, "-o", page), 2, "vocabulary of 97 tokens"),
        ((two, "--reference", two, "-o", page), 2, "full-precision model"),
        ((two, "-o", tmp_path), 2, "is a directory; name the page"),
        ((two, "-o", tmp_path / "none" / "page.html"), 2, "make it first"),
        ((two, "-o", weights), 2, "is no page"),
        ((two, "--text", tmp_path / "none.txt", "-o", page), 2, "does not exist"),
        ((two, *settings[:2], "--window", 1, "-o", page), 2, "at least 2 tokens"),
    ]
    for arguments, expected, words in cases:
        code, _, stderr = run("report", *arguments)
        assert code == expected, (arguments, stderr)
        assert "Traceback" not in stderr
        if words:
            message = [line for line in stderr.splitlines() if line.startswith("error:")]
            assert len(message) == 1, (arguments, stderr)
            assert words in message[0], (arguments, stderr)
        assert not page.exists()
    assert weights.read_bytes() == b"GGUF, let us say"
