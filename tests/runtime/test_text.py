"""Text out of tokens: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from fewbit.runtime.text import Detokenizer, StopFilter


def pieces_of(tokenizer, ids, prompt=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, list(prompt))
    return [detokenizer.push(token) for token in ids]


def test_a_character_comes_with_its_last_byte(byte_tokenizer):
    ids = byte_tokenizer("a€é")["input_ids"]
    assert pieces_of(byte_tokenizer, ids) == ["a", "", "", "€", "", "é"]


def test_text_is_that_of_the_whole_whatever_the_tokens(byte_tokenizer):
    for seed in range(50):
        text = "".join(random.Random(seed).choices("the and€ éow END!😀re", k=30))
        ids = byte_tokenizer(text)["input_ids"]
        pieces = pieces_of(byte_tokenizer, ids, byte_tokenizer("so it")["input_ids"])
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_the_prompt_began_is_completed(byte_tokenizer):
    first, second, third = byte_tokenizer("€")["input_ids"]
    assert pieces_of(byte_tokenizer, [third], byte_tokenizer("a")["input_ids"] + [first, second]) == ["€"]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back(byte_tokenizer):
    lone = byte_tokenizer("€")["input_ids"][0]
    pieces = pieces_of(byte_tokenizer, [lone] * 20 + byte_tokenizer("ab")["input_ids"])
    assert "".join(pieces).endswith("ab")
    assert "".join(pieces[:10]) != ""


def run_filter(stops, pieces) -> tuple[list[str], bool]:
    stop = StopFilter(stops)
    shown = []
    for piece in pieces:
        text, stopped = stop.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, stop.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "stopped"),
    [
        (["END"], ["a E", "N", "D b"], "a ", True),
        (["END"], ["a E", "N", "A b"], "a ENA b", False),
        (["END"], ["E", "E", "N", "D"], "E", True),
        (["abab", "b!"], ["aba", "b!"], "", True),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["x"], ["abc", "de"], "abcde", False),
        (["END", "a EN"], ["a END"], "", True),
        ([], ["a", "b"], "ab", False),
        (["END"], ["EN"], "EN", False),
    ],
)
def test_text_ends_before_the_first_stop_string(stops, pieces, expected, stopped):
    shown, found = run_filter(stops, pieces)
    assert ("".join(shown), found) == (expected, stopped)


def test_whatever_is_shown_cannot_be_the_beginning_of_a_stop_string():
    for seed in range(300):
        chance = random.Random(seed)
        text = "".join(chance.choices("ab!", k=25))
        stops = ["".join(chance.choices("ab!", k=chance.randint(1, 5))) for _ in range(chance.randint(1, 3))]
        pieces, rest = [], text
        while rest:
            length = chance.randint(1, 4)
            pieces, rest = [*pieces, rest[:length]], rest[length:]
        shown, stopped = run_filter(stops, pieces)
        places = [text.find(stop) for stop in stops if stop in text]
        assert stopped == bool(places)
        seen = "".join(shown)
        assert text.startswith(seen)
        assert not any(stop in seen for stop in stops)
        if not stopped:
            assert seen == text
