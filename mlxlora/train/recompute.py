"""Block checkpointing: keep each block's input, compute the block again in the backward pass.

The memory of a step falls from every activation of every block to one block's at a time, for
one more forward pass (Chen et al. 2016, arXiv:1604.06174). mx.checkpoint gives gradients only
to explicit inputs, so a block's trained parameters and every array of real numbers it is
called with, or finds in an object it is called with, are inputs. Dropout draws from keys the
layers hold, so the second pass draws the same. Blocks below the lowest adapter have no gradient
and are left alone: nothing of them is stored anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxlora.train.packing import attention_by


@contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, the model's trained blocks (of every class) are checkpointed; undone at the end."""
    chosen = {id(block) for block in trained_blocks(model)}
    kinds = {type(block) for block in model.layers}
    own = {kind: kind.__dict__.get("__call__") for kind in kinds}  # None: inherited
    calls = {kind: _checkpointing(kind, chosen) for kind in kinds}
    try:
        for kind, call in calls.items():
            kind.__call__ = call  # type: ignore[method-assign]
        yield
    finally:
        for kind, plain in own.items():
            if plain is None:
                del kind.__call__
            else:
                kind.__call__ = plain  # type: ignore[method-assign]


def trained_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are differentiated: the lowest with something to train, and all above.

    All of them if something is trained outside the blocks, such as an embedding.
    """
    trained = [bool(tree_flatten(block.trainable_parameters())) for block in model.layers]
    inside = sum(len(tree_flatten(block.trainable_parameters())) for block in model.layers)
    if len(tree_flatten(model.trainable_parameters())) > inside:
        return list(model.layers)
    return list(model.layers[trained.index(True) :]) if any(trained) else []


def _checkpointing(kind: type, chosen: set[int]) -> Any:
    """A __call__ for this class of block that checkpoints the chosen ones."""
    plain = kind.__call__

    def call(block: nn.Module, *args: Any, **options: Any) -> Any:
        # A class may call another's through super(): only the block's own is checkpointed.
        if id(block) not in chosen or type(block) is not kind:
            return plain(block, *args, **options)
        return _recomputed(plain, block, args, options)

    return call


def _recomputed(plain: Any, block: nn.Module, args: tuple[Any, ...], options: Any) -> Any:
    leaves = [leaf for _, leaf in tree_flatten([args, options])]
    arrays = [leaf for leaf in leaves if _is_real(leaf)]
    # Some blocks leave arrays for others in an object they are given: inputs and outputs too.
    objects = list({id(leaf): leaf for leaf in leaves if hasattr(leaf, "__dict__")}.values())
    states = [dict(vars(one)) for one in objects]
    attention = mx.fast.scaled_dot_product_attention
    left: list[dict[str, Any]] = []

    def inner(
        parameters: dict[str, Any], held: list[dict[str, mx.array]], *given: mx.array
    ) -> tuple[Any, list[dict[str, mx.array]]]:
        block.update(parameters)
        fresh = iter(given)
        again, named = tree_map(
            lambda leaf: next(fresh) if _is_real(leaf) else leaf, [args, options]
        )
        before = [dict(vars(one)) for one in objects]
        _set(objects, states, held)
        with attention_by(attention):  # the backward pass comes when the caller's is gone
            answer = plain(block, *again, **named)
        left[:] = [dict(vars(one)) for one in objects]
        _set(objects, before)
        return answer, _real_parts(left)

    parameters = block.trainable_parameters()
    outputs, held = mx.checkpoint(inner)(parameters, _real_parts(states), *arrays)
    block.update(parameters)  # else the block keeps arrays of the differentiation
    _set(objects, left, held)
    return outputs


def _set(objects: list[Any], *parts: list[dict[str, Any]]) -> None:
    """Give each object the attributes of its dict, and of a second one over them."""
    for one, *own in zip(objects, *parts, strict=True):
        vars(one).clear()
        for attributes in own:
            vars(one).update(attributes)


def _real_parts(states: list[dict[str, Any]]) -> list[dict[str, mx.array]]:
    return [{name: v for name, v in state.items() if _is_real(v)} for state in states]


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)
