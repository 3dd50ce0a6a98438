"""A run on the screen."""

import io

import pytest
from rich.console import Console
from test_course import START, check, step

from mlxlora.console import Screen
from mlxlora.display import TrainingDisplay
from mlxlora.train.events import Done, Sample, Skipped

PROMPT = "say\x1b[31m three"
DONE = Done(
    update=30,
    reason="finished",
    adapter="runs/x/adapter",
    last="runs/x/adapter",
    best_update=20,
    valid_loss_before=4.0,
    valid_loss=2.0,
    seconds=61.0,
    dropped_rows=1,
    truncated_rows=0,
    peak_memory=10**9,
    footprint=0,
)
EVENTS = [
    START,
    check(0, 4.0, False),
    Sample(0, PROMPT, "none\nof it"),
    *[step(n, 4.0 - n / 10) for n in range(1, 21)],
    check(20, 2.0),
    Sample(20, PROMPT, "three"),
    Skipped(21, "the loss is nan", ("rows.jsonl:7",)),
    *[step(n) for n in range(22, 31)],
]


def display(width: int, terminal: bool) -> tuple[TrainingDisplay, io.StringIO]:
    file = io.StringIO()
    screen = Screen()
    screen._console = Console(
        file=file, width=width, force_terminal=terminal, color_system=None, highlight=False
    )
    return TrainingDisplay(screen), file


@pytest.fixture
def live():
    """The live lines after EVENTS, at some width."""

    def lines(width: int) -> list[str]:
        shown, _ = display(width, True)
        for event in EVENTS:
            shown._show(event)
        file = io.StringIO()
        Console(file=file, width=width, force_terminal=True, color_system=None).print(
            shown._lines()
        )
        return file.getvalue().rstrip("\n").split("\n")

    return lines


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_live_lines_are_as_many_at_any_width_and_fit(live, width):
    lines = live(width)
    assert len(lines) == 7  # an empty one, progress, two curves, speed, a prompt and its answer
    assert all(len(line.rstrip()) <= width for line in lines)


def test_the_live_lines_tell_what_is_to_come(live):
    text = "\n".join(live(80))
    for told in ("30/100", "best 2.000 at 20", "next in 20 s", "next save in 45 s", "tok/s"):
        assert told in text


def test_only_the_last_answer_is_among_the_live_lines_and_controls_nothing(live):
    *_, prompt, text = live(80)
    assert text.strip() == "three"
    assert "\x1b" not in prompt and "three" in prompt


def test_a_pipe_gets_plain_lines_and_every_sample():
    shown, file = display(80, False)
    assert shown.show(iter([*EVENTS, DONE])) == DONE
    text = file.getvalue()
    assert "\x1b" not in text and "━" not in text and "▁" not in text
    assert text.count("validation loss") == 3
    assert "none" in text and "three" in text
    assert "rows.jsonl:7" in text


def test_nothing_of_the_live_lines_is_left_at_the_end():
    shown, file = display(80, True)
    assert shown.show(iter([*EVENTS, DONE])) == DONE
    end = file.getvalue().partition("1:01, peak 1.0 GB")[2]
    assert "runs/x/adapter" in end and "━" not in end and "tok/s" not in end
