"""Reads calls in a process of its own: `python -m mlxlora.serve.calls.program FD`."""

import importlib
import sys
from types import ModuleType
from typing import Any

from mlxlora.serve.apart.loop import work


class Program:
    """One of mlx-lm's parsers, without the rest of mlx-lm."""

    def __init__(self, needed: tuple[str, list[str]]) -> None:
        """needed: the name of a parser's module, where the package mlx_lm is."""
        name, paths = needed
        package = ModuleType("mlx_lm")  # which would import MLX, and take a second
        package.__path__ = paths
        sys.modules["mlx_lm"] = package
        self._parse = importlib.import_module(name).parse_tool_call

    def read(self, text: str, tools: list[dict[str, Any]]) -> tuple[str, Any]:
        try:
            return "", self._parse(text, tools)
        except Exception as error:  # parsers raise what they like
            return f"{type(error).__name__}: {error}"[:300], None


if __name__ == "__main__":
    work(int(sys.argv[1]), Program)
