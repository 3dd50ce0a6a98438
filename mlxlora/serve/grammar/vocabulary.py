"""A tokenizer as llguidance takes it, also in another process."""

from copy import copy
from dataclasses import dataclass
from typing import Any, Self

from llguidance import LLTokenizer

from mlxlora.errors import DataError


@dataclass(frozen=True)
class Vocabulary:
    """definition: the tokenizer.json, with added tokens. size: rows of the model's table."""

    definition: str
    size: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Of mlx-lm's tokenizer. Raises DataError for one that is not made of a tokenizer.json."""
        try:
            backend = copy(tokenizer._tokenizer.backend_tokenizer)
            backend.no_padding()
            backend.no_truncation()
            definition = backend.to_str()
        except AttributeError as error:
            raise DataError(_unfit("it has no tokenizer.json")) from error
        return cls(definition, tokenizer._vocabulary, tuple(sorted(tokenizer.eos_token_ids)))

    def make(self) -> LLTokenizer:
        """Takes a second or so. Raises DataError for one that llguidance does not know."""
        try:
            return LLTokenizer(self.definition, n_vocab=self.size, eos_token=list(self.ends))
        except ValueError as error:
            raise DataError(_unfit(str(error))) from error


def _unfit(why: str) -> str:
    return f"this model's tokenizer cannot hold answers to a grammar: {why}"
