"""Is what was written what was trained? A written model against base + adapter, on rows.

Per token: the Kullback-Leibler divergence KL(p || q) = sum_v p(v) log(p(v) / q(v)), in nats, of
the written model's distribution q from that of base + adapter, p; how often both put the same
token first; and the losses of both and of the bare base, which say how much of what training
gained is kept. Per layer: the change that was written, W' - W, against the change that was
trained, D, as weights and as what they do to the layer's own inputs X. Rounding a layer errs by
||W' - W - D||, and 1 in units of ||D|| means that it erased as much as was learned.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.base import open_frozen
from mlxlora.export.merged import Layer, Merged
from mlxlora.export.streamed import Own, forget, logits_at
from mlxlora.export.trial import Trial
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach
from mlxlora.lora.layers import EMBEDDING
from mlxlora.quantized import widen

ENTRIES = 1 << 27  # logits of one model that are held: places x vocabulary, 512 MB
AT_ONCE = 64  # places whose distributions are compared at once
SAMPLE = 256  # places at which a layer's outputs are compared
# A limit on KL, unless the user sets one: nearer to the trained model than to the bare base.
LOWEST_LIMIT, HIGHEST_LIMIT = 0.01, 0.1
GAINED = 0.01  # a smaller gain in loss is none

Open = Callable[[], nn.Module]
Progress = Callable[[str, int, int], None]  # (what, done, of)
STEPS = 4


@dataclass(frozen=True)
class Change:
    """How one layer's written change stands to its trained one."""

    layer: str
    weight_cosine: float
    weight_error: float  # relative to the trained change
    output_cosine: float | None = None  # None: the layer was not called on the rows
    output_error: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """Losses are means per token; KL in nats per token, from base + adapter."""

    rows: str  # what it was measured on
    own_rows: bool  # they are of the task that was trained
    tokens: int
    loss_base: float
    loss_adapter: float
    loss_written: float
    kl_base: float  # of the bare base: how far training moved the model
    kl: float  # of the written model
    agreement_base: float
    agreement: float  # share of tokens for which both models' first choice is the same
    layers: tuple[Change, ...] = ()
    adapter: str = ""  # hash of the weights of the adapter that was meant, if it is known

    @property
    def kept(self) -> float | None:
        """The share of the gain in loss that is left; None where there was none to keep."""
        gain = self.loss_base - self.loss_adapter
        return (self.loss_base - self.loss_written) / gain if gain > GAINED else None

    @property
    def limit(self) -> float:
        """KL that a written model may have by default.

        Half of what sets base and base + adapter apart, but no less than rounding costs anyway
        and no more than goes unnoticed.
        """
        return min(max(self.kl_base / 2, LOWEST_LIMIT), HIGHEST_LIMIT)

    def worst(self, count: int) -> list[Change]:
        """The layers whose change was written worst."""
        return sorted(self.layers, key=lambda one: one.output_error or 0.0, reverse=True)[:count]

    def to_dict(self) -> dict[str, Any]:
        """fidelity.json."""
        return {**asdict(self), "kept": self.kept, "layers": [asdict(one) for one in self.layers]}


def measure(
    source: Path,
    adapter: Adapter | None,
    written: Open,
    rows: Trial,
    *,
    progress: Progress = lambda what, done, of: None,
    trust_remote_code: bool = False,
) -> Fidelity:
    """Compare the model that written opens with the base in source and its adapter.

    Three streamed forward passes and one walk over the weights. written opens the model with
    its weights not read yet, each time anew.
    """

    def base() -> nn.Module:
        return open_frozen(source, trust_remote_code)[0]

    def trained() -> nn.Module:
        model = base()
        if adapter is not None:
            attach(model, adapter)
        return model

    progress("measuring what was written", 0, STEPS)
    positions, targets = _places(rows, base())
    outputs = _Outputs(written(), adapter, rows.inputs, positions)
    own = _log_softmax(logits_at(trained, rows.inputs, positions, outputs.around))
    del outputs.written
    progress("measuring what was written", 1, STEPS)
    bare = own if adapter is None else _log_softmax(logits_at(base, rows.inputs, positions))
    kl_base, agreement_base = _apart(own, bare)
    loss_base = _loss(bare, targets)
    del bare
    progress("measuring what was written", 2, STEPS)
    other = _log_softmax(logits_at(written, rows.inputs, positions))
    kl, agreement = _apart(own, other)
    progress("measuring what was written", 3, STEPS)
    merged = Merged(source, adapter, trust_remote_code=trust_remote_code)
    return Fidelity(
        rows=rows.source,
        own_rows=rows.own,
        tokens=len(targets),
        loss_base=loss_base,
        loss_adapter=_loss(own, targets),
        loss_written=_loss(other, targets),
        kl_base=kl_base,
        kl=kl,
        agreement_base=agreement_base,
        agreement=agreement,
        layers=tuple(
            Change(path, *figures, *outputs.found.get(path, (None, None)))
            for path, figures in _in_weights(merged, written())
        ),
        adapter=adapter.provenance.get("weights_sha256") or "" if adapter is not None else "",
    )


def _places(rows: Trial, model: nn.Module) -> tuple[mx.array, mx.array]:
    """(positions, targets) of supervised tokens: as many as may be held, evenly spread."""
    vocabulary = max(m.weight.shape[0] for m in model.modules() if isinstance(m, EMBEDDING))
    step = math.ceil(len(rows.batch.targets) * vocabulary / ENTRIES)
    return mx.array(rows.batch.positions[::step]), mx.array(rows.batch.targets[::step])


def _log_softmax(logits: mx.array) -> mx.array:
    """In place of the logits (n, V): theirs are let go."""
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def _loss(logp: mx.array, targets: mx.array) -> float:
    return -_number(mx.take_along_axis(logp, targets[:, None], axis=-1).mean())


def _apart(p: mx.array, q: mx.array) -> tuple[float, float]:
    """(mean KL(p || q), share of places with the same most likely token), of logs (n, V)."""
    divergence, same = 0.0, 0.0
    for start in range(0, len(p), AT_ONCE):
        one, other = p[start : start + AT_ONCE], q[start : start + AT_ONCE]
        divergence += _number((mx.exp(one) * (one - other)).sum())
        same += _number((one.argmax(axis=-1) == other.argmax(axis=-1)).sum())
    return max(divergence, 0.0) / len(p), same / len(p)  # rounding can make it -1e-9


def _in_weights(merged: Merged, written: nn.Module) -> Iterator[tuple[str, tuple[float, float]]]:
    """(path, (cosine, relative error)) of the change of every touched layer's weight."""
    modules = dict(written.named_modules())
    for piece in merged.walk():
        if isinstance(piece, Layer) and piece.touched:
            module = modules[piece.path]
            change = widen(module) - piece.before
            yield piece.path, _compared(piece.weight - piece.before, change)
            forget(module)


class _Outputs:
    """The change of every layer's answers, seen in passing while base + adapter compute."""

    def __init__(
        self, written: nn.Module, adapter: Adapter | None, inputs: mx.array, positions: mx.array
    ) -> None:
        self.written = dict(written.named_modules())
        self._shape = inputs.shape
        self._sample = positions[:: math.ceil(len(positions) / SAMPLE)]
        self.around = {p: partial(self._see, p) for p in (adapter.modules if adapter else ())}
        self.found: dict[str, tuple[float, float]] = {}

    def _see(
        self, path: str, layer: nn.Module, own: Own, x: mx.array, *rest: Any, **options: Any
    ) -> Any:
        """Answer for a low-rank layer, and compare on a sample of what it is given first."""
        if path in self.found:  # a model that runs it again: what was written is let go
            return own(x, *rest, **options)
        given: tuple[Any, ...] = (x, *rest)
        if not rest and x.ndim == 3 and x.shape[:2] == self._shape:  # no router's choice goes along
            given = (x.reshape(-1, x.shape[-1])[self._sample],)
        before, trained, written = (
            _joined(answers(*given, **options)) for answers in (layer.base, own, self.written[path])
        )
        self.found[path] = _compared(trained - before, written - before)
        forget(self.written[path])
        return own(x, *rest, **options)


def _joined(answer: mx.array | list[mx.array]) -> mx.array:
    """Several projections in one layer answer with an array for each."""
    return answer if isinstance(answer, mx.array) else mx.concatenate(answer, axis=-1)


def _compared(trained: mx.array, change: mx.array) -> tuple[float, float]:
    """(cosine, error relative to the trained change) of two arrays of one shape."""
    trained, change = trained.astype(mx.float32), change.astype(mx.float32)
    length = mx.maximum(mx.linalg.norm(trained), 1e-30)
    error = mx.linalg.norm(change - trained) / length
    cosine = (trained * change).sum() / mx.maximum(length * mx.linalg.norm(change), 1e-30)
    return _number(cosine), _number(error)


def _number(array: mx.array) -> float:
    return float(array.item())  # type: ignore[arg-type]
