"""Honest files to begin from: tiny models in every form that fewbit reads, and an unfinished run."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import BRANCHED, save_character_tokenizer, tiny_model
from fewbit.checkpoint.source import open_source
from fewbit.pipeline.jobs import RoundJob, round_tensor
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.run import quantize
from fewbit.pipeline.workdir import open_work
from gguf_files import write_gguf

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PLAN_OPTIONS = QuantizeOptions(rounding="nearest")


def make_seeds(root: Path) -> dict[str, Path]:
    """Directories by kind; the kinds are those of `hostile_targets.TARGETS`."""
    found = {kind: root / kind for kind in ("plain", "sharded", "trellis", "twinquant", "gguf", "tokenizer", "plan")}
    tiny_model("llama", tied=True, num_hidden_layers=1).save_pretrained(found["plain"])
    save_character_tokenizer(found["plain"])
    tiny_model("qwen2", num_hidden_layers=1).save_pretrained(found["sharded"], max_shard_size="60KB")
    save_character_tokenizer(found["sharded"])
    quantize(found["plain"], found["trellis"], PLAN_OPTIONS)
    twin = QuantizeOptions(format="twinquant", rounding="nearest", rank=32, act_bits=8, head="bf16")
    tiny_model("qwen2", num_hidden_layers=1, **BRANCHED).save_pretrained(root / "branched")
    save_character_tokenizer(root / "branched")
    quantize(root / "branched", found["twinquant"], twin)
    found["gguf"].mkdir()
    write_gguf(found["gguf"] / "model.gguf", tiny_model("llama", num_hidden_layers=1), "Q8_0")
    found["tokenizer"].mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(found["plain"] / name, found["tokenizer"] / name)
    (found["tokenizer"] / "chat_template.jinja").write_text(TEMPLATE)
    _begin_run(found["plan"], found["plain"])
    return found


def _begin_run(directory: Path, model: Path) -> None:
    """A run with one shard, beside its source."""
    shutil.copytree(model, directory / "source")
    source = open_source(directory / "source")
    plan = make_plan(source, PLAN_OPTIONS.resolved(source.weights(), None))
    open_work(directory / "work", plan, {}, fresh=False)
    round_tensor(RoundJob(str(directory / "work"), plan.quantized[0].name))
