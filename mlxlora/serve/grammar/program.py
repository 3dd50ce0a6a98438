"""Follows grammars in a process of its own: `python -m mlxlora.serve.grammar.program FD`."""

import sys
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlxlora.serve.apart.loop import work

TRIED = 3  # tokens, before a grammar is taken
# For building and for each step; a schema that needs more is refused before it is answered to.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Program:
    """What is asked by name; every answer begins with what is wrong, "" if nothing is."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._followed: dict[int, LLMatcher] = {}
        self._last: tuple[str, LLMatcher] | None = None  # the grammar begun last, at its beginning

    def check(self, grammar: str) -> tuple[str]:
        """Whether it can be followed, for a few tokens."""
        matcher = self._matcher(grammar)
        for _ in range(TRIED):
            if matcher.is_stopped():
                break
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            admitted = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            matcher.consume_tokens(admitted[:1].tolist())
        return (_fault(matcher),)

    def follow(self, number: int, grammar: str, tokens: list[int]) -> tuple[str, bool, bytes]:
        """Begin an answer by a grammar, which will go by this number; then as step.

        The choices of a request have one grammar, which is built for the first of them alone.
        """
        if self._last is None or self._last[0] != grammar:
            self._last = None  # not both at once
            self._last = grammar, self._matcher(grammar)
        self._followed[number] = self._last[1].deep_copy()
        return self.step(number, tokens)

    def step(self, number: int, tokens: list[int]) -> tuple[str, bool, bytes]:
        """Take the answer's next tokens: (fault, whether it is complete, which may follow).

        The last is a bit for each token of the vocabulary, the lowest of each byte first.
        """
        matcher = self._followed[number]
        if tokens:
            matcher.consume_tokens(tokens)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        return _fault(matcher), matcher.is_stopped(), mask

    def drop(self, number: int) -> tuple[str]:
        """The answer has ended."""
        self._followed.pop(number, None)
        return ("",)

    def _matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)


def _fault(matcher: Any) -> str:
    if not matcher.is_error():
        return ""
    return str(matcher.get_error()).strip().partition("\n")[0][:300]


if __name__ == "__main__":
    work(int(sys.argv[1]), lambda vocabulary: Program(vocabulary.make()))
