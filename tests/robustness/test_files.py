"""Damaged and hostile files end in an answer or a typed error, in bounded time and memory, and write nothing elsewhere.

Some cases of every kind here; `benchmarks/robustness.py files` tries them for minutes, `scripts/fuzz.sh` with coverage.
"""

from __future__ import annotations

import json
import sys
from random import Random

import pytest
from hostile_changes import Link, change, write_files
from hostile_sandbox import CONSTANT_BYTES, Sandbox
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and memory are Linux's")

PLAN = "work/plan.json"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    found = Sandbox(tmp_path_factory.mktemp("hostile"))
    yield found
    found.close()


def test_honest_files_open_within_the_limits(sandbox):
    for outcome in sandbox.honest:
        assert outcome.result == "ok", outcome
        assert outcome.memory <= CONSTANT_BYTES, outcome


@settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(number=st.integers(0, 2**32 - 1), choice=st.integers(0, 2**16))
def test_whatever_is_damaged_ends_in_an_answer_or_a_typed_error(sandbox, number, choice):
    ways = [(kind, target) for kind, targets in sandbox.targets.items() for target in targets]
    outcome = sandbox.run(*ways[choice % len(ways)], number)
    assert outcome.fine, outcome
    assert "\n" not in outcome.message, outcome


# What the first runs of the script found, each once.
FOUND = [
    ("plain", "plain", "config.json", {"head_dim": [[]]}),
    ("plain", "plain", "config.json", {"dtype": "gpt2"}),
    ("plain", "plain", "config.json", {"num_hidden_layers": 10**9}),
    ("plain", "decoder", "config.json", {"num_attention_heads": 2**31 - 1}),
    ("trellis", "decoder", "config.json", {"rms_norm_eps": "x"}),
    ("trellis", "decoder", "config.json", {"vocab_size": 2**30}),
    ("trellis", "loading", "config.json", {"vocab_size": 2**30}),
    ("trellis", "inspect", "fewbit.json", {"tensors": [{"name": "a"}]}),
    ("trellis", "inspect", "fewbit.json", {"tensors": []}),
    ("trellis", "verify", "config.json", {"quantization_config": {"quant_method": "fewbit", "format_version": 1,
                                                                  "modules": [1]}}),
    ("plain", "decoder", "tokenizer_config.json", {"tokenizer_class": 0.5}),
    ("trellis", "exported", "config.json", {"model_type": "\ud800"}),
    ("tokenizer", "tokenizer", "tokenizer_config.json", {"model_max_length": "x", "tokenizer_class": "x"}),
    ("plain", "engine", "tokenizer_config.json", {"model_max_length": "x", "tokenizer_class": "x"}),
    ("sharded", "source", "model.safetensors.index.json", {"weight_map": {"model.norm.weight": "x" * 5000}}),
    ("plan", "plan", PLAN, {"tensors": [1]}),
    ("plan", "plan", PLAN, {"options": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target", "name", "fields"), FOUND)
def test_fields_that_no_honest_file_has_are_a_typed_error(sandbox, kind, target, name, fields):
    files = dict(sandbox.seeds[kind])
    files[name] = json.dumps({**json.loads(files[name]), **fields}).encode()
    outcome = sandbox.run(kind, target, 0, files)
    assert outcome.result == "typed", outcome


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a": ' + b"1" * 6000 + b"}", b"[1]", b"\xff", b""])
@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("plain", "source", "config.json"),
        ("trellis", "inspect", "fewbit.json"),
        ("trellis", "engine", "tokenizer.json"),
        ("plan", "plan", PLAN),
        ("sharded", "source", "model.safetensors.index.json"),
    ],
)
def test_json_that_is_none_or_nested_too_deep_is_a_typed_error(sandbox, kind, target, name, text):
    outcome = sandbox.run(kind, target, 0, {**sandbox.seeds[kind], name: text})
    assert outcome.result == "typed", outcome


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("plain", "source", "config.json"),
        ("plain", "source", "model.safetensors"),
        ("trellis", "loading", "model.safetensors"),
        ("gguf", "exported", "model.gguf"),
        ("plan", "plan", PLAN),
    ],
)
@pytest.mark.parametrize("link", ["/dev/zero", "."])
def test_a_link_to_what_never_ends_or_is_no_file_is_a_typed_error(sandbox, kind, target, name, link):
    outcome = sandbox.run(kind, target, 0, {**sandbox.seeds[kind], name: Link(link)})
    assert outcome.result == "typed", outcome


@pytest.mark.parametrize(
    "name", ["../../../outside/x.weight", "/x.weight", "a/b.weight", "..", "x\0.weight", "x" * 5000]
)
def test_a_plan_cannot_name_a_file_outside_of_its_directory(sandbox, name):
    plan = json.loads(sandbox.seeds["plan"][PLAN])
    plan["tensors"] = [{**entry, "name": name} for entry in plan["tensors"]]
    outcome = sandbox.run("plan", "plan", 0, {**sandbox.seeds["plan"], PLAN: json.dumps(plan).encode()})
    assert (outcome.result, outcome.error) == ("typed", "CorruptFile"), outcome


@pytest.mark.parametrize("facts", ["", "[1]", '{"relative_error": "x"}'])
def test_a_shard_whose_facts_are_none_is_made_again(sandbox, facts):
    files = dict(sandbox.seeds["plan"])
    (name,) = (name for name in files if name.startswith("work/shards/"))
    size = int.from_bytes(files[name][:8], "little")
    header = json.loads(files[name][8 : 8 + size])
    header["__metadata__"]["facts"] = facts
    text = json.dumps(header).encode()
    files[name] = len(text).to_bytes(8, "little") + text + files[name][8 + size :]
    assert sandbox.run("plan", "plan", 0, files).result == "ok"


def test_lists_longer_than_any_vocabulary_are_refused_before_they_are_read(sandbox):
    data = sandbox.seeds["gguf"]["model.gguf"]
    fields = int.from_bytes(data[16:24], "little") + 1
    key = b"general.more"
    count = 3_000_000
    more = len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little") + (0).to_bytes(4, "little")
    more += count.to_bytes(8, "little") + bytes(count)
    longer = data[:16] + fields.to_bytes(8, "little") + more + data[24:]
    outcome = sandbox.run("gguf", "source", 0, {"model.gguf": longer})
    assert (outcome.result, outcome.error) == ("typed", "CorruptFile"), outcome
    assert "more than 2000000 values" in outcome.message


def test_a_case_is_repeated_from_its_number(sandbox, tmp_path):
    files = sandbox.seeds["plain"]
    assert change(Random(7), files) == change(Random(7), files)
    assert write_files(files, tmp_path / "honest") == sum(len(data) for data in files.values())
