"""The figures: against closed forms on toy models, and on the real model and text."""

import hashlib
import json
import math

import pytest
import torch

from fewbit.errors import UsageError
from fewbit.evaluate import divergence, evaluate, evaluate_many, windows
from fewbit.evaluate.divergence import position_losses

VOCABULARY = 50


class Letters:
    """A tokenizer of one token per character, with or without a beginning-of-sequence token (id 0)."""

    def __init__(self, bos: bool = False) -> None:
        self.bos, self.bos_token_id = bos, 0 if bos else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [1 + ord(letter) % (VOCABULARY - 1) for letter in text]
        return {"input_ids": [0, *ids] if self.bos and add_special_tokens else ids}

    def batch_decode(self, rows, **_):
        return ["x" * int((row > 0).sum()) for row in rows]


def table_model(seed: int, scale: float = 1.0):
    """Logits that depend on the current token only."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale
    return lambda ids: table[ids]


TEXT = "".join(chr(97 + (7 * n * n + n) % 26) for n in range(1000))


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    result = evaluate(lambda ids: torch.zeros(*ids.shape, VOCABULARY), Letters(), TEXT, window=50, tokens=500)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.perplexity_stderr == pytest.approx(0, abs=1e-3)
    assert result.bits_per_char == pytest.approx(math.log2(VOCABULARY), rel=1e-6)
    assert result.kl_mean is None
    assert result.top1_agreement is None


def test_perplexity_stderr_and_divergence_equal_their_definitions():
    model, reference = table_model(1), table_model(2)
    result = evaluate(model, Letters(), TEXT, reference, window=100, tokens=1000)
    cuts = windows(Letters(), TEXT, 100, 1000)
    scores = torch.log_softmax(model(cuts[:, :-1]).double(), -1)
    expected = torch.log_softmax(reference(cuts[:, :-1]).double(), -1)
    per_window = -scores.gather(2, cuts[:, 1:, None]).squeeze(2).mean(1)
    nats = (expected.exp() * (expected - scores)).sum(-1)
    assert result.perplexity == pytest.approx(per_window.mean().exp().item(), rel=1e-5)
    assert result.perplexity_stderr == pytest.approx(
        (per_window.mean().exp() * per_window.std() / 10**0.5).item(), rel=1e-4
    )
    of_reference = -expected.gather(2, cuts[:, 1:, None]).squeeze(2).mean(1)
    ratio = (per_window - of_reference).mean().exp().item()
    assert result.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert result.perplexity_ratio_stderr == pytest.approx(
        ratio * (per_window - of_reference).std().item() / 10**0.5, rel=1e-4
    )
    assert result.kl_mean == pytest.approx(nats.mean().item(), rel=1e-5)
    assert result.kl_stderr == pytest.approx(nats.mean(1).std().item() / 10**0.5, rel=1e-4)
    assert result.kl_p99 == pytest.approx(nats.flatten().quantile(0.99).item(), rel=0.05)
    assert result.top1_agreement == pytest.approx((scores.argmax(-1) == expected.argmax(-1)).double().mean().item())


def test_a_model_does_not_diverge_from_itself():
    model = table_model(3, scale=20.0)
    result = evaluate(model, Letters(), TEXT, model, window=50, tokens=500)
    assert (result.perplexity_ratio, result.perplexity_ratio_stderr) == (1, 0)
    assert (result.kl_mean, result.kl_stderr) == (0, 0)
    assert result.kl_p99 == 0
    assert result.top1_agreement == 1


def test_chunks_of_positions_do_not_change_the_figures(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 99, VOCABULARY, generator=generator)
    targets = torch.randint(VOCABULARY, (99,), generator=generator)
    whole = position_losses(logits, targets, reference)
    monkeypatch.setattr(divergence, "CHUNK_VALUES", 7 * VOCABULARY)
    pieces = position_losses(logits, targets, reference)
    assert torch.allclose(whole.nll, pieces.nll)
    assert torch.allclose(whole.divergence, pieces.divergence)
    assert torch.equal(whole.agreement, pieces.agreement)


def test_many_models_run_the_reference_once_per_window():
    calls = []
    reference = table_model(4)

    def counted(ids):
        calls.append(ids)
        return reference(ids)

    models = {"self": counted, "a": table_model(5), "b": table_model(6)}
    steps = []
    many = evaluate_many(
        models, Letters(), TEXT, counted, window=100, tokens=300, progress=lambda *step: steps.append(step)
    )
    assert len(calls) == 3
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert many["self"].kl_mean == 0
    assert many["a"] == evaluate(models["a"], Letters(), TEXT, reference, window=100, tokens=300)


def test_windows_do_not_overlap_and_cover_the_start_of_the_text():
    ids = torch.tensor(Letters()(TEXT)["input_ids"])
    assert torch.equal(windows(Letters(), TEXT, 64, 256), ids[:256].view(4, 64))
    assert windows(Letters(), TEXT, 300, 20480).shape == (3, 300)


def test_a_beginning_token_starts_every_window_where_the_tokenizer_adds_one():
    cuts = windows(Letters(bos=True), TEXT, 64, 256)
    assert (cuts[:, 0] == 0).all()
    assert (cuts[:, 1:] > 0).all()
    assert torch.equal(cuts[:, 1:].flatten(), torch.tensor(Letters()(TEXT)["input_ids"][: 4 * 63]))
    assert torch.equal(windows(Letters(bos=True), TEXT, 64, 256, bos=False), windows(Letters(), TEXT, 64, 256))
    with pytest.raises(UsageError, match="no beginning-of-sequence"):
        windows(Letters(), TEXT, 64, 256, bos=True)


def test_a_text_shorter_than_a_window_is_a_usage_error_with_the_remedy():
    with pytest.raises(UsageError, match=r"10 tokens.*longer text"):
        evaluate(table_model(1), Letters(), TEXT[:10])
    with pytest.raises(UsageError, match="at least one window"):
        windows(Letters(), TEXT, 512, 100)


def test_different_vocabularies_have_no_divergence():
    with pytest.raises(UsageError, match="vocabulary"):
        evaluate(table_model(1), Letters(), TEXT, lambda ids: torch.zeros(*ids.shape, 49), window=50)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(UsageError, match="NaN"):
        evaluate(lambda ids: torch.full((*ids.shape, VOCABULARY), math.nan), Letters(), TEXT, window=50)


def test_json_holds_the_promised_keys_and_no_nan():
    result = evaluate(table_model(1), Letters(), TEXT, window=50, tokens=50)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["perplexity_stderr"] is data["perplexity_ratio"] is data["kl_stderr"] is None
    assert {
        "perplexity", "perplexity_stderr", "kl_mean", "kl_p99", "top1_agreement", "bits_per_char", "tokens", "window"
    } <= set(data)  # fmt: skip
    assert data["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.mark.slow
def test_the_real_model_reads_real_text_as_transformers_own_loss_says(smollm2, smollm2_tokenizer, wiki_eval):
    result = evaluate(smollm2, smollm2_tokenizer, wiki_eval, window=128, tokens=256)
    with torch.inference_mode():
        cuts = windows(smollm2_tokenizer, wiki_eval, 128, 256)
        loss = sum(smollm2(input_ids=ids[None], labels=ids[None]).loss.item() for ids in cuts) / 2
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert not result.bos
    # The characters of the predicted tokens, counted where they stand in the text.
    ends = [end for _, end in smollm2_tokenizer(wiki_eval[:2000], return_offsets_mapping=True)["offset_mapping"]]
    characters = ends[127] - ends[0] + ends[255] - ends[128]
    assert result.bits_per_char == pytest.approx(2 * 127 * math.log2(result.perplexity) / characters, rel=1e-6)
