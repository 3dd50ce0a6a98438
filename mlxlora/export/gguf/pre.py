"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer.json does.

llama.cpp holds its own regular expressions (src/llama-vocab.cpp) and a GGUF names one of them. A
tokenizer is known by the cuts it makes, not by the family it belongs to: every row here is one
chain of cuts as tokenizer.json writes it. A chain that is not here is refused, since a wrong one
gives other tokens without an error. Some names also take a whole word that is in the vocabulary
before any merge is tried (ignore_merges), so two names may share one chain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxlora.errors import ExportError

_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K_ENDING = r"'(?i:[sdmt]|ll|ve|re)"
_SPACES = r"\s+(?!\S)|\s+"
_WORD, _MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

LLAMA3 = rf"{_ENDING}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|{_SPACES}"
CL100K = (
    rf"{_CL100K_ENDING}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|{_SPACES}"
)
QWEN2 = rf"{_ENDING}|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]+|{_SPACES}"


def _cased(ending: str) -> str:
    """Words that change between capitals and others at most once."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


GPT4O = rf"{_cased(_ENDING + '?')}|\p{{N}}{{1,3}}|{_MARKS_SLASH}|\s*[\r\n]+|{_SPACES}"
TEKKEN = rf"{_cased('')}|\p{{N}}|{_MARKS_SLASH}|\s*[\r\n]+|{_SPACES}"
SEED = (
    rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}"
)
QWEN35 = (
    rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)

Cut = tuple[str, ...]
_BYTES, _GPT2 = ("bytes",), ("gpt2", "bytes")


@dataclass(frozen=True)
class Pre:
    """A pre-tokenizer of llama.cpp."""

    name: str
    ignores_merges: bool = False
    but: str = ""  # where it cuts otherwise all the same


def _regex(pattern: str) -> tuple[Cut, ...]:
    return (("split", pattern, "Isolated"), _BYTES)


# Its two regular expressions stand for classes of letters that its engine does not know.
_LATIN = (
    "llama.cpp's {} cuts words with combining marks (Devanagari, Thai) or with capitals inside "
    "(other than A to Z) at other places than this tokenizer"
)
_LLAMA_BPE = (Pre("llama-bpe", True), Pre("smaug-bpe"))

# The cuts a tokenizer makes, in order -> what makes them in llama.cpp.
KNOWN: dict[tuple[Cut, ...], tuple[Pre, ...]] = {
    (_GPT2,): (Pre("gpt-2"),),
    (("digits", "single"), _GPT2): (Pre("smollm"),),
    _regex(LLAMA3): _LLAMA_BPE,
    _regex(CL100K): _LLAMA_BPE,
    _regex(QWEN2): (Pre("qwen2"),),
    _regex(QWEN35): (Pre("qwen35"),),
    _regex(GPT4O): (Pre("gpt-4o", but=_LATIN.format("gpt-4o")),),
    _regex(TEKKEN): (Pre("tekken", True, _LATIN.format("tekken")),),
    _regex(SEED): (Pre("seed-coder"),),
}


def recognize(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Pre, ...]:
    """What in llama.cpp cuts like this part of a tokenizer.json. Raises ExportError if nothing."""
    cuts = _cuts(pre_tokenizer)
    found = KNOWN.get(cuts)
    if found is None:
        told = "; ".join(" ".join(cut) for cut in cuts) or "no cuts at all"
        raise ExportError(
            "no pre-tokenizer of llama.cpp is known to cut text as this tokenizer does "
            f"({told[:300]}), and another would give wrong tokens; export with --format hf instead"
        )
    return found


def _cuts(node: Mapping[str, Any] | None) -> tuple[Cut, ...]:
    """The chain of cuts of a pre_tokenizer, flat."""
    if node is None:
        return ()
    kind = str(node.get("type"))
    if kind == "Sequence":
        return tuple(cut for part in node.get("pretokenizers", ()) for cut in _cuts(part))
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return (_GPT2 if node.get("use_regex", True) else _BYTES,)
    if kind == "Digits":
        return (("digits", "single" if node.get("individual_digits") else "runs"),)
    if kind == "Split" and not node.get("invert"):
        pattern = node.get("pattern") or {}
        if "Regex" in pattern:
            return (("split", str(pattern["Regex"]), str(node.get("behavior"))),)
    return ((kind, *(f"{k}={v}" for k, v in node.items() if k != "type")),)
