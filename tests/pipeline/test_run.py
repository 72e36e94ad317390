"""The pipeline on tiny models: what it writes, that it resumes, and that it refuses what it should."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import FewbitError, NonFiniteWeights, UsageError
from fewbit.loading import load
from fewbit.models import get_family
from fewbit.pipeline import workdir
from fewbit.pipeline.calibrate import InputAxes, InputCollector, LayerStream
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import Placement, quantize
from fewbit.pipeline.texts import CalibrationText, calibration_windows

FRESH = Placement(fresh=True)
OPTIONS = QuantizeOptions(calib_tokens=512, calib_window=64, calib_dtype="float32", tune=False)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("name", ["tied", "biased", "odd"])
@pytest.mark.parametrize("code", ["trellis", "ternary", "iq3_s", "lloyd8"])
def test_every_code_makes_a_checkpoint_that_loads_and_computes(tiny_models, calibration_text, tmp_path, name, code):
    out = tmp_path / "out"
    options = QuantizeOptions(code=code, calib_tokens=512, calib_window=64, tune=False)
    result = quantize(tiny_models[name], out, options, [calibration_text])
    assert result.bytes == Artifact.open(out).inspect()["bytes"]
    model, tokenizer = load(out, torch.float32)
    ids = tokenizer("the quick model reads", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())


def test_four_bits_are_closer_to_the_full_model_than_two(tiny_models, calibration_text, tmp_path):
    source = open_source(tiny_models["biased"])
    full = load_plain(source, torch.float32)
    ids = source.tokenizer()("the quick model reads many words", return_tensors="pt")["input_ids"]
    expected = full(ids).logits
    distance = {}
    for bits in (2, 4):
        options = QuantizeOptions(bits=bits, calib_tokens=512, calib_window=64, tune=False)
        quantize(tiny_models["biased"], tmp_path / str(bits), options, [calibration_text])
        logits = load(tmp_path / str(bits), torch.float32)[0](ids).logits
        distance[bits] = (logits - expected).norm() / expected.norm()
    assert distance[4] < 0.5 * distance[2]


def test_every_tensor_of_the_source_is_planned_exactly_once_and_recorded(tiny_models, calibration_text, tmp_path):
    quantize(tiny_models["odd"], tmp_path / "out", OPTIONS, [calibration_text])
    recorded = [entry["name"] for entry in Artifact.open(tmp_path / "out").record["tensors"]]
    assert sorted(recorded) == sorted(open_source(tiny_models["odd"]).names())
    assert len(set(recorded)) == len(recorded)


def test_inputs_that_no_block_divides_stay_in_16_bits_with_the_reason(tiny_models, calibration_text, tmp_path):
    quantize(tiny_models["odd"], tmp_path / "out", OPTIONS, [calibration_text])
    entries = {entry["name"]: entry for entry in Artifact.open(tmp_path / "out").record["tensors"]}
    kept = entries["model.layers.0.mlp.down_proj.weight"]
    assert kept["format"] == ""
    assert kept["dtype"] == "bfloat16"
    assert "72 inputs are not a multiple of 32" in kept["reason"]
    assert entries["model.layers.0.mlp.up_proj.weight"]["format"] == "trellis"


def test_linears_of_one_input_share_their_signs(tiny_models, calibration_text, tmp_path):
    quantize(tiny_models["biased"], tmp_path / "out", OPTIONS, [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    signs = {name: artifact.parts(module)["signs"] for name, module in artifact.modules.items()}
    attention = "model.layers.0.self_attn."
    assert torch.equal(signs[f"{attention}q_proj"], signs[f"{attention}k_proj"])
    assert torch.equal(signs[f"{attention}q_proj"], signs[f"{attention}v_proj"])
    assert not torch.equal(signs[f"{attention}q_proj"], signs["model.layers.1.self_attn.q_proj"])


class StopRun(Exception):
    pass


class StopAfter:
    """A progress that ends the run after some tensors, as a killed process would."""

    def __init__(self, tensors: int) -> None:
        self.left = tensors

    def stage(self, title: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def tensor(self, record: dict) -> None:
        self.left -= 1
        if self.left == 0:
            raise StopRun


@pytest.mark.parametrize("stop", [1, 4, 7, 9, 15])
def test_an_interrupted_run_ends_byte_identical_when_repeated(tiny_models, calibration_text, tmp_path, stop):
    whole = tmp_path / "whole"
    quantize(tiny_models["tied"], whole, OPTIONS, [calibration_text])
    resumed = tmp_path / "resumed"
    with pytest.raises(StopRun):
        quantize(tiny_models["tied"], resumed, OPTIONS, [calibration_text], progress=StopAfter(stop))
    assert not resumed.exists()
    result = quantize(tiny_models["tied"], resumed, OPTIONS, [calibration_text])
    assert result.resumed_tensors >= stop
    assert files_of(resumed) == files_of(whole)


def test_an_interrupted_run_refuses_other_options_and_names_the_difference(tiny_models, calibration_text, tmp_path):
    with pytest.raises(StopRun):
        quantize(tiny_models["tied"], tmp_path / "out", OPTIONS, [calibration_text], progress=StopAfter(2))
    other = QuantizeOptions(bits=4, calib_tokens=512, calib_window=64, calib_dtype="float32", tune=False)
    with pytest.raises(UsageError, match="bits 3 instead of 4"):
        quantize(tiny_models["tied"], tmp_path / "out", other, [calibration_text])
    assert (
        quantize(tiny_models["tied"], tmp_path / "out", other, [calibration_text], placement=FRESH).resumed_tensors == 0
    )


def test_an_existing_output_is_refused_and_replaced_only_when_asked(tiny_models, calibration_text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        quantize(tiny_models["tied"], tmp_path / "out", OPTIONS, [calibration_text])
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_fresh_replaces_a_checkpoint_but_never_another_directory(tiny_models, tmp_path):
    nearest = QuantizeOptions(rounding="nearest")
    out = tmp_path / "out"
    quantize(tiny_models["tied"], out, nearest)
    quantize(tiny_models["biased"], out, nearest, placement=FRESH)
    assert Artifact.open(out).config["model_type"] == "qwen2"
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "summer.jpg").write_text("mine")
    with pytest.raises(UsageError, match="not a fewbit checkpoint"):
        quantize(tiny_models["tied"], precious, nearest, placement=FRESH)
    assert (precious / "summer.jpg").read_text() == "mine"


def test_not_a_number_in_a_weight_is_refused_and_leaves_no_output(tiny_models, calibration_text, tmp_path):
    model = load_plain(open_source(tiny_models["tied"]), torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((tiny_models["tied"] / name).read_bytes())
    for options in (OPTIONS, QuantizeOptions(rounding="nearest")):
        with pytest.raises(NonFiniteWeights, match=r"model.layers.1.mlp.up_proj.weight holds NaN"):
            quantize(broken, tmp_path / "out", options, [calibration_text], placement=FRESH)
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_seen_before_the_work_begins(tiny_models, calibration_text, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(FewbitError, match="free some space"):
        quantize(tiny_models["tied"], tmp_path / "out", OPTIONS, [calibration_text])
    assert not (tmp_path / "out").exists()


def test_error_feedback_without_text_is_refused_with_the_remedy(tiny_models, tmp_path):
    with pytest.raises(UsageError, match=r"--calib FILE, or use --rounding nearest"):
        quantize(tiny_models["tied"], tmp_path / "out", OPTIONS)


def test_the_layer_stream_computes_what_the_whole_model_computes(tiny_models, calibration_text):
    source = open_source(tiny_models["biased"])
    windows, _ = calibration_windows(source, [CalibrationText(calibration_text)], 640, 64)
    stream = LayerStream(source, get_family("qwen2"), windows)
    batches = list(stream.embed())
    for index in range(len(stream)):
        stream.load(f"model.layers.{index}")
        batches = [stream.run_layer(index, hidden) for hidden in batches]
        stream.unload(f"model.layers.{index}")
    hidden = torch.cat(batches)
    full = load_plain(source, torch.float32)
    expected = full.model(windows, output_hidden_states=True).hidden_states[-1]
    found = full.model.norm(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hessians_are_the_second_moment_of_the_inputs():
    linear = torch.nn.Linear(6, 2)
    x = torch.randn(5, 7, 6)
    with InputCollector([("x", linear)], {"x": InputAxes(None, 1)}) as collector:
        linear(x[:2])
        linear(x[2:])
    flat = x.reshape(-1, 6)
    linear(x)
    assert collector.tokens("x") == 35
    torch.testing.assert_close(collector.take("x", 6).hessian, flat.T @ flat / 35)


def test_the_log_holds_one_line_per_tensor(tiny_models, calibration_text, tmp_path):
    with pytest.raises(StopRun):
        quantize(tiny_models["tied"], tmp_path / "out", OPTIONS, [calibration_text], progress=StopAfter(5))
    lines = [json.loads(line) for line in (tmp_path / ".out.work" / "log.jsonl").read_text().splitlines()]
    tensors = [line for line in lines if "tensor" in line]
    assert len(tensors) == 5
    assert {"bits_per_weight", "relative_error", "seconds"} <= set(tensors[0])


def test_a_model_that_says_bfloat16_is_still_the_same_model_at_the_end(tiny_models, calibration_text, tmp_path):
    source = tmp_path / "bfloat16"
    shutil.copytree(tiny_models["tied"], source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    opened = open_source(source)
    before = opened.fingerprint()
    LayerStream(opened, get_family("llama"), torch.zeros(1, 8, dtype=torch.long))
    assert opened.fingerprint() == before
    quantize(source, tmp_path / "out", OPTIONS, [calibration_text])
    assert all(not problem for _, problem in Artifact.open(tmp_path / "out").verify(opened))


def test_weights_that_are_not_rotated_load_and_verify(tiny_models, calibration_text, tmp_path):
    quantize(tiny_models["tied"], tmp_path / "out", replace(OPTIONS, rotate=False), [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    assert all(module.spec.block == 1 and "signs" not in module.layout() for module in artifact.modules.values())
    assert all(not problem for _, problem in artifact.verify(open_source(tiny_models["tied"])))
    model, tokenizer = load(tmp_path / "out", torch.float32)
    ids = tokenizer("the quick model reads", return_tensors="pt")["input_ids"]
    full = load_plain(open_source(tiny_models["tied"]), torch.float32)(ids).logits
    assert (model(ids).logits - full).norm() < 0.6 * full.norm()


def test_directories_on_the_way_to_the_output_are_made(tiny_models, tmp_path):
    quantize(tiny_models["tied"], tmp_path / "new" / "deep" / "out", QuantizeOptions(rounding="nearest"))
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("work", ["out", "out/work", "."])
def test_a_work_directory_that_shares_its_place_with_the_output_is_refused(tiny_models, tmp_path, work):
    nearest = QuantizeOptions(rounding="nearest")
    root = tmp_path / "new"
    with pytest.raises(UsageError, match="must not contain one another"):
        quantize(tiny_models["tied"], root / "out", nearest, placement=Placement(work=root / work))
    assert not root.exists()


@pytest.mark.parametrize("bits", [3, 3.2])
def test_a_work_directory_with_files_of_others_is_refused_and_left_alone(tiny_models, calibration_text, tmp_path, bits):
    precious = tmp_path / "data" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    options = replace(OPTIONS, bits=bits)
    for work, message in ((precious.parent, "holds no run of fewbit"), (precious, "is no directory")):
        with pytest.raises(UsageError, match=message):
            quantize(tiny_models["tied"], tmp_path / "out", options, [calibration_text], Placement(work=work))
    assert precious.read_text() == "mine"
    assert [path.name for path in precious.parent.iterdir()] == ["precious.txt"]


def test_an_output_that_is_a_link_stays_one_and_what_it_leads_to_is_replaced(tiny_models, tmp_path):
    nearest = QuantizeOptions(rounding="nearest")
    quantize(tiny_models["tied"], tmp_path / "disk" / "real", nearest)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    quantize(tiny_models["biased"], tmp_path / "link", nearest, placement=FRESH)
    assert (tmp_path / "link").is_symlink()
    assert Artifact.open(tmp_path / "disk" / "real").config["model_type"] == "qwen2"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_model_of_which_nothing_can_be_quantized_is_copied(make_tiny, add_tokenizer, calibration_text, tmp_path):
    odd = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1}
    make_tiny("llama", **odd, head_dim=16).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", replace(OPTIONS, head="bf16"), [calibration_text])
    assert not Artifact.open(tmp_path / "out").modules


def test_an_unknown_executor_is_refused_before_any_work():
    with pytest.raises(UsageError, match="unknown executor 'cloud'"):
        Placement(executor="cloud")
    with pytest.raises(UsageError, match="at least 1, not 0"):
        Placement(workers=0)
