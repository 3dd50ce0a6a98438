"""Requests as OpenAI writes them, and the fields that other local servers added.

A field is honoured, or is accepted because it promises nothing that would be missed, or is
refused by name. None is ignored in silence.
"""

from inspect import signature
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, model_validator
from transformers import PreTrainedTokenizerBase

from mlxlora.serve.wire.messages import MOST_MESSAGES, Message
from mlxlora.serve.wire.reading import read_object
from mlxlora.serve.wire.strict import Strict, refuse
from mlxlora.serve.wire.tools import MOST_TOOLS, Choice, Tool, read_choice

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_BIASED = 10_000
LONGEST_STOP = 1000  # characters
TEMPLATE_WORDS = 100  # characters of a text in chat_template_kwargs
# What the server itself says to the renderer of templates, or what would not reach one.
RESERVED = {"messages", "self", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
# Fields of OpenAI's that would change the answer, and what to do instead.
REFUSED = {
    "audio": "answers are text alone; leave it out",
    "function_call": "it is deprecated: use tool_choice",
    "functions": "it is deprecated: use tools",
    "moderation": "there is no moderation here; leave it out",
    "suffix": "text is continued, not filled in; leave it out",
    "web_search_options": "this server does not search the web; leave it out",
}

Plain = dict[str, Any]


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        refuse("it must be text, or a list of texts")
    if len(stops) > MOST_STOPS:
        refuse(f"at most {MOST_STOPS} stops are watched for, not {len(stops)}")
    if not all(1 <= len(stop) <= LONGEST_STOP for stop in stops):
        refuse(f"each stop has 1 to {LONGEST_STOP:,} characters")
    return stops


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        refuse("it must be an object of token ids and amounts")
    if len(value) > MOST_BIASED:
        refuse(f"at most {MOST_BIASED:,} tokens are biased")
    found = {}
    for name, amount in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            refuse(f"{name[:40]!r} is not a token id")
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            refuse(f"the amount for token {name} must be a number")
        if not -100 <= amount <= 100:
            refuse(f"the amount for token {name} must be from -100 to 100")
        found[int(name)] = float(amount)
    return tuple(found.items())


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Request(Strict):
    """What both kinds of request have. None: as the server was told to do where nothing is said."""

    model: str = Field(min_length=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_bias)] = ()
    max_tokens: int | None = Field(None, ge=1, lt=1 << 63)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, lt=1 << 63)
    top_p: float | None = Field(None, gt=0, le=1)
    # Without effect here: for whom it is asked, and under which heading.
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_refused(cls, value: Any) -> Any:
        """REFUSED says what to do instead."""
        for name, why in REFUSED.items():
            if value.get(name):
                refuse(why, name)
        return {name: v for name, v in value.items() if name not in REFUSED}

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            refuse("it belongs to stream: true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class JsonSchema(Strict):
    name: str = ""
    description: str = ""
    schema_: Plain = Field(default_factory=dict, alias="schema")
    strict: bool = False  # no effect: answers are always held to the schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            refuse('json_schema belongs to the type "json_schema", which needs it')
        return self


def _template_words(value: Any) -> Any:
    if not isinstance(value, dict):
        refuse("it must be an object")
    for name, word in value.items():
        if not name.isidentifier() or name in RESERVED:
            refuse(f"{name[:40]!r} is not for requests to say")
        if not isinstance(word, str | bool | int | None) or len(str(word)) > TEMPLATE_WORDS:
            refuse(f"{name[:40]!r} must be true, false, a whole number or a short text")
    return value


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MOST_MESSAGES)
    chat_template_kwargs: Annotated[Plain, BeforeValidator(_template_words)] = Field(
        default_factory=dict
    )
    logprobs: bool = False
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 63)
    modalities: list[Literal["text"]] = Field(default_factory=list)
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Annotated[Choice | None, PlainValidator(read_choice)] = None
    tools: Annotated[list[Tool], FailFast()] = Field(default_factory=list, max_length=MOST_TOOLS)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    verbosity: Literal["medium"] | None = None
    # Without effect: nothing is stored, nobody is billed, prompts are kept anyway.
    metadata: Plain | None = None
    prediction: Plain | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Plain | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            refuse("it belongs to logprobs: true", "top_logprobs")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            refuse("each needs a name of its own", "tools")
        choice = self.tool_choice
        if choice is not None and choice.kind == "required" and not self.tools:
            refuse("it needs tools to choose from", "tool_choice")
        if choice is not None and choice.name is not None and choice.name not in names:
            refuse(f"there is no {choice.name[:100]!r} among the tools", "tool_choice")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def choice(self) -> Choice:
        return (self.tool_choice or Choice()) if self.tools else Choice("none")


def _prompts(value: Any) -> list[str | list[int]]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list):
        refuse("it must be text, a list of texts, of token ids, or of lists of token ids")
    if prompts and all(type(one) is int for one in prompts):
        prompts = [prompts]
    texts = all(isinstance(one, str) for one in prompts)
    if not texts and not all(
        isinstance(one, list) and all(type(token) is int for token in one) for one in prompts
    ):
        refuse("it must be text, a list of texts, of token ids, or of lists of token ids")
    if not prompts or not all(prompts):
        refuse("it is empty, so there is nothing to continue")
    return prompts


class CompletionRequest(Request):
    """POST /v1/completions. prompt: texts, or token ids."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            refuse("ask for n answers and choose among them; leave it out", "best_of")
        if self.echo and self.logprobs is not None:
            refuse("those of an echoed prompt are not computed; leave echo out", "logprobs")
        return self


Kind = TypeVar("Kind", bound=Request)


def parse(body: bytes | bytearray, kind: type[Kind]) -> Kind:
    """The request in a body. Raises WireError (400), nothing else."""
    return kind.read(read_object(body))
