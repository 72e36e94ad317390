"""The command line: every verb on a tiny model, and the errors of the silliest inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.console import parse_size
from fewbit.errors import UsageError


@pytest.fixture(scope="module")
def checkpoint(tiny_models, calibration_text, tmp_path_factory) -> Path:
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize

    out = tmp_path_factory.mktemp("cli") / "out"
    quantize(tiny_models["tied"], out, QuantizeOptions(calib_tokens=256, calib_window=64), [calibration_text])
    return out


def test_quantize_prints_one_json_object_with_the_promised_keys(run, tiny_models, calibration_text, tmp_path):
    out = tmp_path / "out"
    settings = ("--calib", calibration_text, "--calib-tokens", 256, "--calib-window", 64, "--json")
    code, stdout, _ = run("quantize", tiny_models["biased"], out, *settings)
    assert code == 0
    report = json.loads(stdout)
    assert {"output", "seconds", "peak_memory_bytes", "bits_per_weight"} <= set(report)
    assert report["output"] == str(out)
    assert (out / "config.json").is_file()


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, tiny_models, tmp_path):
    arguments = ("quantize", tiny_models["odd"], tmp_path / "out", "--rounding", "nearest", "--dry-run")
    code, stdout, _ = run(*arguments)
    assert code == 0
    assert "72 inputs" in stdout
    assert "trellis, 3 bits" in stdout
    code, stdout, _ = run(*arguments, "--json")
    plan = json.loads(stdout)
    assert plan["totals"]["bits_per_weight"]["total"] > 3
    assert plan["prediction"]["seconds"] > 0
    assert plan["prediction"]["peak_memory_bytes"] > plan["totals"]["bytes"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    code, _, stderr = run(*arguments)
    assert code == 2
    assert "--fresh" in stderr
    assert run(*arguments, "--fresh")[0] == 0


def test_inspect_lists_every_tensor_and_agrees_with_its_json(run, checkpoint):
    code, stdout, _ = run("inspect", checkpoint, "--json")
    report = json.loads(stdout)
    assert code == 0
    assert {"bits_per_weight", "bytes", "tensors"} <= set(report)
    assert set(report["bits_per_weight"]) == {"body", "total"}
    code, stdout, _ = run("inspect", checkpoint)
    assert code == 0
    assert f"{report['bits_per_weight']['total']:.3f} over everything" in stdout


def test_verify_says_all_well_and_then_finds_a_changed_byte(run, checkpoint, tmp_path):
    import shutil

    code, stdout, _ = run("verify", checkpoint, "--json")
    assert (code, json.loads(stdout)["ok"]) == (0, True)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-100] ^= 255
    (copy / "model.safetensors").write_bytes(bytes(data))
    code, stdout, _ = run("verify", copy, "--json")
    assert (code, json.loads(stdout)["ok"]) == (1, False)


def test_eval_prints_the_promised_keys_with_and_without_a_reference(run, checkpoint, tiny_models, calibration_text):
    settings = ("--text", calibration_text, "--window", 64, "--tokens", 256, "--json")
    code, stdout, _ = run("eval", checkpoint, *settings, "--reference", tiny_models["tied"])
    report = json.loads(stdout)
    assert code == 0
    promised = "perplexity perplexity_ratio kl_mean kl_p99 top1_agreement bits_per_char tokens window"
    spreads = "perplexity_stderr perplexity_ratio_stderr kl_stderr"
    assert {*promised.split(), *spreads.split()} <= set(report)
    assert report["kl_mean"] > 0
    code, stdout, _ = run("eval", tiny_models["tied"], *settings)
    assert (code, json.loads(stdout)["kl_mean"]) == (0, None)


def test_info_names_the_instruction_set_and_the_formats(run):
    code, stdout, _ = run("info", "--json")
    report = json.loads(stdout)
    assert code == 0
    assert {"trellis", "ternary", "iq3_s", "int8"} <= set(report["formats"])
    assert report["isa"]


def test_help_and_version_come_without_importing_torch():
    program = (
        "import sys; sys.argv = ['fewbit', '--help']\n"
        "from fewbit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_silly_requests_get_one_line_with_a_remedy_and_a_code(run, tiny_models, checkpoint, calibration_text, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x01" * 50)
    corrupt = tmp_path / "corrupt.gguf"
    corrupt.write_bytes(b"GGUF" + bytes(range(200)))
    model, out = tiny_models["tied"], tmp_path / "out"
    cases = [
        (("quantize", tmp_path / "nothing", out), 2, "nothing"),
        (("quantize", model, out, "--format", "gptq"), 2, "unknown format"),
        (("quantize", model, out, "--code", "magic", "--calib", calibration_text), 2, "unknown code"),
        (("quantize", model, out, "--bits", "7", "--calib", calibration_text), 2, "not 7"),
        (("quantize", model, out, "--calib", tmp_path / "none.txt"), 2, "does not exist"),
        (("quantize", model, out, "--calib", text), 2, "longer file"),
        (("quantize", model, out, "--calib", binary), 2, "UTF-8"),
        (("quantize", corrupt, out, "--calib", calibration_text), 1, "corrupt.gguf"),
        (("quantize", model, checkpoint, "--rounding", "nearest"), 2, "--fresh"),
        (("inspect", model), 2, "not a fewbit checkpoint"),
        (("verify", tmp_path / "nothing"), 2, "does not exist"),
        (("eval", checkpoint, "--text", text), 2, "longer text"),
        (("eval", checkpoint, "--text", tmp_path / "none.txt"), 2, "does not exist"),
        (("eval", checkpoint, "--text", tmp_path), 2, "directory"),
        (("eval", checkpoint, "--text", calibration_text, "--dtype", "int4"), 2, "bfloat16 or float32"),
    ]
    for arguments, expected, words in cases:
        code, stdout, stderr = run(*arguments)
        message = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert code == expected, (arguments, stderr)
        assert len(message) == 1, (arguments, stderr)
        assert words in message[0], (arguments, stderr)
        assert "Traceback" not in stderr + stdout
        assert not out.exists()


def test_words_the_command_line_does_not_know_exit_with_2(run):
    assert run("quantise")[0] == 2
    assert run("quantize", "only-one-argument")[0] == 2
    assert run("eval", "x", "--windows", "3")[0] == 2


@pytest.mark.parametrize("text", ["0", "0MB", "-1GB", "800TB", "", "MB"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="such as 800MB"):
        parse_size(text)


def test_sizes_are_decimal():
    assert parse_size("800MB") == 800_000_000
    assert parse_size(" 1.2 gb") == 1_200_000_000
    assert parse_size("512") == 512
