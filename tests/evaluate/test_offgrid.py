"""The off-grid form: the same function, and weights that 4-bit rounding no longer reproduces."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbit.errors import UsageError
from fewbit.evaluate import off_grid, write_off_grid
from fewbit.evaluate.offgrid import small_rotation


def four_bit_error(weight: torch.Tensor) -> float:
    """Relative squared error of asymmetric round-to-nearest at 4 bits in groups of 32."""
    groups = weight.double().view(-1, 32)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / 15
    rounded = ((groups - low) / step).round() * step + low
    return ((rounded - groups).square().sum() / groups.square().sum()).item()


@pytest.fixture(scope="module")
def off_grid_smollm2(smollm2):
    return off_grid(copy.deepcopy(smollm2))


def test_the_rotation_is_orthogonal_small_and_reproducible():
    rotation = small_rotation(128, 0.3, seed=1)
    assert torch.allclose(rotation @ rotation.T, torch.eye(128, dtype=torch.float64), atol=1e-12)
    assert rotation.diagonal().mean() == pytest.approx(torch.tensor(0.3).cos().item(), abs=0.02)
    assert torch.equal(rotation, small_rotation(128, 0.3, seed=1))
    assert not torch.allclose(rotation, small_rotation(128, 0.3, seed=2))


@pytest.mark.slow
def test_the_real_model_computes_the_same_logits(smollm2, off_grid_smollm2, smollm2_tokenizer, wiki_eval):
    ids = torch.tensor(smollm2_tokenizer(wiki_eval[:300])["input_ids"])[None]
    with torch.inference_mode():
        before, after = smollm2(ids).logits, off_grid_smollm2(ids).logits
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert not off_grid_smollm2.config.tie_word_embeddings


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen2", True), ("qwen3", False)])
def test_tiny_models_of_every_family_compute_the_same_logits(make_tiny, kind, tied):
    model = make_tiny(kind, tied)
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(ids).logits
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        after = off_grid(model, angle=0.3, seed=3)(ids).logits
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    # Everything on the residual stream did change.
    for name in ("model.embed_tokens", "model.norm", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        assert not torch.allclose(weights[f"{name}.weight"], model.state_dict()[f"{name}.weight"], atol=1e-3)


def test_biases_that_write_to_the_residual_stream_are_rotated(make_tiny):
    model = make_tiny("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.randn(64))
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        before = model(ids).logits
        assert (before - off_grid(model)(ids).logits).abs().max() <= 1e-5 * before.abs().max()


def test_mixtures_are_refused_and_left_as_they_are(make_mixture):
    model = make_mixture("mixtral")
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(UsageError, match="experts"):
        off_grid(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_norm_that_feeds_no_linear_is_refused(make_tiny):
    model = make_tiny("llama")
    model.model.layers[1].extra_norm = torch.nn.RMSNorm(64)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(UsageError, match=r"layers\.1\.extra_norm"):
        off_grid(model)
    assert torch.equal(before, model.model.embed_tokens.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_the_grid_trap_is_real_and_the_rotation_gets_out_of_it(smollm2, off_grid_smollm2, name):
    on, off = (
        four_bit_error(model.get_submodule(f"model.layers.5.{name}").weight.detach())
        for model in (smollm2, off_grid_smollm2)
    )
    assert on < 1e-6
    assert off > 1e-3


def test_the_written_directory_is_the_same_model_for_transformers(make_tiny, tmp_path, tiny_qwen2_dir):
    write_off_grid(tiny_qwen2_dir, tmp_path / "off", seed=2, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tiny_qwen2_dir)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "off")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = original(ids).logits
        assert (before - written(ids).logits).abs().max() <= 1e-5 * before.abs().max()
