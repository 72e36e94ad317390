"""What the pages share: axes, figures, and text that is safe to show."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from fewbit.drawing import NARROW, WIDE, Axis, error_axis, errors_svg, histogram_svg, printable

HISTOGRAM = {
    "centers": [index - 4.0 for index in range(9)],
    "before": [0.0, 1e-4, 0.01, 0.1, 0.8, 0.1, 0.01, 1e-4, 1e-5],
    "after": [0.0001, 0.004, 0.05, 0.24, 0.4, 0.24, 0.05, 0.004, 0.0001],
}


def test_printable_keeps_text_and_drops_control_characters():
    assert printable("Grüße,\n世界") == "Grüße,\n世界"
    assert printable("a\x1b[31m\x07b") == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (0, 29, False), (15, 600, True), (1e-5, 1, True)])
def test_ticks_are_few_and_inside_the_axis(low, high, log):
    ticks = Axis("x", low, high, log).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("frame", [WIDE, NARROW])
def test_histogram_figure_leaves_out_empty_bins(frame):
    lines = [
        node
        for node in ElementTree.fromstring(histogram_svg(HISTOGRAM, frame)).iter()
        if node.tag.endswith("polyline") and node.get("class") == "line c1"
    ]
    assert len(lines) == 1
    assert len(lines[0].get("points", "").split()) == 8


def test_error_figure_draws_one_line_for_each_kind():
    svg = errors_svg({"q": [(0, 0.02), (1, 0.03)], "down": [(0, 0.04), (1, 0.01)]})
    assert svg.count("<polyline") == 2
    ElementTree.fromstring(svg)
    ElementTree.fromstring(errors_svg({}))


def test_errors_far_apart_share_a_logarithmic_axis_that_holds_all_of_them():
    far = [{"q": [(0, 0.1)]}, {"q": [(0, 0.004)], "k": [(0, 0.0)]}]
    axis = error_axis(far)
    assert axis.log
    assert axis.low < 0.004 < 0.1 < axis.high
    assert not error_axis(far[:1]).log
    assert error_axis([]).high > error_axis([]).low


def test_an_error_of_zero_lies_at_the_low_end_of_a_logarithmic_axis():
    svg = errors_svg({"q": [(0, 0.1), (1, 0.0)], "k": [(0, 0.004), (1, 0.004)]})
    first = next(node for node in ElementTree.fromstring(svg).iter() if node.get("class") == "line k0")
    assert float(first.get("points", "").split(",")[-1]) == WIDE.bottom
