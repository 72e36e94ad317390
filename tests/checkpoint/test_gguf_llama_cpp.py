"""A real model through llama.cpp's own tools and back: its files are read, and it reads what `fewbit export` writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fewbit.checkpoint.export import export
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source

TEXT = "The printing press, c. 1440 – naïve?  Two spaces, 12345 and\n\tvôtre \U0001f642<|im_end|>"


@pytest.fixture(scope="module")
def plain(smollm2_source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real") / "plain"
    export(smollm2_source.path, out)
    return out


@pytest.fixture
def made(plain, import_benchmark, tmp_path):
    """The function `made(kind)`: a file of that type, by llama.cpp's converter and quantizer."""
    llama = import_benchmark("llama")
    peers = import_benchmark("peers")
    sources = peers.fetch(peers.default_cache_dir() / "peers")
    # The converter imports this before it looks whether the model has such a vocabulary, which it has not.
    (tmp_path / "sentencepiece.py").write_text("SentencePieceProcessor = None\n")
    half = tmp_path / "half.gguf"
    command = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(plain), "--outtype", "f16"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([*command, "--outfile", str(half)], check=True, capture_output=True, env=environment)

    def one(kind: str) -> Path:
        return half if kind == "F16" else llama.made_file(half, kind, tmp_path / "made")

    return one


@pytest.mark.slow
def test_files_of_llama_cpp_give_the_model_its_tokenizer_and_a_checkpoint(
    plain, made, smollm2_tokenizer, wiki_eval, tmp_path, run
):
    ids = smollm2_tokenizer(wiki_eval[:2000], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = load_plain(open_source(plain), torch.float32)(ids).logits
        for kind, most in (("F16", 1e-3), ("Q8_0", 0.05), ("Q4_K_M", 0.3)):
            source = open_source(made(kind))
            found = load_plain(source, torch.float32)(ids).logits
            assert (found - expected).norm() < most * expected.norm(), kind
            source.copy_tokenizer(tmp_path / kind)
            copied = AutoTokenizer.from_pretrained(tmp_path / kind)
            assert copied(TEXT).input_ids == smollm2_tokenizer(TEXT).input_ids
            assert copied.chat_template == smollm2_tokenizer.chat_template
    text = tmp_path / "text.txt"
    text.write_text(wiki_eval[:20000])
    sizes = ("--text", text, "--tokens", 2048, "--json")
    code, out, err = run("eval", made("Q4_K_M"), *sizes)
    assert code == 0, err
    full = json.loads(out)["perplexity"]
    code, _, err = run("quantize", made("Q4_K_M"), tmp_path / "out", "--bits", 4, "--rounding", "nearest")
    assert code == 0, err
    code, out, err = run("eval", tmp_path / "out", "--reference", made("Q4_K_M"), *sizes)
    assert code == 0, err
    assert full < json.loads(out)["perplexity"] < 1.3 * full
    # The way out again: what llama.cpp made is read by transformers alone.
    code, out, err = run("export", tmp_path / "out", tmp_path / "decoded", "--json")
    assert code == 0, err
    code, out, err = run("eval", tmp_path / "decoded", *sizes)
    assert code == 0, err
    assert full < json.loads(out)["perplexity"] < 1.3 * full
