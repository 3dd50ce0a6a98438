"""One conversation with a model and its adapters, on the engine that also serves.

Rendering the whole history for every turn keeps the prompt what the template says (system
prompt once, thinking of earlier turns dropped); what the engine has kept of it makes it cheap
all the same.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxlora.data.formats import Message
from mlxlora.errors import DataError
from mlxlora.files import atomic_file
from mlxlora.generate import chat_tokens, prompt_tokens
from mlxlora.lora.adapter import Adapter
from mlxlora.readers import read_json
from mlxlora.serve.engine import Engine
from mlxlora.serve.orders import End, Order, Sampling
from mlxlora.serve.waiting import answers


@dataclasses.dataclass
class Conversation:
    """Holds the history and the name of the adapter in use (None: the bare base).

    raw=True continues plain text instead of filling a chat template; None decides by what the
    adapter in use was trained on, and by whether there is a template at all.
    """

    engine: Engine
    name: str | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_tokens: int = 512
    raw: bool | None = None
    system: str = ""
    history: list[Message] = dataclasses.field(default_factory=list)
    reused: int = 0  # tokens of the last prompt that were computed before

    def continues(self, name: str | None) -> bool:
        """Whether this one continues plain text."""
        if self.raw is not None:
            return self.raw
        if not self.engine.base.tokenizer.has_chat_template:
            return True
        return name is not None and self.engine.names[name].format == "text"

    def use(self, name: str | None) -> None:
        """Switch to another adapter that is here, or to the bare base. The history stays."""
        if name is not None and name not in self.engine.names:
            known = ", ".join(self.engine.names) or "none"
            raise DataError(f"there is no adapter {name!r} here; there are: {known}")
        self.name = name

    def add(self, name: str, adapter: Adapter, *, force: bool = False) -> None:
        """Take one more adapter into service and use it.

        Raises AdapterError for one that does not fit; then the one in use stays.
        """
        self.engine.load(name, adapter, force=force)
        self.name = name

    def reset(self) -> None:
        self.history.clear()

    def say(self, text: str) -> Iterator[str]:
        """Answer, piece by piece; what was said so far joins the history even if cut off."""
        for _, piece in self.compare(text, [self.name]):
            yield piece

    def compare(self, text: str, names: Sequence[str | None]) -> Iterator[tuple[int, str]]:
        """The same turn by several, decoded together: (which of the names, piece), as they come.

        The answer of the first joins the history.
        """
        heard, begun = "", False
        orders = [self._order(text, name) for name in names]
        try:
            for number, event in answers(self.engine, orders):
                begun = True
                if isinstance(event, End):
                    self.reused = event.cached_tokens
                elif event.text:
                    heard += event.text if number == 0 else ""
                    yield number, event.text
        finally:
            if begun:  # what was refused, as too long, was not said
                self._remember(text, heard, names[0])

    def save(self, path: Path) -> int:
        """Write the conversation as a row to train on; returns how many messages it has."""
        messages = self._messages()
        if not messages:
            raise DataError("nothing has been said yet, so there is nothing to save")
        with atomic_file(path) as file:
            file.write((json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode())
        return len(messages)

    def load(self, path: Path) -> int:
        """Go on with a conversation that was saved; returns how many messages it has."""
        messages = read_json(path, DataError).get("messages")
        if not isinstance(messages, list) or not all(_is_message(one) for one in messages):
            raise DataError(f'{path} is not {{"messages": [{{"role": ..., "content": ...}}]}}')
        first = messages[:1] if messages[:1] and messages[0]["role"] == "system" else []
        self.system = first[0]["content"] if first else ""
        self.history = messages[len(first) :]
        return len(messages)

    def _order(self, text: str, name: str | None) -> Order:
        tokenizer = self.engine.base.tokenizer
        continues = self.continues(name)
        if continues:
            tokens = prompt_tokens(tokenizer, text, raw=True)
        else:
            tokens = chat_tokens(tokenizer, [*self._messages(), {"role": "user", "content": text}])
        order = Order(tuple(tokens), name, self.max_tokens, self.sampling)
        return dataclasses.replace(order, continues=continues)

    def _messages(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.history]

    def _remember(self, text: str, heard: str, name: str | None) -> None:
        if not self.continues(name):
            self.history += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": heard},
            ]


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
