"""Models on other axes: the same logits, however the model ties its head and shares its heads."""

import pytest
import torch

from fewbit.checkpoint.equivalent import EquivalentSource, Transform
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import UsageError
from fewbit.models import get_family


def orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def random_transform(source, turn: bool = True, seed: int = 0) -> Transform:
    """Every change there is, far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    family, config = get_family(source.config.model_type), source.config
    heads, size = config.num_key_value_heads, getattr(config, "head_dim", None) or 64
    gains, scales, values = {}, {}, {}
    for name in source.names():
        module = name.removesuffix(".weight")
        place = family.place(module)
        for shared in family.inputs if place else ():
            if shared.norm == place.name:
                gains[module] = torch.rand(source.shape(name), generator=generator) + 0.5
            if place.name in shared.linears and shared.scaled_by:
                scales[module] = torch.rand(source.shape(name)[1], generator=generator) + 0.5
            if place.name in shared.linears and shared.values:
                values[module] = torch.stack([orthogonal(size, generator) for _ in range(heads)])
                values[module] *= torch.rand(size, generator=generator) + 0.5
    residual = orthogonal(config.hidden_size, generator) if turn else None
    return Transform(residual, gains, scales, values)


def assert_same_logits(source, changed, tolerance: float = 2e-5, vocabulary: int = 96):
    ids = torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = load_plain(source, torch.float32)(ids).logits
        after = load_plain(changed, torch.float32)(ids).logits
    assert (before - after).abs().max() <= tolerance * before.abs().max()


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_tiny_models_compute_the_same_logits(make_tiny, tmp_path, kind, tied, turn):
    make_tiny(kind, tied).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    changed = EquivalentSource(source, random_transform(source, turn))
    assert changed.tied_embeddings == tied
    assert ("model.norm.rotation" in changed.names()) == (tied and turn)
    assert_same_logits(source, changed)
    for name in source.names():
        if ".layers." in name and "_norm" not in name and "self_attn.q_proj.bias" not in name:
            unchanged = torch.equal(source.tensor(name), changed.tensor(name))
            # Biases of query and key stand behind everything that changes.
            assert unchanged == name.endswith(("k_proj.bias", "o_proj.bias")), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mixtures_compute_the_same_logits_with_their_routers_turned(make_mixture, tmp_path, kind):
    make_mixture(kind).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    changed = EquivalentSource(source, random_transform(source))
    assert not torch.equal(
        source.tensor("model.layers.0.mlp.gate.weight"), changed.tensor("model.layers.0.mlp.gate.weight")
    )
    assert_same_logits(source, changed)


@pytest.mark.slow
def test_the_real_model_computes_the_same_logits_and_keeps_its_head_tied(smollm2_source):
    changed = EquivalentSource(smollm2_source, random_transform(smollm2_source))
    assert changed.tied_embeddings
    assert_same_logits(smollm2_source, changed, 2e-5, 49152)


def test_rows_are_those_of_the_whole_tensor(make_tiny, tmp_path):
    make_tiny("qwen2", tied=True).save_pretrained(tmp_path)
    changed = EquivalentSource(open_source(tmp_path), random_transform(open_source(tmp_path)))
    for name in changed.names():
        whole = changed.tensor(name)
        assert tuple(whole.shape) == changed.shape(name)
        assert torch.allclose(changed.rows(name, 16, 32), whole[16:32], atol=1e-6), name


def test_a_transform_survives_its_file_and_changes_the_fingerprint(make_tiny, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)
    source = open_source(tmp_path)
    transform = random_transform(source)
    transform.save(tmp_path / "transform")
    loaded = Transform.load(tmp_path / "transform")
    assert {name: tensor.tolist() for name, tensor in loaded.tensors().items()} == {
        name: tensor.tolist() for name, tensor in transform.tensors().items()
    }
    prints = {EquivalentSource(source, t).fingerprint() for t in (transform, loaded, random_transform(source, seed=1))}
    assert len(prints) == 2
    assert source.fingerprint() not in prints


def test_norms_that_feed_no_linear_are_refused(make_tiny, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)
    source = open_source(tmp_path)
    extra = "model.layers.0.post_feedforward_layernorm.weight"

    class WithPostNorm(type(source)):
        def names(self):
            return [*super().names(), extra]

        def shape(self, name):
            return (64,) if name == extra else super().shape(name)

    source.__class__ = WithPostNorm
    turn = Transform(torch.eye(64))
    with pytest.raises(UsageError, match="post_feedforward_layernorm"):
        EquivalentSource(source, turn)
    EquivalentSource(source, Transform())
