"""Drawings that are SVG already."""
from __future__ import annotations

import re

from mindformers_ixc.pages.drawing import HEIGHT, WIDTH, histogram


def bars(made: str) -> list[tuple[str, float, float, float]]:
    """(colour, left, right, height) of the bars."""
    return [(colour, float(x), float(x) + float(width), float(height)) for colour, x, width, height in re.findall(
        r'<rect class="(f\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', made)]


def test_bars_stand_for_numbers_and_say_them():
    made = histogram("tiles", [(1, 2, 10), (3, 4, 0), (5, 6, 1200)], 6, "a row holds", "sample")
    (_, left, right, low), (_, _, _, none), (_, _, last, high) = bars(made)
    assert 0 <= left < right < last <= WIDTH and none == 0 < low < high < HEIGHT
    assert 'data-tip="5 to 6 tiles: 1,200 samples"' in made and "a row holds 6" in made
    assert {colour for colour, *_ in bars(made)} == {"f0"}


def test_what_is_above_the_limit_has_another_colour():
    made = histogram("tiles", [(1, 4, 5), (5, 5, 0), (6, 9, 5)], 5, "a row holds", "sample")
    assert [colour for colour, *_ in bars(made)] == ["f0", "f0", "f1"]


def test_a_limit_far_away_does_not_make_the_bars_thin():
    near, far = (histogram("positions", [(100, 199, 5)], limit, "a row holds", "<b>") for limit in (400, 4000))
    assert "a row holds 400" in near and "a row holds" not in far
    bar, = bars(far)
    assert 0.4 * WIDTH < (bar[1] + bar[2]) / 2 < 0.6 * WIDTH, "a single bar stands in the middle"
    assert bars(near)[0][2] < 0.4 * WIDTH
    assert "&lt;b&gt;" in near and "<b>" not in near


def test_a_single_value_has_a_bar():
    made = histogram("tiles", [(3, 3, 7)], 2, "a row holds", "sample")
    assert bars(made)[0][0] == "f1" and bars(made)[0][3] > 0 and 'data-tip="3 tiles: 7 samples"' in made
