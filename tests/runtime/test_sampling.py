"""Sampling: the native code draws what the specification draws, and the specification does what its settings say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.errors import FewbitError, UsageError
from fewbit.runtime.sampling import SamplingParams, log_probabilities, sample_reference, sample_rows, uniform


def logits_of(size: int, seed: int, spread: float = 3.0, whole: bool = False) -> np.ndarray:
    values = spread * np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return np.round(values) if whole else values


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.2, top_k=40, top_p=0.9),
    SamplingParams(temperature=2.5, top_k=7),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=0.7, top_p=0.999, min_p=0.01),
    SamplingParams(temperature=1.3, min_p=0.05),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=0.8, top_k=3000, top_p=0.01),
    SamplingParams(temperature=1.0, repetition_penalty=1.4, top_k=20),
    SamplingParams(repetition_penalty=3.0),
    SamplingParams(temperature=1e-4, top_p=0.9),
    SamplingParams(temperature=1e-40),
    SamplingParams(temperature=100.0, top_p=0.3),
]


@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: f"t{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}")
@pytest.mark.parametrize("size", [1, 7, 300, 5000])
def test_the_same_random_number_gives_the_same_token_as_the_specification(params, size):
    for seed in range(12):
        logits = logits_of(size, seed, spread=(0.1, 1, 3, 10)[seed % 4], whole=seed % 3 == 0)
        seen = sorted(set(np.random.default_rng(seed).integers(0, size, 9).tolist()))
        draws = [0.0, 1 - 2.0**-53, *(uniform(seed, number) for number in range(6))]
        rows = np.tile(logits, (len(draws), 1))
        found = sample_rows(rows, [params] * len(draws), [seen] * len(draws), draws)
        assert found == [sample_reference(logits, params, seen, draw) for draw in draws]
        assert np.array_equal(rows, np.tile(logits, (len(draws), 1))), "the penalty is taken back"


def test_rows_are_drawn_by_their_own_settings():
    rows = np.stack([logits_of(5000, seed) for seed in range(len(SETTINGS))])
    seen = [[1, 2, 3] if params.repetition_penalty != 1 else [] for params in SETTINGS]
    draws = [uniform(9, number) for number in range(len(SETTINGS))]
    together = sample_rows(rows, SETTINGS, seen, draws)
    alone = [
        sample_rows(rows[index : index + 1], [params], [seen[index]], [draws[index]])[0]
        for index, params in enumerate(SETTINGS)
    ]
    assert together == alone


def test_without_the_native_code_the_specification_is_used(monkeypatch):
    rows = np.stack([logits_of(300, 1), logits_of(300, 2)])
    arguments = (rows, [SETTINGS[2], SETTINGS[9]], [[], [5, 6]], [0.3, 0.8])
    found = sample_rows(*arguments)
    monkeypatch.setattr("fewbit.runtime.sampling.load_native", lambda: None)
    assert sample_rows(*arguments) == found


def test_draws_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    draws = [uniform(3, number) for number in range(20_000)]
    rows = np.tile(logits, (len(draws), 1))
    found = sample_rows(rows, [SamplingParams(temperature=1.0)] * len(draws), [()] * len(draws), draws)
    shares = np.bincount(found, minlength=4) / len(draws)
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.015


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.8}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.5}, {0, 1}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_the_tokens_they_name(settings, possible):
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    params = SamplingParams(temperature=1.0, **settings)
    draws = [index / 400 for index in range(400)]
    rows = np.tile(logits, (len(draws), 1))
    assert set(sample_rows(rows, [params] * len(draws), [()] * len(draws), draws)) == possible
    assert {sample_reference(logits, params, (), draw) for draw in draws} == possible


def test_of_equal_logits_the_lowest_token_is_the_likeliest():
    logits = np.zeros((1, 1000), np.float32)
    assert sample_rows(logits, [SamplingParams()], [()], [0.0]) == [0]
    assert sample_rows(logits, [SamplingParams(temperature=1.0, top_k=1)], [()], [0.9]) == [0]


def test_penalized_tokens_lose_and_a_penalty_below_one_favours_them():
    logits = np.array([2.0, 1.9, -1.0, -1.1], dtype=np.float32)
    assert sample_reference(logits, SamplingParams(repetition_penalty=1.5), [0], 0.0) == 1
    assert sample_reference(logits, SamplingParams(repetition_penalty=0.5), [1], 0.0) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    logits = np.zeros((2, 50), np.float32)
    logits[1, 17] = bad
    params = SamplingParams(temperature=temperature)
    with pytest.raises(FewbitError, match="not finite"):
        sample_rows(logits, [params] * 2, [()] * 2, [0.5] * 2)
    with pytest.raises(FewbitError, match="not finite"):
        sample_reference(logits[1], params, (), 0.5)


def test_tokens_of_minus_infinity_are_never_drawn():
    logits = np.full((1, 600), -np.inf, np.float32)
    logits[0, 300:303] = [1.0, 2.0, 3.0]
    for draw in (0.0, 0.5, 1 - 2.0**-53):
        for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=5, top_p=0.9)):
            assert sample_rows(logits, [params], [()], [draw])[0] in (300, 301, 302)


def test_random_numbers_depend_on_seed_and_number_alone_and_look_uniform():
    numbers = np.array([[uniform(seed, number) for number in range(400)] for seed in range(-20, 20)])
    assert uniform(7, 3) == uniform(7, 3)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.01
    assert np.histogram(numbers, bins=10)[0].min() > 0.09 * numbers.size
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03


def test_log_probabilities_are_those_of_the_model():
    logits = logits_of(300, 5)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    own, top = log_probabilities(logits, 17, 3)
    assert own == pytest.approx(float(expected[17]), abs=1e-5)
    assert [token for token, _ in top] == expected.argsort(descending=True)[:3].tolist()
    assert [value for _, value in top] == pytest.approx(expected.sort(descending=True).values[:3].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"temperature": -1}, "temperature must be between 0"),
        ({"temperature": float("nan")}, "temperature must be between 0"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": -1}, "top_k must be between 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be between 0"),
        ({"min_p": 2}, "min_p must be between 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"seed": 1 << 65}, "seed must be between"),
        ({"seed": True}, "seed must be a whole number"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"stop": [""]}, "stop takes"),
        ({"stop": ["x"] * 17}, "stop takes"),
        ({"stop": 5}, "stop takes a string"),
        ({"stop": None}, "stop takes a string"),
        ({"ignore_eos": "False"}, "ignore_eos must be true or false"),
        ({"max_tokens": 10**400}, "max_tokens must be between"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(settings, words):
    with pytest.raises(UsageError, match=words):
        SamplingParams(**settings)


def test_a_single_stop_string_may_be_given_as_it_is():
    assert SamplingParams(stop="END").stop == ("END",)
