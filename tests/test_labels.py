"""Labels beside points: none covers another, or a point, and all are inside."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.drawing import NARROW, WIDE
from fewbit.labels import REACH, Box, Surroundings, place, shorten, shorten_all, width

FRAMES = {"wide": WIDE, "narrow": NARROW}


def check(points, names, frame):
    inner = Box(frame.left, frame.top, frame.right, frame.bottom)
    labels = place(points, names, Surroundings(inner))
    boxes = [label.box for label in labels if label]
    dots = [Box(x - REACH, y - REACH, x + REACH, y + REACH) for x, y in points]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert not any(box.overlaps(dot) for dot in dots)
        assert frame.left <= box.left
        assert box.right <= frame.right
        assert frame.top <= box.top
        assert box.bottom <= frame.bottom
    return labels


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_twelve_models_in_one_corner_all_get_a_label(frame):
    points = [(frame.left + 20 + 3 * (i % 4), frame.bottom - 20 - 3 * (i // 4)) for i in range(12)]
    labels = check(points, [f"smollm2-135m-trellis-{i}-bits-tuned" for i in range(12)], frame)
    assert all(labels)
    assert len({label.words for label in labels}) == 12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.sampled_from(list(FRAMES)))
def test_labels_of_any_points_keep_apart(shares, name):
    frame = FRAMES[name]
    points = [
        (frame.left + u * (frame.right - frame.left), frame.top + v * (frame.bottom - frame.top)) for u, v in shares
    ]
    check(points, [f"model number {i}" for i in range(len(points))], frame)


def test_a_lone_label_is_beside_its_point_and_off_the_lines():
    frame = Box(0, 0, 400, 300)
    (label,) = place([(100, 100)], ["name"], Surroundings(frame))
    assert label.box.left == 110
    (moved,) = place([(100, 100)], ["name"], Surroundings(frame, lines=(Box(100, 99, 400, 101),)))
    assert moved.box.right < 100


def test_no_room_means_no_label_rather_than_one_on_top_of_another():
    assert place([(5, 5)], ["name"], Surroundings(Box(0, 0, 10, 10))) == [None]


def test_names_are_shortened_in_the_middle():
    assert shorten("short", 8) == "short"
    assert shorten("smollm2-135m-3-bits", 11) == "smol…3-bits"
    assert len(shorten("x" * 50, 26)) == 26
    assert shorten_all(["model-a-bits", "model-bc-bits"], 9) == ["…a…", "…bc…"]
    assert shorten_all(["model-a", "model-b"], 9) == ["model-a", "model-b"]
    assert shorten_all(["x" * 12], 9) == ["xxxx…xxxx"]
    assert width("WWWW") > width("aaaa") > width("llll")
