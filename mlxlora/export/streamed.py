"""A model run once, block by block: weights are read when they are needed and let go after.

What was just written must not need the memory to hold it before it can be measured: the
unquantized form of a base that fits a machine often does not. So every block evaluates its
answer and forgets its weights, and logits are computed at the asked places alone. Blocks and
head are found by where they stand; no architecture is named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.lora.layers import EMBEDDING, LINEAR, LowRank, weight_shape

Own = Callable[..., Any]  # a module's own method
Around = Callable[..., Any]  # (module, own, what it is called with...) -> the answer


def logits_at(
    open_model: Callable[[], nn.Module],
    inputs: mx.array,
    positions: mx.array,
    around: Mapping[str, Around] | None = None,
) -> mx.array:
    """Logits (n, V), float32, at these n of the B * T places of inputs (B, T).

    open_model gives the model with its weights not read yet; it is called a second time if the
    model turns out to run a block more than once, and then keeps its weights. around: by path,
    who answers for a module's call.
    """
    try:
        return _logits(open_model(), inputs, positions, around or {}, letting_go=True)
    except _NeededAgain:
        return _logits(open_model(), inputs, positions, around or {}, letting_go=False)


@contextmanager
def answering(
    modules: Iterable[tuple[nn.Module, Around]], method: str = "__call__"
) -> Iterator[None]:
    """Inside, around(module, own, ...) answers for the method of each of these modules."""
    kinds = []
    for module, around in modules:
        kinds.append((module, type(module)))
        module.__class__ = _answered(type(module), method, around)
    try:
        yield
    finally:
        for module, kind in reversed(kinds):
            module.__class__ = kind


def forget(module: nn.Module) -> None:
    """Let go of every array in a module, which is of no use afterwards."""
    for part in module.modules():
        for name, value in part.items():
            if isinstance(value, mx.array):
                part[name] = mx.array(0)
    mx.clear_cache()


class _NeededAgain(Exception):
    """A block that has let go of its weights is called once more."""


def _logits(
    model: nn.Module,
    inputs: mx.array,
    positions: mx.array,
    around: Mapping[str, Around],
    *,
    letting_go: bool,
) -> mx.array:
    modules = dict(model.named_modules())
    blocks = list({id(block): block for block in model.layers}.values())
    inside = {id(module) for block in blocks for module in block.modules()}
    products = (*LINEAR, *EMBEDDING, LowRank)
    outside = [m for m in modules.values() if id(m) not in inside and isinstance(m, products)]
    vocabulary = max(map(_answers, outside))
    heads = [m for m in outside if _answers(m) == vocabulary and not _embeds(m)]
    tied = [m for m in outside if _answers(m) == vocabulary and _embeds(m)]
    done: set[int] = set()
    chosen = False

    def block_(block: nn.Module, own: Own, *given: Any, **options: Any) -> Any:
        if letting_go and id(block) in done:
            raise _NeededAgain
        answer = own(*given, **options)
        mx.eval([array for _, array in tree_flatten(answer)])
        done.add(id(block))
        if letting_go:
            forget(block)
        return answer

    def head(module: nn.Module, own: Own, x: mx.array, *rest: Any) -> Any:
        nonlocal chosen  # once, though a low-rank head and the base in it both come by here
        if len(done) == len(blocks) and x.shape[:2] == inputs.shape and not chosen:
            chosen = True
            x = x.reshape(-1, x.shape[-1])[positions][None]
        return own(x, *rest)

    called = [(modules[path], one) for path, one in around.items()]
    called += [(block, block_) for block in blocks] + [(module, head) for module in heads]
    with answering(called), answering([(module, head) for module in tied], "as_linear"):
        logits = model(inputs)
    if not chosen:
        logits = logits.reshape(-1, logits.shape[-1])[positions]
    logits = logits.reshape(len(positions), -1).astype(mx.float32)
    mx.eval(logits)
    forget(model)
    return logits


def _answers(module: nn.Module) -> int:
    """The numbers that a product has for each of its inputs."""
    return weight_shape(module.base if isinstance(module, LowRank) else module)[-2]


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, EMBEDDING) or isinstance(getattr(module, "base", None), EMBEDDING)


def _answered(kind: type[nn.Module], method: str, around: Around) -> type[nn.Module]:
    """The class, for one method of which around answers."""
    own = getattr(kind, method)

    def call(self: nn.Module, *given: Any, **options: Any) -> Any:
        return around(self, lambda *a, **o: own(self, *a, **o), *given, **options)

    return type(kind.__name__, (kind,), {method: call, "__module__": kind.__module__})
