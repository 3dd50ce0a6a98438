"""Answers held to a grammar: JSON of any kind, or by a schema. llguidance does the parsing.

Before each token, those that the grammar admits are known as a mask over the vocabulary. The
token drawn before must be known for that, so rows with a grammar wait for it where others run
one token ahead.
"""

import json
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from mlxlora.errors import DataError

ANY_OBJECT = {"type": "object"}
LARGEST = 64 << 10  # characters of a schema
# One line, or indented; unlimited, a weak model might write spaces without end.
TRIED = 3  # tokens, before a grammar is taken
SPACES: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,24})?"}


# For building and for each step; a schema that needs more is refused before it is answered to.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
Thinking = Literal["no", "possible", "open"]  # open: the prompt ends within it


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON that a schema describes. Raises DataError for one too large."""
    text = json.dumps(schema)
    if len(text) > LARGEST:
        raise DataError(f"the schema has {len(text):,} characters; at most {LARGEST:,} are read")
    return str(LLMatcher.grammar_from_json_schema(text, overrides=SPACES))


class Grammars:
    """What is made once for a tokenizer, when the first grammar is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._made: LLTokenizer | None = None

    def compile(self, grammar: str, prompt_tokens: int) -> "Grammar":
        """Raises DataError, with llguidance's reason, for a grammar that it cannot follow."""
        matcher = LLMatcher(self._made_once(), grammar, log_level=0, limits=LIMITS)
        tried = matcher.deep_copy()
        for _ in range(TRIED):  # what is too complex fails here, before others wait for it
            if tried.is_stopped():
                break
            bits = np.frombuffer(tried.compute_bitmask(), np.uint8)
            admitted = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            tried.consume_tokens(admitted[:1].tolist())
        if tried.is_error():
            raise DataError(f"it cannot be followed: {_first_line(tried.get_error())}")
        return Grammar(matcher, prompt_tokens)

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
        if self._made_once().is_special_token(tokenizer.think_end_tokens[0]):
            rules = f"thoughts: words {self._marker(tokenizer.think_end)}\nwords: /(?s:.*)/\n"
        else:
            rules = f"thoughts[suffix={_literal(tokenizer.think_end)}]: /(?s:.*)/\n"
        rules += "SPACE: /[ \\n]{0,4}/\n"
        if thinking == "open":
            return "thoughts SPACE", rules
        return f"({self._marker(tokenizer.think_start)} thoughts SPACE)?", rules

    def _marker(self, text: str) -> str:
        """Text in which tokens may stand that have no text to llguidance."""
        made = self._made_once()
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

    def _made_once(self) -> LLTokenizer:
        if self._made is None:
            try:
                self._made = from_tokenizer(
                    self._tokenizer._tokenizer,
                    n_vocab=self._tokenizer._vocabulary,
                    eos_token=sorted(self._tokenizer.eos_token_ids),
                )
            except ValueError as error:
                raise DataError(
                    f"this model's tokenizer cannot hold answers to a grammar: {error}"
                ) from error
        return self._made


class Grammar:
    """One answer's place in its grammar; called as a logits processor."""

    def __init__(self, matcher: LLMatcher, prompt_tokens: int) -> None:
        self._matcher = matcher
        self._read = prompt_tokens  # tokens that it knows or need not know

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens (T,), the prompt's first; returns logits (1, V), -inf for what is not admitted.

        Raises DataError where the grammar turns out to be too complex.
        """
        new: list[int] = tokens[self._read :].tolist()  # type: ignore[assignment]
        self._read += len(new)
        if self.finished:
            return logits
        if (new and not self._matcher.consume_tokens(new)) or self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise DataError(f"the answer's grammar cannot be followed further: {reason}")
        width = logits.shape[-1]
        mask = allocate_token_bitmask(1, width)
        fill_next_token_bitmask(self._matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8), axis=-1, bitorder="little")[:, :width]
        return mx.where(mx.array(bits.astype(bool)), logits, -mx.inf)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _call_of(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


def _literal(text: str) -> str:
    """As llguidance's Lark writes text: in the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)
