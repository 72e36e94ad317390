"""TwinQuant from a model to a checkpoint that loads: every width, every step of the ablation, every executor."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewbit.checkpoint.artifact import Artifact, QuantizedModule
from fewbit.checkpoint.equivalent import TRANSFORM, EquivalentSource, Transform
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import UsageError
from fewbit.formats import get_format
from fewbit.loading import load
from fewbit.math.hadamard import pack_signs, rotate
from fewbit.math.manifolds import MOST_CONDITION, Invertible
from fewbit.models import get_family
from fewbit.modules import FewbitLinear
from fewbit.pipeline import memory as memory_module
from fewbit.pipeline.calibrate import LayerStream
from fewbit.pipeline.descent import Descent
from fewbit.pipeline.gains import with_gains
from fewbit.pipeline.jobs import Shard, tensor_signs
from fewbit.pipeline.learn import LearnedLinear
from fewbit.pipeline.options import ABLATIONS, QuantizeOptions, ablated
from fewbit.pipeline.plan import PlannedTensor
from fewbit.pipeline.progress import Silent
from fewbit.pipeline.run import Placement, quantize
from fewbit.pipeline.smooth import measure_scales
from fewbit.pipeline.texts import CalibrationText, calibration_windows


def options(**choices) -> QuantizeOptions:
    common = {
        "head": "bf16",
        "calib_tokens": 4096,
        "calib_window": 64,
        "calib_dtype": "float32",
        "rank": 64,
        "learn": False,
        "tune": False,
    }
    return QuantizeOptions(format="twinquant", **{**common, **choices})


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def copy_tokenizer(source: Path, target: Path) -> None:
    for file in source.glob("*token*"):
        shutil.copy(file, target)


def wide(directory: Path, tokenizer: Path, tied: bool, inner: int = 576) -> Path:
    """A random model whose matrices are wide enough for a branch, and whose predictions are not flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 96, "hidden_size": 288, "intermediate_size": inner, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32, "max_position_embeddings": 128}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = AutoConfig.for_model("qwen2", **sizes, **heads, **tokens, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.2, 2.0)
            elif name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(std=0.06)
    model.save_pretrained(directory)
    copy_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def wide_dir(tiny_models, tmp_path_factory) -> Path:
    return wide(tmp_path_factory.mktemp("wide"), tiny_models["tied"], False)


@pytest.fixture(scope="module")
def tied_dir(tiny_models, tmp_path_factory) -> Path:
    return wide(tmp_path_factory.mktemp("tied"), tiny_models["tied"], True)


def distance(directory: Path, out: Path, text: Path) -> float:
    """Relative error of the logits behind the end of what was calibrated on."""
    source = open_source(directory)
    ids = calibration_windows(source, [CalibrationText(text)], 8192, 64)[0][-8:]
    with torch.no_grad():
        exact = load_plain(source, torch.float32)(ids).logits
        return float((load(out, torch.float32)[0](ids).logits - exact).norm() / exact.norm())


@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_a_checkpoint_verifies_against_its_source_and_computes_nearly_the_same(
    wide_dir, calibration_text, tmp_path, act_bits
):
    result = quantize(wide_dir, tmp_path / "out", options(act_bits=act_bits), [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    assert [problem for _, problem in artifact.verify(open_source(wide_dir)) if problem] == []
    assert result.bytes == artifact.inspect()["bytes"]
    for name, module in artifact.modules.items():
        assert module.spec.rank == (0 if name.endswith(("k_proj", "v_proj")) else 64)
    assert distance(wide_dir, tmp_path / "out", calibration_text) < {4: 0.35, 8: 0.07, 16: 0.07}[act_bits]


def test_each_step_of_the_ablation_is_a_plan_of_its_own_and_the_last_is_the_best(wide_dir, calibration_text, tmp_path):
    found = {}
    for step in ABLATIONS:
        out = tmp_path / step
        quantize(wide_dir, out, ablated(options(), step), [calibration_text])
        specs = [module.spec for module in Artifact.open(out).modules.values()]
        assert any(spec.rank for spec in specs) == (step != "naive")
        assert all((spec.block > 1) == (step in ("hadamard", "full")) for spec in specs)
        assert (out / TRANSFORM).exists() == (step == "full")
        found[step] = distance(wide_dir, out, calibration_text)
    assert found["full"] < 0.7 * min(found["naive"], found["low-rank"], found["hadamard"])


def test_smoothing_changes_nothing_but_the_axes_and_balances_them(wide_dir, calibration_text, tmp_path):
    source = open_source(wide_dir)
    windows, _ = calibration_windows(source, [CalibrationText(calibration_text)], 1024, 64)
    transform = measure_scales(source, windows, torch.float32, tmp_path, Silent())
    changed = EquivalentSource(source, transform)
    ids = windows[:2]
    with torch.no_grad():
        exact, found = (load_plain(which, torch.float32)(ids).logits for which in (source, changed))
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    # Deviations of inputs and norms of columns agree up to a factor, where both were far apart.
    stream = LayerStream(changed, get_family("qwen2"), windows)
    inputs: list[torch.Tensor] = []
    layer = stream.load("model.layers.0")
    layer.mlp.gate_proj.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for batch in stream.embed():
        stream.run_layer(0, batch)
    deviations = torch.cat(inputs).flatten(0, -2).std(0)
    columns = (layer.mlp.gate_proj.weight.square().sum(0) + layer.mlp.up_proj.weight.square().sum(0)).sqrt()
    ratio = (columns / deviations).log()
    assert ratio.std() < 0.02
    again = measure_scales(source, windows, torch.float32, tmp_path, Silent())
    assert all(torch.equal(gain, transform.gains[name]) for name, gain in again.gains.items())


def test_learning_gains_keeps_rotations_orthogonal_and_leaves_an_equivalent_model(tied_dir, calibration_text, tmp_path):
    source = open_source(tied_dir)
    chosen = options(act_bits=4, learn=True, learn_steps=16)
    quantize(tied_dir, tmp_path / "out", chosen, [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    learning = artifact.record["learning"]
    held = [look["held"] for look in learning["history"]]
    assert min(held) < 0.98 * held[0]
    assert learning["deviation"] < 1e-5
    assert 1 <= learning["condition"] <= MOST_CONDITION
    transform = Transform.load(tmp_path / "out" / TRANSFORM)
    turn = transform.residual
    assert (turn.T @ turn - torch.eye(len(turn), dtype=turn.dtype)).abs().max() < 1e-12
    assert (turn - torch.eye(len(turn))).abs().max() > 1e-3
    ids = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(0))
    changed = EquivalentSource(source, transform)
    with torch.no_grad():
        exact, found = (load_plain(which, torch.float32)(ids).logits for which in (source, changed))
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    assert [problem for _, problem in artifact.verify(source) if problem] == []
    # The head is still tied, behind a product of the final norm.
    assert "lm_head" not in artifact.modules
    model, _ = load(tmp_path / "out", torch.float32)
    assert model.model.norm.rotation.shape == (288, 288)
    assert distance(tied_dir, tmp_path / "out", calibration_text) < 0.3


class _Stepped(Exception):
    pass


def test_what_learning_keeps_or_computes_again_changes_no_gradient(tied_dir, calibration_text, tmp_path, monkeypatch):
    """With no memory, with enough for the weights on new axes alone, with more than enough: up to the order of sums."""
    moved, plain, found = [], LearnedLinear.moved, []

    def stop(self, loss, share):
        found.append((loss, len(moved), {name: gain.grad for name, gain in self.gains.items()}))
        raise _Stepped

    monkeypatch.setattr(LearnedLinear, "moved", lambda self: moved.append(self.name) or plain(self))
    monkeypatch.setattr(Descent, "descend", stop)
    for memory in (0, 20 << 20, 1 << 40):
        monkeypatch.setattr(memory_module, "available_memory", lambda memory=memory: memory)
        moved.clear()
        with pytest.raises(_Stepped):
            quantize(tied_dir, tmp_path / str(memory), options(act_bits=4, learn=True), [calibration_text])
    (loss, calls, gradients), *others = found
    assert calls > others[0][1] == others[1][1]
    for other, _, other_gradients in others:
        assert other == loss
        for name, gradient in gradients.items():
            assert (other_gradients[name] - gradient).norm() < 1e-4 * gradient.norm()


def test_a_learned_branch_begins_on_axes_that_spread_h_evenly():
    generator = torch.Generator().manual_seed(7)
    fmt = get_format("twinquant")
    spec = fmt.spec(512, 512, 4, rank=128, act_bits=4)
    tensor = PlannedTensor("layer.weight", (512, 512), "body", 0, spec, "0.0")
    linear = LearnedLinear(tensor, torch.randn(512, 512, generator=generator), None)
    linear.axes = SimpleNamespace(columns=lambda matrix, name: matrix, outputs=lambda matrix, name: matrix)
    linear.begin_branch(Invertible(128))
    mixed = torch.randn(512, 512, generator=generator) * torch.logspace(0, -2, 512)
    x = torch.randn(1, 4096, 512, generator=generator) @ mixed.T
    linear(x)
    h = (rotate(x[0] - x[0].mean(0), linear.signs, spec.block) @ linear.down().T).detach()
    energy = h.square().mean(0)
    assert energy.max() < 1.5 * energy.min()


@pytest.mark.parametrize("nothing", ["weight", "inputs"])
def test_learning_takes_weights_and_inputs_of_which_nothing_is_left(nothing):
    spec = get_format("twinquant").spec(512, 1024, 4, rank=128, act_bits=4)
    tensor = PlannedTensor("layer.weight", (512, 1024), "body", 0, spec, "0.0")
    generator = torch.Generator().manual_seed(8)
    weight = torch.zeros(512, 1024) if nothing == "weight" else torch.randn(512, 1024, generator=generator)
    linear = LearnedLinear(tensor, weight, None)
    linear.axes = SimpleNamespace(columns=lambda matrix, name: matrix, outputs=lambda matrix, name: matrix)
    factor = Invertible(spec.rank)
    linear.begin_branch(factor)
    # A single token is its own mean.
    x = torch.randn(1, 1 if nothing == "inputs" else 9, 1024, generator=generator, requires_grad=True)
    with torch.no_grad():
        linear(x)
        linear.balance_unseen()
    linear(x).square().sum().backward()
    assert linear.balanced
    assert linear.down().isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in factor.parameters())
    assert x.grad.isfinite().all()


def test_learning_moves_what_stays_in_16_bits_with_the_axes(tiny_models, calibration_text, tmp_path):
    directory = wide(tmp_path, tiny_models["tied"], False, inner=584)
    chosen = replace(options(act_bits=16, learn=True, learn_steps=2), calib_tokens=1024)
    quantize(directory, tmp_path / "out", chosen, [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    assert not any(name.endswith("down_proj") for name in artifact.modules)
    # Far from it, where some matrices are on the new axes and those that stay are not.
    assert all(look["held"] < 0.07 for look in artifact.record["learning"]["history"])


@pytest.mark.parametrize("rank", [0, 30])
def test_the_control_with_a_branch_of_16_bits_verifies_and_computes_nearly_the_same(
    wide_dir, calibration_text, tmp_path, rank
):
    chosen = options(code="svdquant", act_bits=4, rank=rank, learn=None, tune=None)
    quantize(wide_dir, tmp_path / "out", chosen, [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    assert [problem for _, problem in artifact.verify(open_source(wide_dir)) if problem] == []
    assert {module.spec.rank for module in artifact.modules.values()} == ({24, 30} if rank else {0})
    assert "tuning" not in artifact.record
    assert distance(wide_dir, tmp_path / "out", calibration_text) < 0.35


@pytest.mark.parametrize("act_bits", [4, 8])
def test_tuning_follows_the_quantized_model_and_what_is_stored_computes_what_was_tuned(
    wide_dir, calibration_text, tmp_path, act_bits
):
    found = {}
    for tune in (False, True):
        out = tmp_path / str(tune)
        chosen = options(act_bits=act_bits, tune=tune, tune_steps=8 * tune)
        result = quantize(wide_dir, out, chosen, [calibration_text])
        found[tune] = distance(wide_dir, out, calibration_text)
        assert [problem for _, problem in Artifact.open(out).verify(open_source(wide_dir)) if problem] == []
    before, after = result.tuning_gain
    assert after < 0.97 * before
    assert found[True] < found[False]


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("rank", [0, 64])
def test_a_layer_with_gains_computes_what_the_packed_one_does(rank, act_bits):
    fmt = get_format("twinquant")
    generator = torch.Generator().manual_seed(5)
    spec = replace(fmt.spec(272, 576, 4, rank=64, act_bits=act_bits), rank=rank)
    weight, bias = torch.randn(272, 576, generator=generator), torch.randn(272, generator=generator)
    tensor = PlannedTensor("layer.weight", (272, 576), "body", 0, spec, "0.0")
    signs = tensor_signs(tensor)
    parts = fmt.quantize(weight, spec, signs, {}).parts
    parts["shift"] = torch.randn(576, generator=generator).half()
    parts["offset"] = torch.randn(272, generator=generator)
    linear = FewbitLinear(QuantizedModule("layer", spec, "body"), True, torch.float32)
    linear.load_state_dict({**parts, "signs": pack_signs(signs), "bias": bias})
    x = torch.randn(9, 576, generator=generator)
    tuned = with_gains(tensor, Shard(parts, {}), bias)
    assert (tuned(x) - linear(x)).norm() < 0.01 * linear(x).norm()
    gains = {name: gain.data.uniform_(0.8, 1.2) for name, gain in tuned.gains.items()}
    scaled = fmt.rescale(parts, spec, {name: gain for name, gain in gains.items() if name != "bias"})
    linear.load_state_dict({**scaled, "signs": pack_signs(signs), "bias": bias * gains["bias"]})
    assert (tuned(x) - linear(x)).norm() < 0.01 * linear(x).norm()


@pytest.mark.parametrize("sequential", [True, False])
def test_pools_of_processes_give_the_serial_bytes(wide_dir, calibration_text, tmp_path, sequential):
    made = {}
    for executor in ("serial", "process"):
        placement = Placement(executor=executor, workers=2)
        quantize(wide_dir, tmp_path / executor, options(sequential=sequential), [calibration_text], placement)
        made[executor] = files_of(tmp_path / executor)
    assert made["serial"] == made["process"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_work_too(make_mixture, tiny_models, calibration_text, tmp_path, kind):
    model = make_mixture(kind)
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(tiny_models["tied"], tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", options(act_bits=8), [calibration_text])
    artifact = Artifact.open(tmp_path / "out")
    assert [problem for _, problem in artifact.verify(open_source(tmp_path / "model")) if problem] == []
    assert distance(tmp_path / "model", tmp_path / "out", calibration_text) < 0.2


@pytest.mark.parametrize("learn", [False, True])
def test_norms_behind_blocks_leave_the_stream_unturned(
    make_tiny, branched, tiny_models, calibration_text, tmp_path, learn
):
    model = make_tiny("gemma3_text", True, **branched, query_pre_attn_scalar=32, sliding_window=24)
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(tiny_models["tied"], tmp_path / "model")
    # Tuning folds its gains into norms that multiply with 1 plus what is stored.
    chosen = options(rank=32, learn=learn, learn_steps=2 * learn, tune=learn, tune_steps=2 * learn)
    quantize(tmp_path / "model", tmp_path / "out", chosen, [calibration_text])
    artifact, transform = Artifact.open(tmp_path / "out"), Transform.load(tmp_path / "out" / TRANSFORM)
    assert transform.residual is None
    assert transform.values
    assert transform.scales
    assert any(module.spec.rank for module in artifact.modules.values())
    assert [problem for _, problem in artifact.verify(open_source(tmp_path / "model")) if problem] == []
    assert distance(tmp_path / "model", tmp_path / "out", calibration_text) < 0.2
    source, ids = open_source(tmp_path / "model"), torch.arange(64)[None] % 90 + 3
    with torch.no_grad():
        exact, moved = (load_plain(s, torch.float32)(ids).logits for s in (source, EquivalentSource(source, transform)))
    assert (moved - exact).abs().max() < 1e-3 * exact.abs().max()
    if learn:
        history = artifact.record["learning"]["history"]
        assert min(look["held"] for look in history) <= history[0]["held"]


def rows_of_u(directory: Path) -> dict[str, torch.Tensor]:
    """The rows of U of a checkpoint by module, float32."""
    artifact = Artifact.open(directory)
    fmt = get_format("twinquant")
    return {
        name: fmt.components(artifact.parts(module), module.spec).down
        for name, module in artifact.modules.items()
        if module.spec.rank
    }


@pytest.mark.parametrize("learn", [False, True])
def test_a_branch_begins_on_the_directions_that_are_named(wide_dir, calibration_text, tmp_path, learn):
    rows = {}
    for init in ("svd", "whitened"):
        out = tmp_path / init
        steps = {"learn": learn, "learn_steps": 1 if learn else 0}
        quantize(wide_dir, out, options(init=init, rank=64, calib_tokens=2048, **steps), [calibration_text])
        assert distance(wide_dir, out, calibration_text) < 0.1
        rows[init] = rows_of_u(out)
    for name, first in rows["svd"].items():
        onto = torch.linalg.qr(first.T.double()).Q
        second = torch.linalg.qr(rows["whitened"][name].T.double()).Q
        # Of 64 directions some are shared, but the subspaces are not the same.
        shared = float((onto.T @ second).square().sum()) / 64
        assert 0.2 < shared < 0.98


def test_a_rank_that_nothing_takes_is_told(tiny_models, tmp_path):
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append
    quantize(tiny_models["tied"], tmp_path / "out", options(rounding="nearest", rank=32), progress=progress)
    assert [note for note in notes if "takes a branch of rank 32" in note] != []


@pytest.mark.parametrize("learn", [False, True])
def test_an_expert_that_no_token_reaches_is_rounded_and_reported(
    make_mixture, tiny_models, calibration_text, tmp_path, learn
):
    model = make_mixture("qwen3_moe", experts=5, inner=288, hidden_size=288)
    with torch.no_grad():
        for layer in model.model.layers:
            one, two = layer.mlp.gate.weight[0].clone(), layer.mlp.gate.weight[1].clone()
            # Two of the first four are always above 0, which the last expert always gets.
            layer.mlp.gate.weight.copy_(torch.stack([one, -one, two, -two, torch.zeros_like(one)]))
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(tiny_models["tied"], tmp_path / "model")
    chosen = options(act_bits=8, learn=learn, learn_steps=2 * learn, calib_tokens=1024)
    result = quantize(tmp_path / "model", tmp_path / "out", chosen, [calibration_text])
    assert sorted({name.split(".experts.")[1].partition(".")[0] for name in result.unseen}) == ["4"]
    artifact = Artifact.open(tmp_path / "out")
    assert [problem for _, problem in artifact.verify(open_source(tmp_path / "model")) if problem] == []
    assert any(module.spec.rank for name, module in artifact.modules.items() if ".experts.4." in name)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"code": "ternary"}, "unknown code 'ternary' of twinquant"),
        ({"code": "svdquant", "learn": True}, "neither learned nor tuned"),
        ({"learn": True, "smooth": False}, "axes are learned from"),
        ({"act_bits": 5}, "4, 8 or 16 bits, not 5"),
        ({"init": "random"}, "unknown beginning 'random' of a branch"),
        ({"init": "whitened", "rounding": "nearest"}, "needs calibration text"),
        ({"rank": -2}, "rank of a branch cannot be -2"),
        ({"bits": 3}, "code twin stores 4 bits, not 3"),
        ({"bits": 3.5}, "code twin stores 4 bits only"),
    ],
)
def test_what_the_format_does_not_offer_is_refused(choices, message):
    with pytest.raises(UsageError, match=message):
        options(**choices)
    with pytest.raises(UsageError, match="unknown ablation 'most'"):
        ablated(options(), "most")
    with pytest.raises(UsageError, match="for --format twinquant alone"):
        QuantizeOptions(learn=True)
    with pytest.raises(UsageError, match="belongs to --format twinquant"):
        ablated(QuantizeOptions(), "naive")
