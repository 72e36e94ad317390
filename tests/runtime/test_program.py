"""Native programs against transformers and fewbit.load: the same logits, whatever is computed together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.assets import fetch_model
from fewbit.checkpoint.artifact import Artifact
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import CannotLower, FewbitError, UsageError
from fewbit.loading import load_any
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import open_decoder

SUMMATION = 2e-5  # float32 cache: what two orders of summation leave
FLIPPED = 2e-2  # where that decides how an input is rounded to 8 bits, which few tokens may meet
ROUNDED = {"bf16": 2e-4, "int8": 2e-4}  # squared error over squared logits
SENSITIVE = 2e-2  # where random routers change their mind, or random gains sharpen attention
TEXT = (torch.arange(100) * 7) % 90 + 3

FAMILIES = {
    "llama": ("llama", True, {}),
    "llama-3": (
        "llama",
        False,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        False,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", False, {"sliding_window": 24}),
    "qwen2": ("qwen2", False, {}),
    "qwen2-window": ("qwen2", False, {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", True, {}),
    # In one layer, because an input rounded the other way there reaches every later token of the next one.
    "llama-branched": ("llama", True, {"num_hidden_layers": 1}),
    "qwen2-branched": ("qwen2", False, {}),
    "gemma3": (
        "gemma3_text",
        True,
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 24,
            "query_pre_attn_scalar": 32,
        },
    ),
}
MIXTURES = ("qwen3_moe", "mixtral")
TWIN = QuantizeOptions(format="twinquant", rounding="nearest", rank=32, act_bits=8)
STORED = {
    "plain": None,
    "trellis": QuantizeOptions(rounding="nearest"),
    "trellis-4": QuantizeOptions(rounding="nearest", bits=4),
    "twinquant": TWIN,
}


def integers(values) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def batch(*pieces: tuple[int, int, torch.Tensor]) -> Batch:
    """A batch of (slot, first position, tokens) that wants all logits."""
    tokens = torch.cat([piece for _, _, piece in pieces])
    positions = torch.cat([first + torch.arange(len(piece)) for _, first, piece in pieces])
    slots = torch.cat([torch.full_like(piece, slot) for slot, _, piece in pieces])
    return Batch(integers(tokens), integers(positions), integers(slots), integers(torch.arange(len(tokens))))


def logits_of(decoder, *pieces) -> torch.Tensor:
    return torch.from_numpy(decoder.forward(batch(*pieces)).copy())


@pytest.fixture(scope="module")
def models(make_tiny, make_mixture, branched, add_tokenizer, tmp_path_factory):
    """A function from family and storage to the directory of a model."""
    root = tmp_path_factory.mktemp("programs")

    def make(family: str, stored: str):
        plain = root / family
        if not plain.exists():
            if family in MIXTURES:
                model = make_mixture(family)
            else:
                kind, tied, changes = FAMILIES[family]
                sizes = branched if family.endswith("-branched") else {}
                model = make_tiny(kind, tied, **changes, **sizes)
            model.save_pretrained(plain)
            add_tokenizer(plain)
        options = STORED[stored]
        if options is None:
            return plain
        out = root / f"{family}-{stored}"
        if not out.exists():
            quantize(plain, out, options)
        return out

    return make


@torch.inference_mode()
def expected(path, stored: str) -> torch.Tensor:
    """transformers' logits in float32; weights that stay plain are rounded to bfloat16 first, as the decoder does."""
    if stored == "plain":
        return load_any(path, torch.bfloat16)[0].float()(TEXT[None]).logits[0]
    return load_any(path, torch.float32)[0](TEXT[None]).logits[0]


TWINS = ("llama", "llama-branched", "qwen2-branched")
CASES = [(family, stored) for family in (*FAMILIES, *MIXTURES) for stored in ("plain", "trellis")]
CASES += [("llama", "trellis-4"), *((family, "twinquant") for family in TWINS)]


def test_models_with_room_for_branches_have_them_beside_matrices_without(models):
    for family in TWINS:
        modules = Artifact.open(models(family, "twinquant")).modules
        ranks = {name.rpartition(".")[2]: module.spec.rank for name, module in modules.items() if ".0." in name}
        assert ranks.pop("k_proj") == ranks.pop("v_proj") == 0
        assert set(ranks.values()) == ({32} if family.endswith("-branched") else {0})


@pytest.mark.parametrize(("family", "stored"), CASES)
def test_logits_equal_those_of_transformers(models, family, stored):
    path = models(family, stored)
    wanted = expected(path, stored)
    decoder, tokenizer = open_decoder(path, kv="float32", fallback=False)
    assert tokenizer is not None
    far = (logits_of(decoder, (0, 0, TEXT)) - wanted).abs().amax(1)
    assert far.max() < (SUMMATION if stored == "plain" else FLIPPED)
    assert far.quantile(0.8) < SUMMATION
    for kv, bound in ROUNDED.items():
        decoder, _ = open_decoder(path, kv=kv, fallback=False)
        lost = (logits_of(decoder, (0, 0, TEXT)) - wanted).square().mean() / wanted.square().mean()
        assert lost < (SENSITIVE if family in ("gemma3", *MIXTURES) else bound)


STORED_ONCE = [("llama", "trellis"), ("mistral", "plain"), ("qwen2-branched", "twinquant"), ("gemma3", "trellis")]
STORED_ONCE += [("qwen3_moe", "trellis")]


@pytest.mark.parametrize("kv", ["bf16", "int8", "float32"])
@pytest.mark.parametrize(("family", "stored"), STORED_ONCE)
def test_a_prompt_gives_the_same_bits_however_it_is_cut(models, family, stored, kv):
    decoder, _ = open_decoder(models(family, stored), kv=kv, slots=4, fallback=False)
    whole = logits_of(decoder, (0, 0, TEXT))
    for slot, sizes in ((1, [1] * 100), (2, [33, 1, 40, 26]), (3, [7] * 14 + [2])):
        at, found = 0, []
        for size in sizes:
            found.append(logits_of(decoder, (slot, at, TEXT[at : at + size])))
            at += size
        assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_sequences_in_one_batch_get_what_they_get_alone(models, threads):
    decoder, _ = open_decoder(models("qwen2", "trellis"), slots=6, threads=threads, fallback=False)
    texts = {slot: TEXT.roll(11 * slot)[: 20 + 15 * slot] for slot in range(3)}
    alone = {slot: logits_of(decoder, (slot, 0, text)) for slot, text in texts.items()}
    # The first sequence decodes its last token while the others read a piece of their prompts.
    cuts = {0: 19, 1: 30, 2: 2}
    for slot, text in texts.items():
        logits_of(decoder, (3 + slot, 0, text[: cuts[slot]]))
    together = logits_of(decoder, *((3 + slot, cuts[slot], text[cuts[slot] :]) for slot, text in texts.items()))
    assert torch.equal(together, torch.cat([alone[slot][cuts[slot] :] for slot in texts]))


def test_threads_do_not_change_results(models):
    path = models("mistral", "trellis")
    one, _ = open_decoder(path, threads=1, fallback=False)
    three, _ = open_decoder(path, threads=3, fallback=False)
    assert torch.equal(logits_of(one, (0, 0, TEXT)), logits_of(three, (0, 0, TEXT)))


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_copied_prefix_continues_like_its_source(models, kv):
    decoder, _ = open_decoder(models("llama", "trellis"), kv=kv, slots=2, fallback=False)
    whole = logits_of(decoder, (0, 0, TEXT))
    logits_of(decoder, (1, 0, TEXT.flip(0)))
    decoder.copy(0, 1, 70)
    assert torch.equal(logits_of(decoder, (1, 70, TEXT[70:])), whole[70:])


def test_writing_at_a_lower_position_drops_what_stood_there(models):
    decoder, _ = open_decoder(models("llama", "trellis"), fallback=False)
    whole = logits_of(decoder, (0, 0, TEXT))
    logits_of(decoder, (0, 40, TEXT.flip(0)[:30]))
    assert torch.equal(logits_of(decoder, (0, 40, TEXT[40:])), whole[40:])


def test_only_wanted_logits_come_out(models):
    decoder, _ = open_decoder(models("llama", "trellis"), fallback=False)
    whole = logits_of(decoder, (0, 0, TEXT))
    everything = batch((0, 0, TEXT))
    some = Batch(everything.tokens, everything.positions, everything.slots, integers([3, 50, 99]))
    assert np.array_equal(decoder.forward(some), whole[[3, 50, 99]].numpy())
    none = Batch(everything.tokens, everything.positions, everything.slots, integers([]))
    assert decoder.forward(none).shape == (0, decoder.vocabulary)


def test_a_long_cache_is_attended_in_segments_with_the_same_bits(make_tiny, tmp_path):
    make_tiny("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    text = (torch.arange(1500) * 11) % 90 + 3
    one, _ = open_decoder(tmp_path, threads=1, block=1500, context=2048, fallback=False)
    many, _ = open_decoder(tmp_path, threads=4, block=1500, context=2048, fallback=False)
    whole = logits_of(one, (0, 0, text))
    assert torch.equal(logits_of(many, (0, 0, text)), whole)
    for at in range(1490, 1500):
        assert torch.equal(logits_of(many, (0, at, text[at : at + 1])), whole[at : at + 1])


def test_arguments_that_do_not_fit_are_refused(models):
    path = models("llama", "trellis")
    with pytest.raises(UsageError, match="128 positions"):
        open_decoder(path, context=129)
    with pytest.raises(UsageError, match="bf16, int8"):
        open_decoder(path, kv="fp8")
    decoder, _ = open_decoder(path, block=8, fallback=False)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        logits_of(decoder, (0, 0, TEXT[:9]))
    with pytest.raises(ValueError, match="outside of the context"):
        logits_of(decoder, (0, 128, TEXT[:1]))
    with pytest.raises(ValueError, match="no slot 1"):
        logits_of(decoder, (1, 0, TEXT[:1]))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        logits_of(decoder, (0, 0, torch.tensor([96])))
    decoder.close()
    with pytest.raises(UsageError, match="closed"):
        logits_of(decoder, (0, 0, TEXT[:1]))


def test_a_family_without_steps_is_named(make_tiny, tmp_path):
    make_tiny("olmo2").save_pretrained(tmp_path)
    with pytest.raises(CannotLower, match="'olmo2'"):
        open_decoder(tmp_path, fallback=False)


@pytest.mark.slow
def test_the_real_model_predicts_what_transformers_does(smollm2_dir, smollm2_source, smollm2_tokenizer, wiki_eval):
    ids = torch.tensor(smollm2_tokenizer(wiki_eval[:4000])["input_ids"])[:300]
    model = load_plain(smollm2_source, torch.bfloat16).float()
    with torch.inference_mode():
        wanted = model(ids[None]).logits[0]
    found = {}
    for kv in ("float32", "bf16", "int8"):
        decoder, _ = open_decoder(smollm2_dir, kv=kv, block=300, fallback=False)
        found[kv] = logits_of(decoder, (0, 0, ids))
    # Logits lie between -40 and 40; a rounded cache moves single ones by up to 2.
    assert (found["float32"] - wanted).abs().max() < 2e-3
    reference = wanted.log_softmax(1)
    for kv, bound in (("bf16", 1e-3), ("int8", 3e-3)):
        lost = reference.exp() * (reference - found[kv].log_softmax(1))
        assert lost.sum(1).mean() < bound  # nats
    assert torch.equal(logits_of(decoder, (0, 299, ids[299:])), found["int8"][299:])


@pytest.mark.slow
def test_a_real_qwen_predicts_what_transformers_does(wiki_eval):
    try:
        source = open_source(fetch_model("qwen2.5-coder-1.5b"))
    except FewbitError as error:
        pytest.skip(str(error))
    ids = torch.tensor(source.tokenizer()(wiki_eval[:2000])["input_ids"])[:100]
    model = load_plain(source, torch.bfloat16)
    with torch.inference_mode():
        # Layer by layer in float32, for two models of that size do not fit beside each other everywhere.
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda module, _: module.float() and None)
            layer.register_forward_hook(lambda module, *_: module.bfloat16() and None)
        model.model.norm.float()
        hidden = model.model(inputs_embeds=model.model.embed_tokens(ids[None]).float()).last_hidden_state[0]
        wanted = hidden @ model.lm_head.weight.float().T
    del model
    decoder, _ = open_decoder(source.path, kv="float32", block=100, fallback=False)
    found = logits_of(decoder, (0, 0, ids))
    assert (found - wanted).abs().max() < 2e-2
    assert torch.equal(found.argmax(1), wanted.argmax(1))
