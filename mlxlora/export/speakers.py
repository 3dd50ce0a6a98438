"""Programs that can be asked: this one, and those that exported models are for, where installed."""

from collections.abc import Set
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import mlx.nn as nn

from mlxlora.errors import ExportError
from mlxlora.generate import stream


class Speaker(Protocol):
    """A program that holds a model."""

    name: str

    def tokens(self, text: str, raw: bool) -> list[int]:
        """Of a prompt; raw: as a text's beginning, else special tokens are in the text."""
        ...

    def text(self, tokens: list[int]) -> str:
        """Of an answer."""
        ...

    def answer(self, tokens: list[int], length: int) -> list[int]:
        """The greedy continuation, without the token that ends it."""
        ...


class InMLX:
    """A model in this program."""

    def __init__(self, name: str, model: nn.Module, tokenizer: Any) -> None:
        self.name, self._model, self._tokenizer = name, model, tokenizer

    def tokens(self, text: str, raw: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=raw))

    def text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def answer(self, tokens: list[int], length: int) -> list[int]:
        found = [
            response.token for response in stream(self._model, self._tokenizer, tokens, length)
        ]
        ends = self._tokenizer.eos_token_ids
        return found[:-1] if found and found[-1] in ends else found


class InTransformers:
    """A Hugging Face directory, in float32."""

    def __init__(self, directory: Path, ends: Set[int]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.name = f"transformers {version('transformers')}"
        self._torch, self._ends = torch, sorted(ends)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def tokens(self, text: str, raw: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=raw))

    def text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def answer(self, tokens: list[int], length: int) -> list[int]:
        with self._torch.no_grad():
            given = self._torch.tensor([tokens])
            found = self._model.generate(
                given,
                attention_mask=self._torch.ones_like(given),
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=self._ends or None,
                pad_token_id=0,
            )
        answer = found[0, len(tokens) :].tolist()
        return answer[:-1] if answer and answer[-1] in self._ends else answer


class InLlamaCpp:
    """A GGUF file, and an adapter's."""

    def __init__(self, model: Path, ends: Set[int], adapter: Path | None = None) -> None:
        from llama_cpp import Llama

        self.name = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        self._ends = ends
        try:
            self._llama = Llama(
                str(model),
                lora_path=None if adapter is None else str(adapter),
                n_ctx=1024,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:  # an older one knows fewer architectures
            raise ExportError(
                f"{model} was written, but {self.name} cannot open it; a newer llama-cpp-python "
                "may, or no --check"
            ) from error

    def tokens(self, text: str, raw: bool) -> list[int]:
        return list(self._llama.tokenize(text.encode(), add_bos=raw, special=True))

    def text(self, tokens: list[int]) -> str:
        return self._llama.detokenize(tokens).decode("utf-8", "replace")

    def answer(self, tokens: list[int], length: int) -> list[int]:
        self._llama.reset()
        found: list[int] = []
        for token in self._llama.generate(tokens, temp=0, top_k=1, repeat_penalty=1):
            if len(found) == length or token in self._ends:
                break
            found.append(int(token))
        return found


def installed(*packages: str) -> bool:
    """Whether these packages are here."""
    try:
        return bool([version(package) for package in packages])
    except PackageNotFoundError:
        return False
