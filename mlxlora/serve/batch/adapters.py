"""The adapters in service: which slot each has, who still uses it, and what stands in the model.

Adapters of plain low-rank layers share one form of the model, in which every row has its own
(rows.py). Any other, with DoRA, experts, embeddings or whole modules, has a form to itself, made
of its ready modules; so has one whose mixed answers are not those it gives alone, which is tried
out when it is loaded, since mlx-lm's models are free to lay out rows as they like. All of this
belongs to the engine's thread.
"""

import hashlib
import time
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora.base import Base
from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import check_base, part_of
from mlxlora.lora.fit import check_fit
from mlxlora.lora.whole import Part
from mlxlora.quantized import activation_dtype
from mlxlora.serve.batch.rows import Row, Rows, RowsLinear, fits_rows
from mlxlora.serve.orders import Unknown

TRIED = 4  # tokens of each row of a trial
AGREES = 5e-2  # largest difference of a logit, relative to the largest logit: half precision's


class Stage:
    """The model, in which one form stands at a time; None is the bare base."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._form: Part | None = None
        self._stood = Part()

    def show(self, form: Part | None) -> None:
        if form is not self._form:
            self._stood.swap_into(self.model)
            self._stood = form.swap_into(self.model) if form is not None else Part()
            self._form = form


@dataclass(eq=False)
class Served:
    """An adapter in service, or the bare base (slot 0, no adapter)."""

    name: str | None
    key: str  # of its content
    format: str = ""  # of the rows it was trained on, as Adapter.format
    slot: int = 0
    form: Part | None = None  # its own form of the model; None: the mixed one
    users: int = 0  # answers in the making
    leaving: bool = False
    since: float = field(default_factory=time.time)  # seconds since the epoch


class Adapters:
    """By name; load and unload while others are used."""

    def __init__(self, base: Base, rows: Rows, slots: int) -> None:
        self.base, self.slots = base, slots
        self.stage = Stage(base.model)
        self.mixed = Part({})
        self._rows = rows
        self._bare = Served(None, "base")
        self._named: dict[str, Served] = {}
        self._all: list[Served] = []  # those that are leaving too
        self._dtype = activation_dtype(base.model.layers[0])

    @property
    def named(self) -> dict[str, Served]:
        return dict(self._named)

    def get(self, name: str | None) -> Served:
        """Raises Unknown."""
        if name is None:
            return self._bare
        if name not in self._named:
            raise Unknown(f"no adapter {name!r} is loaded")
        return self._named[name]

    def load(
        self, name: str, adapter: Adapter, key: str | None = None, *, force: bool = False
    ) -> Served:
        """Take an adapter into service. key: its content, if it is known already.

        Raises AdapterError if it cannot be, and why.
        """
        if name in self._named:
            raise AdapterError(f"an adapter {name!r} is loaded already; unload it first")
        if not force:
            check_base(self.base, adapter)
        self.stage.show(None)
        modules = dict(self.base.model.named_modules())
        check_fit(modules, adapter)
        served = Served(name, key or content(adapter), adapter.format)
        if not (fits_rows(modules, adapter) and self._put(served, adapter, modules)):
            self.stage.show(None)
            served.form = part_of(self.base.model, adapter)
            layers = [layer.parameters() for layer in served.form.modules.values()]
            mx.eval(layers, list(served.form.weights.values()))
        self._named[name] = served
        self._all.append(served)
        return served

    def unload(self, name: str) -> None:
        """Take it out of service as soon as nobody uses it any more. Raises Unknown."""
        served = self.get(name)
        del self._named[name]
        served.leaving = True
        self.tidy(served)

    def release(self, served: Served) -> None:
        """An answer that used it is done."""
        served.users -= 1
        self.tidy(served)

    def tidy(self, served: Served) -> None:
        if served.leaving and not served.users and served in self._all:
            self._all.remove(served)
            self._clear(served.slot)

    def _put(self, served: Served, adapter: Adapter, modules: dict[str, nn.Module]) -> bool:
        """Give it a slot in the mixed form; False if it does not answer there as it does alone.

        Raises AdapterError if no slot is free.
        """
        taken = {one.slot for one in self._all}
        free = [slot for slot in range(1, self.slots + 1) if slot not in taken]
        if not free:
            raise AdapterError(
                f"all {self.slots} slots for adapters are taken: unload one, or start the server "
                "with more (--slots)"
            )
        alone = self._tried(part_of(self.base.model, adapter), [0, 0])
        served.slot = free[0]
        self.stage.show(None)
        added = {}
        for path in adapter.modules:
            layer = self.mixed.modules.get(path)
            if layer is None:
                layer = RowsLinear(modules[path], self._rows, self.slots, self._dtype)
                layer.freeze()
                layer.eval()
                added[path] = layer
            tensors = adapter.tensors(path)
            layer.put(served.slot, tensors["lora_a"], tensors["lora_b"], adapter.scale)
        self.mixed = Part({**self.mixed.modules, **added})
        try:
            mixed = self._tried(self.mixed, [served.slot, 0, served.slot])
            agrees = _close(mixed[0], alone[0]) and _close(mixed[2], alone[0])
            agrees &= _close(mixed[1], self._tried(None, [0, 0])[1])
        except (ValueError, RuntimeError):  # shapes that the layers cannot tell apart
            agrees = False
        if not agrees:
            self._clear(served.slot)
            served.slot = 0
        return agrees

    def _tried(self, form: Part | None, slots: list[int]) -> mx.array:
        """The logits (rows, TRIED, V) of a few tokens, the same in every row."""
        self.stage.show(form)
        self._rows.let([Row(slot) for slot in slots])
        tokens = mx.broadcast_to(mx.arange(TRIED), (len(slots), TRIED))
        logits = self.base.model(tokens).astype(mx.float32)
        mx.eval(logits)
        return logits

    def _clear(self, slot: int) -> None:
        if slot:
            for layer in self.mixed.modules.values():
                layer.clear(slot)


def content(adapter: Adapter) -> str:
    """A name for what an adapter does: the same for the same tensors and scale.

    It reads the weights, in this thread: MLX reads lazily, on the thread that opened the file.
    """
    mx.eval(list(adapter.weights.values()))
    digest = hashlib.sha256(f"{adapter.method} {adapter.scale}".encode())
    for name in sorted(adapter.weights):
        digest.update(name.encode())
        digest.update(np.array(adapter.weights[name].astype(mx.float32)).data)
    return digest.hexdigest()


def _close(a: mx.array, b: mx.array) -> bool:
    return bool((mx.abs(a - b).max() <= AGREES * mx.abs(b).max()).item())
