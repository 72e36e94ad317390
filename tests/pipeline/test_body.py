"""What goes from layer to layer during calibration is what the rounded model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.pipeline.batches import BatchFiles
from fewbit.pipeline.executors import SerialExecutor
from fewbit.pipeline.jobs import read_shard
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.progress import Silent
from fewbit.pipeline.shards import ShardMaker
from fewbit.pipeline.workdir import open_work


@pytest.fixture(scope="module")
def only_output_projections(tmp_path_factory, make_tiny) -> Path:
    """A LLaMA of which only the attention's output projections have inputs that a rotation block divides."""
    directory = tmp_path_factory.mktemp("only-o")
    config = {**make_tiny("llama").config.to_dict(), "hidden_size": 72, "intermediate_size": 72}
    model = type(make_tiny("llama"))(type(make_tiny("llama").config)(**config)).eval()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def other_families(tmp_path_factory, make_tiny) -> dict[str, Path]:
    """Norms on queries and keys, and norms behind the blocks."""
    found = {}
    for kind in ("qwen3", "gemma3_text"):
        model = make_tiny(kind)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    # What norms do must be seen.
                    parameter += torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(found[kind])
    return found


@pytest.mark.parametrize("name", ["tied", "biased", "odd", "only-o", "qwen3", "gemma3_text"])
def test_hidden_states_behind_the_layers_are_those_of_the_rounded_model(
    tiny_models, only_output_projections, other_families, tmp_path, name
):
    source = open_source({**tiny_models, **other_families, "only-o": only_output_projections}[name])
    options = QuantizeOptions(calib_tokens=640, calib_window=64, calib_dtype="float32", tune=False)
    windows = torch.randint(0, 96, (10, 64), generator=torch.Generator().manual_seed(0))
    plan = make_plan(source, options.resolved(source.weights()))
    assert any(tensor.kind == "body" for tensor in plan.quantized)
    open_work(tmp_path / "work", plan, {}, False)
    ShardMaker(source, plan, windows, tmp_path / "work", SerialExecutor(), Silent()).layers()
    model = load_plain(source, torch.float32)
    with torch.no_grad():
        for tensor in plan.quantized:
            if tensor.kind == "body":
                weight = read_shard(tmp_path / "work", plan, tensor).weight(tensor)
                model.get_submodule(tensor.module).weight.copy_(weight)
        expected = model.model(windows).last_hidden_state
        hidden = BatchFiles(tmp_path / "work" / "hidden")
        found = torch.cat([hidden.read(2, number)["hidden"] for number in range(3)])
        # The inputs of the last linears of a layer's blocks go through bfloat16.
        lost = (model.model.norm(found) - expected).square().mean() / expected.square().mean()
        assert lost.sqrt() < 0.01
