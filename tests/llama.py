"""llama.cpp as the tests ask it: logits, tokens, text."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")


@contextmanager
def loaded(path: Path, *, lora: Path | None = None, context: int = 512):
    """The model of a GGUF file, with keys and values kept in float32."""
    model = llama_cpp.Llama(
        str(path),
        lora_path=None if lora is None else str(lora),
        n_ctx=context,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
        n_threads=2,
    )
    try:
        yield model
    finally:
        model.close()


def logits(path: Path, tokens: list[int], **options) -> np.ndarray:
    """(token, vocabulary)."""
    with loaded(path, **options) as model:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])


def greedy(path: Path, tokens: list[int], count: int) -> list[int]:
    """The likeliest next tokens, one after another."""
    with loaded(path) as model:
        out: list[int] = []
        model.eval(tokens)
        for _ in range(count):
            out.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval([out[-1]])
        return out
