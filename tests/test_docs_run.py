"""Every code block of the documentation is run: page by page, in order, where a tiny model and its checkpoints lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit import assets
from fewbit.formats import base as formats
from fewbit.models import base as models
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from pages import PAGES, ROOT, Block, blocks, text_of, words_of

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}a "
# Commands that other tests understand and none runs, each with the reason.
PARSED_ONLY = {
    "make demo": "installs .venv and fetches a model",
    "make test": "installs .venv, and this test is part of it",
    "make fuzz": "installs an environment of its own, and takes 20 minutes",
    "make test-threads": "installs .venv",
    "python benchmarks/gpu.py": "needs a GPU",
}
# Sections whose blocks want more than a model, and the tests that run them.
ELSEWHERE = {
    ("hosts.md", "transformers"): "test_hosts.py",
    ("hosts.md", "PEFT"): "test_hosts.py",
    ("hosts.md", "lm-evaluation-harness"): "test_hosts.py",
    ("hosts.md", "GGUF in, safetensors out"): "test_hosts_files.py",
    ("hosts.md", "Ray"): "test_hosts_files.py",
    ("hosts.md", "vLLM"): "integrations/test_vllm.py",
    ("hosts.md", "Batch inference through vLLM"): "integrations/test_vllm.py",
}


def run_here(page: Path) -> list[Block]:
    return [block for block in blocks(page) if (page.name, block.section) not in ELSEWHERE]


@pytest.fixture(scope="module")
def shelf(make_tiny, add_tokenizer, calibration_text, tmp_path_factory) -> dict[str, Path]:
    """What lies under the names that the pages use."""
    root = tmp_path_factory.mktemp("shelf")
    make_tiny("llama", tied=True, max_position_embeddings=2048).save_pretrained(root / "model")
    add_tokenizer(root / "model")
    (root / "model" / "chat_template.jinja").write_text(TEMPLATE)
    quantize(root / "model", root / "out", QuantizeOptions(rounding="nearest"))
    (root / "text").write_text(calibration_text.read_text()[:2600])  # five windows of 512 characters
    outputs = dict.fromkeys(("OUT", "OUT2", "OUT-2", "OUT-3", "OUT-4"), root / "out")
    return {"MODEL": root / "model", "FILE": root / "text", **outputs}


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)], ids=lambda page: page.name)
def test_a_page_s_blocks_run(page, shelf, reader, monkeypatch):
    monkeypatch.setattr(assets, "fetch_text", lambda name, progress=None: shelf["FILE"])
    monkeypatch.delenv("FEWBIT_API_KEY", raising=False)
    # Pages that show how to add a format or a family add it for this test alone.
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    monkeypatch.setattr(models, "_FAMILIES", dict(models._FAMILIES))
    reader.put(**shelf)
    reader.read(run_here(page), PARSED_ONLY)
    if reader.not_asked:
        pytest.skip(f"no curl on this machine, so this was left out: {reader.not_asked}")


def test_every_exception_is_still_in_a_page():
    commands = {" ".join(words_of(c)) for page in PAGES for block in run_here(page) for c in block.commands()
                if block.language == "sh"}  # fmt: skip
    assert set(PARSED_ONLY) <= commands
    assert set(ELSEWHERE) <= {(page.name, block.section) for page in PAGES for block in blocks(page)}


def test_sections_that_run_elsewhere_are_named_there():
    for (_, section), test in ELSEWHERE.items():
        assert f'"{section}"' in text_of(ROOT / "tests" / test), section
