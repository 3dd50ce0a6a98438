"""Where a growing Markdown text may be cut, and that a pipe gets the text as it is."""

import io

import pytest
from rich.console import Console

from mlxlora.console import Screen
from mlxlora.spoken import complete, speak

TEXT = "One\ntwo\n\n```python\na = 1\n\nb = 2\n```\n\n- x\n- y\n\nlast"


def test_blocks_end_at_blank_lines_outside_of_code():
    blocks, at = [], 0
    for length in range(len(TEXT) + 1):  # as it grows, character by character
        end = complete(TEXT[:length], at)
        if end > at:
            blocks.append(TEXT[at:end])
            at = end
    assert [block.strip() for block in blocks] == [
        "One\ntwo",
        "```python\na = 1\n\nb = 2\n```",
        "- x\n- y",
    ]
    assert TEXT[at:] == "last"


def shown(terminal: bool, pieces) -> str:
    screen, file = Screen(), io.StringIO()
    screen._console = Console(file=file, force_terminal=terminal, width=60, color_system=None)
    assert speak(screen, iter(pieces)) == "".join(pieces)
    return file.getvalue()


def test_a_pipe_gets_the_text_and_a_terminal_what_it_means():
    pieces = ["**bo", "ld** and `co", "de`\n\n", "1. a\n", "2. b\n"]
    assert shown(False, pieces) == "".join(pieces) + "\n"
    drawn = shown(True, pieces)
    assert "**" not in drawn and "bold and code" in drawn and " 2 b" in drawn


def test_escapes_of_a_model_do_not_reach_the_terminal():
    assert "\x1b]0;" not in shown(True, ["\x1b]0;title\x07 hi\n\n", "more \x1b]0;x\x07"])


def test_an_answer_that_is_stopped_keeps_what_it_has_said():
    def pieces():
        yield "first words\n\nand "
        yield "more"
        raise KeyboardInterrupt

    screen, file = Screen(), io.StringIO()
    screen._console = Console(file=file, force_terminal=True, width=60, color_system=None)
    with pytest.raises(KeyboardInterrupt):
        speak(screen, pieces())
    assert file.getvalue().rstrip().endswith("and more")
