"""Curves as a line of text."""

import math

from mlxlora.sparkline import BARS, sparkline, sparklines


def test_a_sparkline_falls_as_its_values_do():
    assert sparkline([4.0, 3.0, 1.0, None, 0.5]) == "█▆▂ ▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([None]) == " "


def test_a_sparkline_spans_its_range_and_leaves_gaps():
    assert sparkline([0, 7, math.nan, 3.5], 0, 7) == f"{BARS[0]}{BARS[7]} {BARS[4]}"
    assert sparkline([2, 2], 2, 2) == BARS[0] * 2
    assert sparkline([-5, 50], 0, 7) == BARS[0] + BARS[7]


def test_curves_share_one_logarithmic_scale():
    fall, level = sparklines([[8.0, 4.0, 2.0, 1.0], [8.0, math.nan, 1.0, 0.0]])
    assert fall == BARS[7] + BARS[5] + BARS[2] + BARS[0]
    assert level == f"{BARS[7]} {BARS[0]} "
    assert sparklines([[], []]) == ["", ""]
