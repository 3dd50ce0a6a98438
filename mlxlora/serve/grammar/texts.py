"""What an answer may be, as llguidance reads it: JSON by schemas, after thoughts, as a call."""

import json
from functools import cached_property
from typing import Any, Literal

from llguidance import LLMatcher, LLTokenizer

from mlxlora.errors import DataError
from mlxlora.serve.grammar.vocabulary import Vocabulary

ANY_OBJECT = {"type": "object"}
LARGEST = 64 << 10  # characters of a schema
# One line, or indented; unlimited, a weak model might write spaces without end.
SPACES: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,24})?"}

Thinking = Literal["no", "possible", "open"]  # open: the prompt ends within it


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON that a schema describes. Raises DataError for one that is too large, or
    holds a number that is."""
    text = json.dumps(schema)
    if len(text) > LARGEST:
        raise DataError(f"the schema has {len(text):,} characters; at most {LARGEST:,} are read")
    try:
        return str(LLMatcher.grammar_from_json_schema(text, overrides=SPACES))
    except ValueError as error:  # whole numbers beyond what a float can hold
        raise DataError(f"the schema cannot be read: {error}") from error


class Texts:
    """Grammars for the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def of_json(self, schema: dict[str, Any], thinking: Thinking = "no") -> str:
        """The grammar of an answer by a schema, after thoughts if there are any."""
        if thinking == "no":
            return json_grammar(schema)
        return self._joined("@answer", {"answer": schema}, thinking)

    def of_call(
        self, arguments: dict[str, dict[str, Any]], thinking: Thinking = "no", opening: str = ""
    ) -> str:
        """The grammar of one call {"name": ..., "arguments": ...} of one of several functions.

        arguments: the schema of each function's, by its name. opening: what stands before it.
        """
        names = [f"arguments_{number}" for number in range(len(arguments))]
        calls = " | ".join(
            f"{_literal(_call_of(name))} @{inner} {_literal('}')}"
            for name, inner in zip(arguments, names, strict=True)
        )
        body = f"{self._marker(opening)} {_literal(chr(10))} call" if opening else "call"
        schemas = dict(zip(names, arguments.values(), strict=True))
        return self._joined(body, schemas, thinking, f"call: {calls}\n")

    def _joined(
        self, body: str, schemas: dict[str, dict[str, Any]], thinking: Thinking, rules: str = ""
    ) -> str:
        """body: what is answered, in llguidance's form of Lark; it names schemas as @name."""
        start, thoughts = self._thoughts(thinking)
        lark = f"start: {start} {body}\n{thoughts}{rules}"
        grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
        for name, schema in schemas.items():
            (grammar,) = json.loads(json_grammar(schema))["grammars"]
            grammars.append({**grammar, "name": name})
        joined = json.dumps({"grammars": grammars})
        if len(joined) > 2 * LARGEST:
            raise DataError(f"the schemas have {len(joined):,} characters; that is too many")
        return joined

    def _thoughts(self, thinking: Thinking) -> tuple[str, str]:
        """(what an answer begins with, the rules for it)."""
        if thinking == "no":
            return "", ""
        tokenizer = self._tokenizer
        # Text cannot hold special tokens; an end that is text itself must not be read over.
        if self._made.is_special_token(tokenizer.think_end_tokens[0]):
            rules = f"thoughts: words {self._marker(tokenizer.think_end)}\nwords: /(?s:.*)/\n"
        else:
            rules = f"thoughts[suffix={_literal(tokenizer.think_end)}]: /(?s:.*)/\n"
        rules += "SPACE: /[ \\n]{0,4}/\n"
        if thinking == "open":
            return "thoughts SPACE", rules
        return f"({self._marker(tokenizer.think_start)} thoughts SPACE)?", rules

    def _marker(self, text: str) -> str:
        """Text in which tokens may stand that have no text to llguidance."""
        made = self._made
        parts: list[str] = []
        words: list[int] = []
        for token in [*self._tokenizer.encode(text, add_special_tokens=False), None]:
            if token is not None and not made.is_special_token(token):
                words.append(token)
                continue
            if words:
                parts.append(_literal(made.decode_str(words)))
                words = []
            if token is not None:
                parts.append(f"<[{token}]>")
        return " ".join(parts)

    @cached_property
    def _made(self) -> LLTokenizer:
        return self._vocabulary.make()


def _call_of(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


def _literal(text: str) -> str:
    """As llguidance's Lark writes text: in the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)
