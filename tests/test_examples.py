"""The scripts of `examples/` do what they say, on a tiny model; the one for vLLM runs in integrations/test_vllm.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    """What a script prints."""
    # The command `fewbit` is beside the interpreter, whether its environment is active or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def texts(calibration_text) -> list[object]:
    return ["--calib", calibration_text, "--calib-tokens", 2048, "--text", calibration_text, "--tokens", 1024]


def test_compressing_says_what_it_cost(tiny_models, tmp_path, texts):
    said = run("compress.py", tiny_models["tied"], tmp_path / "out", *texts)
    assert (tmp_path / "out" / "fewbit.json").exists()
    full, packed = (float(found) for found in re.findall(r"divergence (\S+)", said))
    assert full == 0
    assert 0 < packed < 1
    again = run("compress.py", tiny_models["tied"], tmp_path / "out", *texts)
    assert again.splitlines()[-3:] == said.splitlines()[-3:]


def test_more_bytes_diverge_less(tiny_models, tmp_path, texts):
    said = run("pick_bits.py", tiny_models["tied"], tmp_path / "made", "30kB", "40kB", *texts)
    small, large = (float(found) for found in re.findall(r"divergence (\S+)", said))
    assert 0 < large < small


def test_a_served_checkpoint_answers_as_the_engine_does(tiny_models, tmp_path, monkeypatch):
    # A proxy that nobody runs.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    quantize(tiny_models["tied"], tmp_path / "out", QuantizeOptions(rounding="nearest"))
    said = run("serve_and_ask.py", tmp_path / "out", "abc", "--max-tokens", 8)
    with Engine(tmp_path / "out") as engine:
        answer = engine.generate("abc", SamplingParams(max_tokens=8, temperature=0)).text
    assert said.endswith(f"\n{answer}\n")


def test_every_example_is_run():
    here = Path(__file__)
    tests = "".join(path.read_text(encoding="utf-8") for path in (here, here.parent / "integrations" / "test_vllm.py"))
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []
