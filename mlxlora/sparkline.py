"""Curves as a line of text: a block a value, as high as the value."""

import math
from collections.abc import Sequence

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#"


def sparkline(
    values: Sequence[float | None], low: float = math.nan, high: float = math.nan, bars: str = BARS
) -> str:
    """A character a value, its height between low and high; a space for what is no number.

    low and high are by default the lowest and the highest value.
    """
    real = [v for v in values if v is not None and math.isfinite(v)]
    if not real:
        return " " * len(values)
    low = min(real) if math.isnan(low) else low
    span = (max(real) if math.isnan(high) else high) - low
    top = len(bars) - 1
    return "".join(
        bars[min(top, max(0, round((v - low) / span * top) if span > 0 else 0))]
        if v is not None and math.isfinite(v)
        else " "
        for v in values
    )


def sparklines(curves: Sequence[Sequence[float]], bars: str = BARS) -> list[str]:
    """Curves of losses drawn to one scale, a logarithmic one: late gains are small but count."""
    logs = [[math.log(v) if v > 0 else math.nan for v in curve] for curve in curves]
    known = [value for curve in logs for value in curve if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return [sparkline(curve, low, high, bars) for curve in logs]
