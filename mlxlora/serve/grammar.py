"""Answers held to a grammar: JSON of any kind, or by a schema. llguidance does the parsing.

Before each token, those that the grammar admits are known as a mask over the vocabulary. The
token drawn before must be known for that, so rows with a grammar wait for it where others run
one token ahead.
"""

import json
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from mlxlora.errors import DataError

ANY_OBJECT = {"type": "object"}
LARGEST = 64 << 10  # characters of a schema
MOST_REMAINDERS = 10_000  # of the numbers in multipleOf, multiplied
# One line, or indented; unlimited, a weak model might write spaces without end.
SPACES: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,24})?"}


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON that a schema describes. Raises DataError for one too large."""
    text = json.dumps(schema)
    if len(text) > LARGEST:
        raise DataError(f"the schema has {len(text):,} characters; at most {LARGEST:,} are read")
    _check_multiples(schema)
    try:
        return str(LLMatcher.grammar_from_json_schema(text, overrides=SPACES))
    except ValueError as error:
        raise DataError(f"it cannot be followed: {_first_line(str(error))}") from error


def _check_multiples(schema: Any) -> None:
    """Raise DataError if the remainders to be told apart are too many: llguidance would not end."""
    states, rest = 1.0, [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            number = value.get("multipleOf")
            states *= max(1.0, abs(number)) if isinstance(number, int | float) else 1.0
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    if not states <= MOST_REMAINDERS:
        raise DataError(f"multipleOf: at most {MOST_REMAINDERS:,} in all can be followed")


class Grammars:
    """What is made once for a tokenizer, when the first grammar is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._made: LLTokenizer | None = None

    def compile(self, grammar: str, prompt_tokens: int) -> "Grammar":
        """Raises DataError, with llguidance's reason, for a grammar that it cannot follow."""
        matcher = LLMatcher(self._made_once(), grammar, log_level=0)
        if not matcher.is_error():  # some are found too complex by the first mask only
            matcher.compute_bitmask()
        if matcher.is_error():
            raise DataError(f"it cannot be followed: {_first_line(matcher.get_error())}")
        return Grammar(matcher, prompt_tokens)

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
