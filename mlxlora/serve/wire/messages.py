"""The messages of a chat, and how chat templates read them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator

from mlxlora.serve.wire.reading import half_pair, read_json
from mlxlora.serve.wire.refusals import WireError
from mlxlora.serve.wire.strict import Strict, refuse

MOST_MESSAGES = 4096
MOST_PARTS = 1024  # of a message


class Part(Strict):
    """A piece of a message's text."""

    type: Literal["text", "refusal"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            refuse('it must be an object as {"type": "text", "text": "..."}')
        kind = value["type"]
        if kind not in ("text", "refusal"):
            refuse(f"parts of type {kind[:40]!r} cannot be read: this server knows text alone")
        if kind == "refusal" and "text" not in value:
            value = {("text" if k == "refusal" else k): v for k, v in value.items()}
        return value


def _parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        refuse("it must be text, or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[Part], Field(max_length=MOST_PARTS), BeforeValidator(_parts)]


def read_arguments(text: Any) -> dict[str, Any]:
    """A validator: a call's arguments as an object; clients write JSON in a string."""
    value = text
    if isinstance(text, str):
        try:
            value = read_json(text) if text.strip() else {}
        except (ValueError, WireError) as error:
            refuse(f"it must be a JSON object in a string: {error}")
    if not isinstance(value, dict) or half_pair(value) is not None:
        refuse("it must be a JSON object in a string")
    return value


class CalledFunction(Strict):
    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(read_arguments)]


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int = 0  # of streamed calls, which some clients give back as they came


class Message(Strict):
    """One turn. developer is system by a newer name."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FailFast()] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None  # OpenAI's answers have these two, so clients give them back
    annotations: list[Any] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _set_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            refuse('it must be an object as {"role": "user", "content": "..."}')
        value = {k: v for k, v in value.items() if v is not None or k not in _NULL}
        if value.get("role") == "function":
            refuse('"function" is deprecated: give the result in the role "tool"', "role")
        return value

    @model_validator(mode="after")
    def _belong_to_its_role(self) -> "Message":
        own = self.role == "assistant"
        if not own and (self.tool_calls or self.thought is not None or self.refusal is not None):
            refuse("tool_calls, reasoning and refusal belong to the role assistant")
        if self.tool_call_id is not None and self.role != "tool":
            refuse("it belongs to the role tool", "tool_call_id")
        said = self.tool_calls or self.refusal is not None or self.thought is not None
        if self.content is None and not (own and said):
            refuse("this field is required", "content")
        return self

    @property
    def thought(self) -> str | None:
        return self.reasoning_content if self.reasoning is None else self.reasoning

    def plain(self) -> dict[str, Any]:
        """As templates read it: content is text, arguments of calls are objects."""
        text = "".join(part.text for part in self.content or ()) or self.refusal or ""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": text}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.thought is not None:
            turn["reasoning_content"] = turn["reasoning"] = self.thought
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.arguments,
                    },
                }
                for call in self.tool_calls
            ]
        return turn


_NULL = ("audio", "function_call")  # OpenAI's answers have them, always null here
