"""The calls that a model wrote, read by mlx-lm's parsers within a limit.

Most of these search with expressions that take the square or cube of a text's length where marks
are not closed. A model writes so by mistake, or since a client had it repeat them; many seconds
would pass in which nobody else is answered. Texts of more than a few lines are read in a process.
"""

from collections.abc import Sequence
from typing import Any

import mlx_lm
from mlx_lm.tool_parsers import json_tools

from mlxlora.serve.apart.process import Lost, Process

SECONDS = 0.2  # of processor time
SHORT = 1000  # characters, which no parser takes long over
PARSERS = "mlx_lm.tool_parsers."
PROGRAM = "mlxlora.serve.calls.program"


class Calls:
    """Reads the calls of one tokenizer's models. For any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._parser = tokenizer.tool_parser
        module = getattr(self._parser, "__module__", "")
        apart = module.startswith(PARSERS) and self._parser is not json_tools.parse_tool_call
        needed = (module, list(mlx_lm.__path__))
        self._process = Process(PROGRAM, lambda: needed) if apart else None

    @property
    def slow(self) -> bool:
        """Whether reading may take its time: not for an event loop."""
        return self._process is not None

    def read(self, text: str, tools: Sequence[dict[str, Any]]) -> Any:
        """What a parser makes of a text. Raises whatever it likes, ValueError if it takes long."""
        if self._process is None or len(text) <= SHORT:
            return self._parser(text, list(tools))
        try:
            fault, found = self._process.ask(SECONDS, "read", text, list(tools))
        except Lost:
            fault, found = "it takes too long", None
        if fault:
            raise ValueError(fault)
        return found

    def close(self) -> None:
        """End the process; it would be started again when needed."""
        if self._process is not None:
            self._process.close()
