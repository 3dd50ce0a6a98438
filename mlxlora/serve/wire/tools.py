"""Tools and the choice among them, as OpenAI writes them."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mlxlora.serve.wire.strict import Strict, refuse

MOST_TOOLS = 128
NAME = r"^[A-Za-z0-9_.:-]{1,128}$"
CHOICES = (
    'it must be "none", "auto", "required" or {"type": "function", "function": {"name": NAME}}'
)


class Function(Strict):
    name: str = Field(pattern=NAME)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)  # a JSON schema
    strict: bool = False  # no effect: a call that is required is always held to its schema


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As templates, and mlx-lm's parsers of calls, read it."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description,
                "parameters": arguments_schema(self),
            },
        }


@dataclass(frozen=True)
class Choice:
    """Whether tools are called. name: the one function that must be."""

    kind: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


def read_choice(value: Any) -> Choice:
    """A validator of tool_choice."""
    match value:
        case "none" | "auto" | "required":
            return Choice(value)
        case {"type": "function", "function": {"name": str(name), **inner}, **rest}:
            if not rest and not inner:
                return Choice("required", name)
    refuse(CHOICES)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a call's arguments, which are an object whatever it says."""
    asked = tool.function.parameters
    return {"type": "object", "properties": {}, **asked} | {"type": "object"}
