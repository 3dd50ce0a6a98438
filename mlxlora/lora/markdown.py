"""Markdown of a model card, in which a stranger's words stay words."""

import re
from collections.abc import Sequence
from typing import Any


def joined(*sections: str) -> str:
    """A card of those that are not empty."""
    return "\n\n".join(part for part in sections if part) + "\n"


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)


def code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def plain(value: Any) -> str:
    """Words that stay words in Markdown, whatever a stranger put there."""
    return re.sub(r"[^\w .,:;()/+=@%*'{}-]", "_", str(value))[:200].replace("*", r"\*")
