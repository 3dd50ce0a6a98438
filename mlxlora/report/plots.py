"""Plots as SVG that stands in a page: by matplotlib, with colours that the page's style sets.

Text stays text and ids are the same each time. What varies between light, dark and print is a CSS
variable in the place of a colour, so one drawing serves all three.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Drawn in these colours, which are then replaced: hex colours are what matplotlib takes.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--page)",
    **{f"#0{number}0f0f": f"var(--curve-{number})" for number in range(1, 9)},
}
INK, FAINT, PAGE = "#010101", "#020202", "#030303"
CURVES = [f"#0{number}0f0f" for number in range(1, 9)]
SIZE = (7.2, 2.9)  # inches of 72 points, before the page scales it
MOST_POINTS = 1500  # of a line; more would only make the page heavy
WIDEST_RANGE = 50  # highest value / lowest, beyond which an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """A curve: values by update. Values that are no number leave a gap."""

    label: str  # "" for no entry in the legend
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0  # of CURVES
    style: str = "line"  # "faint", "dashed", "points" or "best"


def plot(lines: Sequence[Line], what: str, name: str, width: float = SIZE[0]) -> str:
    """An SVG of these lines over updates. what: the label of the other axis; name: for ids."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    options: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    options["text.parse_math"] = False  # a run may be called anything
    with (
        warnings.catch_warnings(),
        rc_context({**options, "font.size": 9, "axes.linewidth": 0.6}),
    ):
        # Of letters that matplotlib's own font lacks; the reader's browser has others.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, SIZE[1]), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        _dress(axes, lines, what)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), what, name)


def _draw(axes: Any, line: Line) -> None:
    x, y = _thinned(line)
    looks: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 1.6},
        "faint": {"linewidth": 0.8, "alpha": 0.5},
        "dashed": {"linewidth": 1.0, "linestyle": (0, (4, 3))},
        "points": {"linewidth": 1.4, "marker": "o", "markersize": 3.2},
        "best": {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none"},
    }
    colour = CURVES[line.colour % len(CURVES)]
    label = f" {line.label}" if line.label.startswith("_") else line.label  # else it is left out
    axes.plot(x, y, color=colour, label=label or "_", **looks[line.style])


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS of a line, its ends among them."""
    step = max(1, math.ceil(len(line.x) / MOST_POINTS))
    places = sorted({*range(0, len(line.x), step), *range(len(line.x))[-1:]})
    return [line.x[p] for p in places], [line.y[p] for p in places]


def _dress(axes: Any, lines: Sequence[Line], what: str) -> None:
    known = [value for line in lines for value in line.y if math.isfinite(value)]
    if known and min(known) > 0 and max(known) / min(known) > WIDEST_RANGE:
        axes.set_yscale("log")
    axes.set_xlabel("update", color=INK)
    axes.set_ylabel(what, color=INK)
    axes.tick_params(colors=INK, width=0.6)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    if any(line.label for line in lines):
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _inline(svg: str, what: str, name: str) -> str:
    """The svg element alone, as wide as the page, in the page's colours, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    own = re.sub(r"\W+", "-", name.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{what}" ', 1)
    return re.sub("|".join(_COLOURS), lambda found: _COLOURS[found.group()], svg)
