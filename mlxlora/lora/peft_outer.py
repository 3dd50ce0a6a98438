"""The embedding and the head of a PEFT file: weights trained whole, trained tokens, ties.

Where head and embedding are one weight, PEFT adapts each apart unless told otherwise, and here
what is done to one is done to the other: what would not be the same is a fault.
"""

import mlx.core as mx

from mlxlora.lora.layers import weight_shape
from mlxlora.lora.peft_place import Placed, is_head
from mlxlora.lora.peft_tensors import Tensors
from mlxlora.lora.updates import Update
from mlxlora.quantized import QUANTIZED, widen

# How far a copy of the base's own rows may be from them, relative to their length: by rounding
# to half precision, or to few bits.
SAME, SAME_QUANTIZED = 0.02, 0.4


def place_outer(placed: Placed, tensors: Tensors) -> None:
    """Give weights that are no factors their place; the factors must have theirs."""
    for name, array in tensors.whole.items():
        _place_whole(placed, name, array)
    for name, array in tensors.tokens.items():
        _place_tokens(placed, name, array)
    for name, array in tensors.bases.items():
        _place_beneath(placed, name, array)
    if not placed.faults and placed.names.tied:
        _check_tied(placed)


def _place_whole(placed: Placed, name: str, array: mx.array) -> None:
    module, _, leaf = name.rpartition(".")
    path = placed.names.here(module, array.shape)
    if path is None and placed.is_missing_head(module):
        placed.heads[name] = array
    elif path is None or not _is_outer(placed, path):
        placed.faults.append(
            f"{name}: whole weights can be imported of the embedding and the head alone"
        )
    elif placed.names.rewritten(path):
        placed.faults.append(f"{name}: mlx-lm has other numbers in this weight than transformers")
    elif path in placed.updates:
        placed.faults.append(f"{name}: {path} has low-rank factors as well")
    else:
        base = placed.names.modules[path]
        bias = base["bias"].shape if "bias" in base else ()
        shape = weight_shape(base) if leaf == "weight" else bias
        if array.shape != shape:
            placed.faults.append(f"{name}: adapter {array.shape}, base {shape or 'has none'}")
        else:
            placed.whole[f"{path}.{leaf}"] = array


def _place_tokens(placed: Placed, name: str, rows: mx.array) -> None:
    """Trained rows of an embedding: the embedding whole, with these rows."""
    path = placed.names.here(name)
    chosen = (t for end, t in placed.config.tokens.items() if not end or name.endswith(end))
    tokens = next(chosen, ())
    if path is None or not placed.is_embedding(path) or path in placed.updates:
        placed.faults.append(f"{name}: trained tokens can be imported of a bare embedding alone")
        return
    weight = widen(placed.names.modules[path])
    if rows.shape != (len(tokens), weight.shape[1]) or max(tokens, default=0) >= len(weight):
        placed.faults.append(
            f"{name}: {rows.shape} for {len(tokens)} trainable_token_indices, base {weight.shape}"
        )
        return
    weight[mx.array(tokens)] = rows
    placed.whole[f"{path}.weight"] = weight


def _place_beneath(placed: Placed, name: str, saved: mx.array) -> None:
    """A copy of the weight beneath low-rank factors, which PEFT saves of an embedding.

    If some rows are not the base's (those of new tokens), it and the factors are a whole weight.
    """
    path = placed.names.here(name, saved.shape)
    if path is None or not _is_outer(placed, path) or placed.names.rewritten(path):
        if not placed.is_missing_head(name):
            placed.faults.append(f"{name}.base_layer.weight: of neither the embedding nor the head")
        return
    module = placed.names.modules[path]
    if saved.shape != weight_shape(module):
        placed.faults.append(
            f"{name}.base_layer.weight: adapter {saved.shape}, base {weight_shape(module)}"
        )
        return
    own = widen(module)
    near = SAME_QUANTIZED if isinstance(module, QUANTIZED) else SAME
    apart = mx.linalg.norm(saved - own, axis=-1) > near * mx.linalg.norm(own, axis=-1) + 1e-6
    update = placed.updates.get(path)
    if not mx.any(apart).item():
        return
    if update is not None and update.m is not None:
        placed.faults.append(f"{name}.base_layer.weight: not the base's, and under DoRA")
    elif update is not None:
        saved = saved + update.scale * (update.left @ update.right)
        del placed.updates[path]
    placed.whole[f"{path}.weight"] = saved


def _is_outer(placed: Placed, path: str) -> bool:
    return path == placed.names.embedding or is_head(path)


def _check_tied(placed: Placed) -> None:
    path = placed.names.embedding
    own = placed.updates.get(path or "")
    weight = placed.whole.get(f"{path}.weight")
    for name, head in placed.heads.items():
        if isinstance(head, Update):
            alike = own is not None and own.equals(head)
        else:
            alike = weight is not None and bool(mx.array_equal(weight, head))
        if not alike:
            placed.faults.append(
                f"{name}: in this base the head is the embedding, so it cannot be changed in "
                "another way than the embedding is"
            )
    apart = own is not None or (weight is not None and _is_saved(placed, path or ""))
    if apart and not placed.heads and not placed.config.tied:
        placed.faults.append(
            f"{path}: in this base the head is the embedding, and PEFT (without "
            "ensure_weight_tying) changed the embedding alone, which cannot be done here"
        )


def _is_saved(placed: Placed, path: str) -> bool:
    """Whether PEFT keeps a module at this path of its own (modules_to_save)."""
    return any(placed.names.here(w) == path or path.endswith(w) for w in placed.config.whole)
