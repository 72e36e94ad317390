"""Drafts are continuations of the longest, then latest match in a sequence's past."""

from __future__ import annotations

import random

from fewbit.runtime.drafts import Drafter, PromptLookup


def test_a_draft_is_what_followed_the_same_tokens_before():
    assert PromptLookup([1, 2, 3, 4, 5, 1, 2]).draft(3) == [3, 4, 5]


def test_the_longest_match_counts_and_then_the_latest():
    assert PromptLookup([9, 1, 2, 7, 8, 1, 2, 6, 9, 1, 2]).draft(1) == [7]
    assert PromptLookup([1, 2, 7, 1, 2, 6, 9, 1, 2]).draft(1) == [6]


def test_repeated_text_is_continued_as_far_as_asked_for():
    assert PromptLookup([5, 6, 7, 5, 6, 7, 5, 6]).draft(7) == [7, 5, 6, 7, 5, 6, 7]
    assert PromptLookup([4, 4, 4]).draft(4) == [4, 4, 4, 4]


def test_nothing_is_proposed_for_what_is_new_or_too_short():
    assert PromptLookup([]).draft(3) == []
    assert PromptLookup([1]).draft(3) == []
    assert PromptLookup([1, 2, 3, 4]).draft(3) == []
    assert PromptLookup([1, 2, 1, 2]).draft(0) == []


def test_tokens_may_come_one_by_one_or_together():
    tokens = random.Random(0).choices(range(4), k=200)
    lookup = PromptLookup()
    for index, token in enumerate(tokens):
        lookup.append(token)
        assert lookup.draft(4) == PromptLookup(tokens[: index + 1]).draft(4)


def test_a_drafter_proposes_less_after_failures_and_more_after_success():
    drafter = Drafter(8, [1, 2, 3] * 10)
    assert len(drafter.propose(100)) == 8
    assert len(drafter.propose(3)) == 3
    for _ in range(4):
        drafter.checked(8, 0)
    sizes = [len(drafter.propose(100)) for _ in range(4)]
    assert sizes == [0, 0, 0, 1]
    for size in (2, 4, 8, 8):
        drafter.checked(1 if size == 2 else size // 2, 1 if size == 2 else size // 2)
        assert len(drafter.propose(100)) == size
