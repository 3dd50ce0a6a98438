"""One conversation with a model: the whole history is rendered anew for every turn, and the
longest prefix that the key-value cache already holds is reused.

Rendering the whole history keeps the prompt what the template says (system prompt once,
thinking of earlier turns dropped); the cache makes it cheap all the same.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlxlora.base import Base
from mlxlora.data.formats import Message
from mlxlora.errors import AdapterError
from mlxlora.generate import Sampling, chat_tokens, prompt_tokens, stream
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, switch


class Conversation:
    """Holds the history, the adapters by name and the cache. say() streams an answer.

    The first adapter is in use. raw=True continues plain text instead of filling a chat
    template; None decides by what the adapter in use was trained on, and by whether there is a
    template at all.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Adapter],
        sampling: Sampling,
        raw: bool | None = None,
        *,
        force: bool = False,
    ) -> None:
        self.base = base
        self.sampling = sampling
        self.system = ""
        self.history: list[Message] = []
        self.reused = 0  # tokens of the last prompt that the cache already held
        self._raw = raw
        self._cache: list[Any] = []
        self._cached: list[int] = []
        self.adapters: dict[str, Adapter] = {}
        self.name: str | None = None  # of the adapter in use
        self._attach(dict(adapters), force)
        self.use(next(iter(adapters), None))

    @property
    def raw(self) -> bool:
        if self._raw is not None:
            return self._raw
        if not self.base.tokenizer.has_chat_template:
            return True
        return self.adapter is not None and self.adapter.format == "text"

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in use."""
        return None if self.name is None else self.adapters[self.name]

    def use(self, name: str | None) -> None:
        """Switch to another adapter that is here, or to the bare base. The history stays."""
        switch(self.base, name)
        self.name = name
        self._forget()  # keys and values depend on the adapter

    def add(self, name: str, adapter: Adapter, *, force: bool = False) -> None:
        """Attach one more adapter and use it.

        Raises AdapterError for one that does not fit; then the one in use stays.
        """
        self._attach({**self.adapters, name: adapter}, force)
        self.use(name)

    def _attach(self, adapters: dict[str, Adapter], force: bool) -> None:
        try:
            attach(self.base, adapters, force=force)
        except AdapterError:
            attach(self.base.model, self.adapters)
            switch(self.base, self.name)
            raise
        self.adapters = adapters

    def reset(self) -> None:
        self.history.clear()

    def say(self, text: str) -> Iterator[str]:
        """Answer, piece by piece; what was said so far joins the history even if cut off."""
        answer = ""
        tokens = self._prompt(text)
        try:
            for response in self._generate(tokens):
                answer += response.text
                yield response.text
        finally:
            if not self.raw:
                self.history += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": answer},
                ]

    def _prompt(self, text: str) -> list[int]:
        if self.raw:
            return prompt_tokens(self.base.tokenizer, text, raw=True)
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": text}
        return chat_tokens(self.base.tokenizer, [*system, *self.history, asked])

    def _generate(self, tokens: list[int]) -> Iterator[Any]:
        self.reused = self._reuse(tokens)
        self._cached = list(tokens)
        new = tokens[self.reused :]
        try:
            for response in stream(
                self.base.model, self.base.tokenizer, new, self.sampling, self._cache
            ):
                # The last token of an answer is sampled but not yet in the cache.
                self._cached.append(response.token)
                yield response
        except GeneratorExit:
            raise
        except BaseException:  # Ctrl-C inside the model leaves some blocks a token ahead
            self._forget()
            raise

    def _reuse(self, tokens: list[int]) -> int:
        """Cut the cache back to the prefix it shares with tokens; return that length."""
        held = self._cache[0].offset if self._cache and hasattr(self._cache[0], "offset") else 0
        known = self._cached[:held]
        shared = min(len(os.path.commonprefix([known, tokens])), len(tokens) - 1)
        if shared <= 0 or not can_trim_prompt_cache(self._cache):
            self._forget()
            return 0
        trim_prompt_cache(self._cache, held - shared)
        return shared

    def _forget(self) -> None:
        self._cache = make_prompt_cache(self.base.model)
        self._cached = []
