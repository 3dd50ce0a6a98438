"""The script that draws the terminal of the README."""

import re
import shutil
import sys

import pytest
from documents import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
import picture


def words(svg: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", svg, flags=re.DOTALL).split())


def test_a_colour_goes_on_over_the_end_of_a_line():
    svg = picture.draw("\x1b[32mone\ntwo\x1b[0m\nthree", "title", 40)
    one, two, three = re.findall(r'class="mlxlora-(r\d+)"[^>]*>(?:one|two|three)<', svg)
    assert one == two != three


def test_a_picture_fetches_nothing():
    svg = picture.draw("hello", "title", 40)
    assert "url(" not in svg.replace("url(#", "") and "@font-face" not in svg
    drawn = (ROOT / "recipes" / "pictures" / "train.svg").read_text(encoding="utf-8")
    assert "validation" in drawn and "@font-face" not in drawn


@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux here")
def test_what_stands_on_the_screen_is_drawn(tmp_path):
    out = tmp_path / "p" / "hello.svg"
    picture.main([str(out), "--width", "40", "--", "printf", "\\033[31mhello &\\nthere"])
    assert "hello" in words(out.read_text()) and picture.ENDED not in out.read_text()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux here")
def test_a_command_that_never_shows_it_is_told(tmp_path):
    with pytest.raises(SystemExit, match="without showing"):
        picture.main([str(tmp_path / "x.svg"), "--until", "never", "--", "echo", "hello"])
