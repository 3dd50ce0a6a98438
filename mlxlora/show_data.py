"""What inspect() found, on the screen: rows in colour, lengths as bars, findings, the verdict.

Where there is no colour, what is trained stands in brackets.
"""

import re
from collections.abc import Sequence

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlxlora.console import Screen
from mlxlora.data.inspect.advice import sampled
from mlxlora.data.inspect.clean import Cleaned
from mlxlora.data.inspect.lengths import Bar, Lengths
from mlxlora.data.inspect.summary import REASONS, Inspection, Shown
from mlxlora.data.shown import Piece
from mlxlora.errors import printable

TRAINED, SPECIAL, OTHER = "green", "magenta", ""
OPEN, CLOSE = "⟦", "⟧"
LONGEST_PIECE = 800  # characters; the middle of longer ones is left out
BAR_WIDTH = 40
VERDICTS = {"pass": "bold green", "warn": "bold yellow", "fail": "bold red"}


def show_inspection(screen: Screen, found: Inspection) -> None:
    """All of it, the verdict last: it is what stays in view."""
    screen.facts(
        [
            *((part.split, f"{part.rows:,} rows of {part.path}") for part in found.parts),
            ("formats", ", ".join(f"{n:,} of {name}" for name, n in found.formats.items())),
        ]
    )
    if found.examples:
        _show_rows(screen, found.examples)
    if found.lengths.bars:
        _show_lengths(screen, found.lengths)
    screen.heading("Checks")
    for finding in found.findings:
        screen.check(finding.state, finding.name, finding.found, finding.remedy)
    screen.say()
    screen.say(found.verdict.found, VERDICTS[found.verdict.state])


def show_cleaned(screen: Screen, cleaned: Cleaned) -> None:
    """What was written, and where each line that is not there went."""
    kept = sum(cleaned.kept.values())
    screen.heading(f"Written to {cleaned.path}")
    rows = [("lines read", f"{cleaned.lines:,}")]
    rows += [(REASONS[name], f"- {count:,}") for name, count in cleaned.dropped.items()]
    screen.table(["", "lines"], [*rows, ("written", f"{kept:,}")])
    for name, count in cleaned.kept.items():
        screen.say(f"{name}: {count:,}" + ("" if count else ", so it was not written"), "dim")


def _show_rows(screen: Screen, rows: Sequence[Shown]) -> None:
    screen.heading("As the model sees it")
    plain = screen.console.color_system is None or screen.console.no_color
    if plain:
        screen.say(f"{OPEN}what is trained{CLOSE}; ⏎ ends a line, · is a space that hides")
    else:
        legend = Text.assemble(("trained", TRAINED), "  ", ("special token", SPECIAL), "  ")
        screen.console.print(legend.append("⏎ ends a line, · is a space that hides", "dim"))
    for row in rows:
        cut = ", cut" if row.truncated else ""
        screen.say()
        screen.say(f"{row.where}  {row.tokens:,} tokens, {row.supervised:,} trained{cut}", "bold")
        screen.console.print(Padding(_coloured(row.pieces, plain), (0, 0, 0, 2)))


def _coloured(pieces: Sequence[Piece], plain: bool) -> Text:
    text, inside = Text(), False
    for piece in pieces:
        if plain and piece.trained != inside:
            text.append(OPEN if piece.trained else CLOSE)
            inside = piece.trained
        style = TRAINED if piece.trained else OTHER
        if piece.special:
            style = f"{SPECIAL} underline" if piece.trained else SPECIAL
        text.append(_legible(piece.text), style)
    text.rstrip()
    return text.append(CLOSE) if inside else text


def _legible(text: str) -> str:
    """Line ends and what is easily overlooked before them, visible; the middle left out."""
    if len(text) > LONGEST_PIECE:
        half = LONGEST_PIECE // 2
        left = len(text) - 2 * half
        return f"{_visible(text[:half])} […{left:,} characters…] {_visible(text[-half:])}"
    return _visible(text)


def _visible(text: str) -> str:
    text = re.sub(r" +(?=\n|$)|(?<=\n) +|  +", lambda spaces: "·" * len(spaces.group()), text)
    return printable(text.replace("\t", "⇥   ").replace("\n", "⏎\n").replace("\r", "␍"))


def _show_lengths(screen: Screen, lengths: Lengths) -> None:
    screen.heading(f"Tokens of {sampled(lengths)}")
    most = max(bar.rows for bar in lengths.bars)
    width = max(10, min(BAR_WIDTH, screen.console.width - 40))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for bar in lengths.bars:
        beyond = bar.first > lengths.max_length
        style = "yellow" if beyond else "cyan"
        table.add_row(
            f"{bar.first:,}-{bar.last:,}",
            f"{bar.rows:,}",
            Text(_drawn(bar, most, width), style) + Text("  cut" if beyond else "", style),
        )
    screen.console.print(table)
    shares, at = zip(*lengths.quantiles, strict=True)
    usual = f"{' / '.join(f'{share:.0%}' for share in shares)} of the rows have at most"
    screen.say(f"{usual} {' / '.join(f'{n:,}' for n in at)}; the longest {lengths.longest:,}")
    share = lengths.supervised / max(1, lengths.tokens)
    cut = f"; rows are cut at {lengths.max_length:,}"
    screen.say(f"{lengths.tokens:,} in all, {share:.0%} of them trained{cut}")


def _drawn(bar: Bar, most: int, width: int) -> str:
    """A bar in eighths of a character; what is there at all is seen."""
    eighths = max(round(8 * width * bar.rows / most), 1 if bar.rows else 0)
    return "█" * (eighths // 8) + ["", *"▏▎▍▌▋▊▉"][eighths % 8]
