"""Packed checkpoints run without torch and transformers, which take longer to import than a small model to load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize

OPTIONS = {
    "trellis": QuantizeOptions(rounding="nearest"),
    "twinquant": QuantizeOptions(format="twinquant", rounding="nearest", rank=32, act_bits=8, head="bf16"),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
COMMAND = """
import sys
from fewbit.cli import main
sys.argv = ["fewbit", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "transformers"} & set(sys.modules)
"""
LIBRARY = """
import sys
import fewbit
with fewbit.Engine(sys.argv[1], slots=2) as engine:
    params = fewbit.SamplingParams(max_tokens=5, temperature=0.8, logprobs=2, seed=1)
    done = engine.generate(["one two", "three"], params)
    ids = engine.encode_chat([{"role": "user", "content": "one"}])
    assert len(done) == 2 and ids
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def packed(make_tiny, branched, add_tokenizer, tmp_path_factory):
    """A function from a format to a small checkpoint."""
    root = tmp_path_factory.mktemp("packed")
    plain = root / "plain"
    make_tiny("llama", rope_parameters=LLAMA3, **branched).save_pretrained(plain)
    add_tokenizer(plain)

    def make(name: str):
        out = root / name
        if not out.exists():
            quantize(plain, out, OPTIONS[name])
            (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        return out

    return make


def run(program: str, *arguments: str, words: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], input=words, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", OPTIONS)
def test_the_verbs_do_without(packed, name):
    path = str(packed(name))
    assert json.loads(run(COMMAND, "generate", path, "-p", "one two", "--max-tokens", "4", "--json"))["tokens"] <= 4
    run(COMMAND, "chat", path, "--max-tokens", "3", words="one\n")
    report = run(COMMAND, "bench", path, "--prompt-tokens", "8", "--gen-tokens", "4", "--repeats", "1", "--json")
    assert json.loads(report)["decode"]


def test_the_library_does_without(packed):
    run(LIBRARY, str(packed("trellis")))


def test_the_server_does_without(packed):
    run(
        "import sys, fewbit.serve.server, fewbit.serve.app, fewbit\n"
        "with fewbit.Engine(sys.argv[1]) as engine:\n"
        "    fewbit.serve.app.create_app(engine, fewbit.serve.settings.Settings())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n",
        str(packed("trellis")),
    )
