"""README and guides as tests read them: their blocks of code and their marked sections."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "recipes" / "guides"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def guide(name: str) -> str:
    return (GUIDES / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    """What stands between <!-- name --> and <!-- /name -->."""
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].removeprefix("\n")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
