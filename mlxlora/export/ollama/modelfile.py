"""A Modelfile: its lines, quoted as Ollama's parser reads them, and what stands in them.

The parser (ollama's parser/parser.go) ends a quoted value at the first line that ends with the
closing quotes, and leaves out characters that Go calls unprintable; it knows no escapes. Options
and their types are those of ollama's api/types.go.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from mlxlora.errors import ExportError

MOST_CONTEXT = 8192  # tokens: the cache of keys and values is allocated whole
_OPTIONS = {  # of generation_config.json -> of Ollama
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "typical_p": ("typical_p", float),
    "repetition_penalty": ("repeat_penalty", float),
}
_POSITIONS = (
    "max_position_embeddings",
    "max_sequence_length",
    "n_positions",
    "n_ctx",
    "seq_length",
)
_MARKUP = re.compile(r"</?[A-Za-z][A-Za-z0-9]*/?>")


def modelfile(
    template: str,
    *,
    model: str,
    adapter: str = "",
    system: str = "",
    stops: list[str],
    parameters: Mapping[str, float | int],
) -> str:
    """The text of a Modelfile. model, adapter: file names beside it.

    Raises ExportError for a template that it cannot hold; literal.py writes none.
    """
    if not holds(template):
        raise ExportError("the TEMPLATE has quotes or characters that a Modelfile cannot hold")
    lines = [f"FROM ./{model}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def holds(text: str) -> bool:
    """Whether text, in three quotes, comes back as it is."""
    return '"""' not in text and all(c.isprintable() or c in "\n\t" for c in text)


def parameters(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float | int]:
    """Ollama's options from generation_config.json and config.json; of the others none."""
    found: dict[str, float | int] = {}
    for name, (theirs, kind) in _OPTIONS.items():
        value = _number(generation.get(name))
        if value is not None:
            found[theirs] = kind(value)
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    text = config.get("text_config") or {}
    told = (_number(part.get(name)) for part in (config, text) for name in _POSITIONS)
    longest = min((int(value) for value in told if value and value >= 1), default=None)
    if longest is not None:
        found["num_ctx"] = min(longest, MOST_CONTEXT)
    return found


def _number(value: Any) -> float | int | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known and value >= 0 else None


def stops(tokenizer: Any) -> list[str]:
    """The texts at which an answer ends: tokens of the tokenizer's own that end a turn or a text.

    Not one that ordinary text may hold: a word, or what HTML looks like, as </s> does, when it is
    the end-of-sequence token that stands in the GGUF, at which llama.cpp stops anyway.
    """
    plain = getattr(tokenizer, "_tokenizer", tokenizer)
    added = set(plain.get_added_vocab().values())
    found = []
    for token in sorted(set(tokenizer.eos_token_ids) & added):
        text = plain.decode([token])
        natural = _MARKUP.fullmatch(text) is not None and token == plain.eos_token_id
        word = re.fullmatch(r"[\w\s]*", text) is not None
        if not natural and not word and holds(text) and not set('"\n') & set(text):
            found.append(text)
    return found
