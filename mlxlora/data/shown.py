"""An Example as text to look at: pieces that are trained or not, special or not.

Tokens are decoded together, not one by one, so that characters of several tokens come out whole:
a character whose tokens are not all trained alike is shown with the last of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora.data.render import Example

UNFINISHED = "\ufffd"  # what decoding gives for the first bytes of a character


@dataclass(frozen=True)
class Piece:
    """A stretch of a row that is all of one kind."""

    text: str
    trained: bool
    special: bool  # a token with a meaning of its own, such as <|im_end|>
    tokens: int


def pieces(example: Example, tokenizer: Any) -> tuple[Piece, ...]:
    """The row from its first token to its last; joined, their texts are the decoded row.

    The first token counts as not trained: nothing predicts it.
    """
    plain = getattr(tokenizer, "_tokenizer", tokenizer)  # Hugging Face's own
    special = set(plain.all_special_ids) | set(tokenizer.eos_token_ids)
    special |= {i for i, token in plain.added_tokens_decoder.items() if token.special}
    tokens = example.tokens.tolist()
    kinds = [
        (bool(trained) and place > 0, token in special)
        for place, (token, trained) in enumerate(zip(tokens, example.mask, strict=True))
    ]
    return tuple(_pieces(tokens, kinds, plain))


def _pieces(
    tokens: Sequence[int], kinds: Sequence[tuple[bool, bool]], plain: Any
) -> Iterator[Piece]:
    start = 0  # of what is not shown yet
    for end in range(1, len(tokens) + 1):
        kind = kinds[end - 1]
        if end < len(tokens) and kinds[end] == kind:
            continue
        whole = end
        if end < len(tokens) and not kinds[end][1]:
            whole = _whole(tokens, start, end, plain)
        if whole > start:
            yield Piece(_decoded(plain, tokens[start:whole]), *kind, whole - start)
        start = whole


def _whole(tokens: Sequence[int], start: int, end: int, plain: Any) -> int:
    """Where, from start to end, the last character that is complete ends.

    Bytes that are no text at all are not waited for: a character has at most four.
    """
    for place in range(end, max(start, end - 4), -1):
        if not _decoded(plain, tokens[start:place]).endswith(UNFINISHED):
            return place
    return end if end - start >= 4 else start


def _decoded(plain: Any, tokens: Sequence[int]) -> str:
    return str(plain.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
