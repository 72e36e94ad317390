"""Calibration texts: weights, shares, chats, and what is wrong with a file, by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbit.checkpoint.source import open_source
from fewbit.errors import UsageError
from fewbit.pipeline.texts import CalibrationText, _shares, calibration_windows, tokens_hash

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


class Plain:
    """A source that is asked for its tokenizer only."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenizer(self):
        return self._tokenizer


@pytest.fixture
def source(tiny_models):
    """A source of one token per character, with a chat template."""
    tokenizer = open_source(tiny_models["tied"]).tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Plain(tokenizer)


def texts_of(source, windows) -> list[str]:
    return [source.tokenizer().decode(window.tolist()) for window in windows]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("argument", "path", "weight"),
    [
        ("a.txt", "a.txt", 1.0),
        ("a.txt:2", "a.txt", 2.0),
        ("a.txt:0.25", "a.txt", 0.25),
        ("C:/texts/a.txt", "C:/texts/a.txt", 1.0),
        ("a:b:3", "a:b", 3.0),
        ("a.txt:", "a.txt:", 1.0),
    ],
)
def test_an_argument_is_a_file_and_perhaps_a_weight(argument, path, weight):
    assert CalibrationText.parse(argument) == CalibrationText(Path(path), weight)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_that_are_no_share_are_refused(weight):
    with pytest.raises(UsageError, match="must be positive"):
        CalibrationText.parse(f"a.txt:{weight}")


@pytest.mark.parametrize(
    ("weights", "available", "wanted", "expected"),
    [
        ([1, 1], [100, 100], 10, [5, 5]),
        ([2, 1], [100, 100], 9, [6, 3]),
        ([3, 1], [2, 100], 8, [2, 6]),
        ([1, 1, 2], [0, 100, 1], 5, [0, 4, 1]),
        ([1, 1], [2, 1], 10, [2, 1]),
        ([1e-6, 1], [10, 10], 4, [0, 4]),
    ],
)
def test_shares_follow_weights_as_far_as_files_reach(weights, available, wanted, expected):
    assert _shares(weights, available, wanted) == expected


def test_windows_are_cut_from_the_start_of_files_and_alternate(source, tmp_path):
    texts = [
        CalibrationText(write(tmp_path / "a", "aaaabbbbccccdddd"), 2.0),
        CalibrationText(write(tmp_path / "b", "1111222233334444")),
    ]
    windows, counts = calibration_windows(source, texts, 27, 4)
    assert counts == {str(tmp_path / "a"): 4, str(tmp_path / "b"): 2}
    assert texts_of(source, windows) == ["aaaa", "1111", "bbbb", "cccc", "2222", "dddd"]


def test_what_a_short_file_lacks_comes_from_the_others(source, tmp_path):
    texts = [
        CalibrationText(write(tmp_path / "short", "xxxxyy")),
        CalibrationText(write(tmp_path / "long", "0123456789" * 4)),
    ]
    windows, counts = calibration_windows(source, texts, 32, 4)
    assert counts == {str(tmp_path / "short"): 1, str(tmp_path / "long"): 7}
    assert len(windows) == 8


def test_records_hold_text_or_chats_that_go_through_the_template(source, tmp_path):
    records = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records)) + "\n")
    windows, _ = calibration_windows(source, [CalibrationText(path)], 23, 23)
    assert texts_of(source, windows) == ["plain<user>hi<assistant"]


def test_no_more_records_are_read_than_are_needed(source, tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 64}) + "\nno json at all\n")
    assert calibration_windows(source, [CalibrationText(path)], 64, 32)[0].shape == (2, 32)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        "7",
        '{"txt": "a"}',
        '{"text": 7}',
        '{"text": ["a", "b"]}',
        '{"messages": "hello"}',
        '{"messages": [{"speaker": {}}, 3]}',
    ],
)
def test_a_wrong_record_is_refused_with_its_line(source, tmp_path, line):
    source.tokenizer().chat_template = "{% for message in messages %}{{ message.role + message.content }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=r"a\.jsonl, line 3: neither"):
        calibration_windows(source, [CalibrationText(path)], 100, 4)


def test_chats_without_a_template_are_refused_with_the_line(source, tmp_path):
    source.tokenizer().chat_template = None
    path = write(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(UsageError, match=r"line 1: .*template"):
        calibration_windows(source, [CalibrationText(path)], 100, 4)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_files_that_are_no_text_are_refused(source, tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        calibration_windows(source, [CalibrationText(tmp_path / name)], 100, 4)
    with pytest.raises(UsageError, match="does not exist"):
        calibration_windows(source, [CalibrationText(tmp_path / "none.txt")], 100, 4)
    with pytest.raises(UsageError, match="shorter than one window of 50"):
        calibration_windows(source, [CalibrationText(write(tmp_path / "b.txt", "short"))], 100, 50)


def test_the_hash_tells_order_and_content_apart(source, tmp_path):
    windows, _ = calibration_windows(source, [CalibrationText(write(tmp_path / "a", "abcdefgh"))], 8, 4)
    assert tokens_hash(windows) != tokens_hash(windows.flip(0))
    assert tokens_hash(windows) == tokens_hash(windows.clone())
