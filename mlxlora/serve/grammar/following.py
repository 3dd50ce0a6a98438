"""Answers held to a grammar. llguidance does the parsing, in processes of their own.

Before each token, those that the grammar admits are known as a mask over the vocabulary. The
token drawn before must be known for that, so rows with a grammar wait for it where others run
one token ahead.
"""

import itertools
from contextlib import suppress
from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora.errors import DataError
from mlxlora.serve.apart.process import Lost, Process
from mlxlora.serve.grammar.texts import Texts
from mlxlora.serve.grammar.vocabulary import Vocabulary

PROGRAM = "mlxlora.serve.grammar.program"
# Of processor time. All that is answered waits while one answer's grammar is begun or goes on.
CHECK_SECONDS = 0.5
STEP_SECONDS = 0.5
FOLLOW_SECONDS = 2 * CHECK_SECONDS  # what was checked is read once more


class Grammars:
    """What is made once for a tokenizer, when the first grammar is asked for.

    A grammar is checked in one process before another one, where answers are in the making, is
    told of it. Should it end that one nevertheless, its own answer fails and the others go on.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = cache(lambda: Vocabulary.of(tokenizer))
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._checking, self._following = (Process(PROGRAM, vocabulary) for _ in range(2))

    @cached_property
    def texts(self) -> Texts:
        """Raises DataError for a tokenizer that llguidance does not know."""
        return Texts(self._tokenizer, self._vocabulary())

    def check(self, grammar: str) -> None:
        """Raises DataError, with the reason, for a grammar that cannot be followed."""
        self._following.start()  # it will be needed next
        try:
            (fault,) = self._checking.ask(CHECK_SECONDS, "check", grammar)
        except Lost:
            fault = "it takes more time or memory than a request may have"
            self._checking.start()  # so that it is ready for the next one
        if fault:
            raise DataError(f"it cannot be followed: {fault}")

    def grammar(self, text: str, prompt_tokens: int) -> "Grammar":
        """A grammar that was checked, for one answer."""
        return Grammar(self._following, text, prompt_tokens)

    def close(self) -> None:
        """End the processes; they would be started again when needed."""
        self._checking.close()
        self._following.close()


class Grammar:
    """One answer's place in its grammar; called as a logits processor."""

    _numbers = itertools.count()

    def __init__(self, process: Process, text: str, prompt_tokens: int) -> None:
        self.finished = False  # nothing but the end may follow
        self._process, self._text = process, text
        self._prompt = prompt_tokens  # tokens that are not the answer's
        self._answer: list[int] = []
        self._known = -1  # the process's losses when it was told of this answer
        self._number = next(self._numbers)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens (T,), the prompt's first; returns logits (1, V), -inf for what is not admitted.

        Raises DataError where the grammar turns out to be too complex.
        """
        if self.finished:
            return logits
        new: list[int] = tokens[self._prompt + len(self._answer) :].tolist()  # type: ignore[assignment]
        self._answer += new
        try:
            fault, self.finished, mask = self._step(new)
        except Lost:
            fault = "it takes more time or memory than an answer may have"
        if fault:
            raise DataError(f"the answer's grammar cannot be followed further: {fault}")
        return _masked(logits, mask)

    def close(self) -> None:
        """The answer has ended."""
        if self._known == self._process.losses:
            with suppress(Lost, DataError, OSError):  # then nothing is left of it there
                self._process.ask(STEP_SECONDS, "drop", self._number)

    def _step(self, new: list[int]) -> tuple[Any, ...]:
        self._process.start()  # had it ended meanwhile, that is counted as a loss now
        if self._known == self._process.losses:
            return self._process.ask(STEP_SECONDS, "step", self._number, new)
        # Its first token, or the process was lost since over another answer.
        self._known = self._process.losses
        return self._process.ask(FOLLOW_SECONDS, "follow", self._number, self._text, self._answer)


def _masked(logits: mx.array, mask: bytes) -> mx.array:
    """mask: a bit for each token, the lowest of each byte first; the table may have more rows."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    admitted = np.zeros(logits.shape[-1], bool)
    admitted[: len(bits)] = bits[: len(admitted)]
    return mx.where(mx.array(admitted), logits, -mx.inf)
