"""Messages in the guide are those of the program, word for word."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "recipes" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", GUIDE, re.MULTILINE)
VALUE = "\0"  # where the program puts a value


def said(node: ast.expr) -> str | None:
    """The text of a string expression, None if it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [said(v) if isinstance(v, ast.Constant) else VALUE for v in node.values]
        return "".join(part or "" for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = said(node.left), said(node.right)
        both = (VALUE if left is None else left) + (VALUE if right is None else right)
        return None if left is right is None else both
    return None


@cache
def texts() -> list[str]:
    """Every text in the program, line breaks as spaces."""
    found = []
    for path in sorted((ROOT / "mlxlora").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr) and (text := said(node)):
                found.append(re.sub(r"\s+", " ", text))
    return found


def is_said(message: str) -> bool:
    """Whether one text has all that stands between the dots, in this order."""
    parts = [re.escape(part.strip(" ")) for part in message.split("...") if part.strip(" .")]
    wanted = re.compile(r".*?".join(parts), re.DOTALL)
    return any(wanted.search(text) for text in texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_guide_is_one_of_the_program(message):
    assert is_said(message), message


def test_a_message_that_nobody_writes_would_be_noticed():
    assert len(MESSAGES) > 30
    assert not is_said("the adapter was trained on a Tuesday: ...")


def test_a_remedy_follows_every_message():
    for entry in re.split(r"^### .*$", GUIDE, flags=re.MULTILINE)[1:]:
        assert len(entry.split("\n## ")[0].strip()) > 40
