"""The methods: how a low-rank layer is scaled, what it starts from, what of it is trained.

A method is one line in METHODS. All of them end as the same value: factors with one scale,
and for DoRA a magnitude (layers.py), so what follows training need not know them.

rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024, arXiv:2402.09353. PiSSA:
Meng et al. 2024, arXiv:2404.02948. OLoRA: Büyükakyüz 2024, arXiv:2406.01775. LoRA-FA: Zhang et
al. 2023, arXiv:2308.03303. (LoRA+, a rate of its own for B, is train.lora_plus_ratio.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxlora.errors import ConfigError
from mlxlora.lora.layers import LowRank, weight_shape
from mlxlora.quantized import widen

# (weight (..., out, in) float32, rank, scale, key) -> left (..., out, r), right (..., r, in)
Start = Callable[[mx.array, int, float, mx.array], tuple[mx.array, mx.array]]

OVERSAMPLED = 16  # directions more than wanted, and
POWER_STEPS = 6  # passes over the weight: what a randomized SVD needs to be close


def classic(alpha: float, rank: int) -> float:
    return alpha / rank


def rank_stabilized(alpha: float, rank: int) -> float:
    """Under which updates keep their size at any rank."""
    return alpha / math.sqrt(rank)


def principal(
    weight: mx.array, rank: int, scale: float, key: mx.array
) -> tuple[mx.array, mx.array]:
    """The weight's strongest directions: scale * left @ right is the best of this rank.

    left and right share the singular values.

    By subspace iteration from random directions (Halko et al. 2011, arXiv:0909.4061, algorithm
    4.4), which is exact once they span the weight.
    """
    cpu = mx.cpu  # MLX factorizes there only
    tall = weight.shape[-2] >= weight.shape[-1]
    matrix = weight if tall else weight.swapaxes(-1, -2)
    wanted = min(rank + OVERSAMPLED, matrix.shape[-1])
    basis = mx.random.normal((*matrix.shape[:-2], matrix.shape[-1], wanted), key=key)
    for _ in range(POWER_STEPS):
        basis = mx.linalg.qr(matrix @ basis, stream=cpu)[0]
        basis = mx.linalg.qr(matrix.swapaxes(-1, -2) @ basis, stream=cpu)[0]
        mx.eval(basis)
    # matrix = (matrix basis) basis' for what the basis spans; the small factor's SVD does.
    q, small = mx.linalg.qr(matrix @ basis, stream=cpu)
    u, values, v = mx.linalg.svd(small, stream=cpu)
    root = mx.sqrt(values[..., :rank] / scale)
    left = (q @ u[..., :rank]) * root[..., None, :]
    right = root[..., :, None] * (v[..., :rank, :] @ basis.swapaxes(-1, -2))
    return (left, right) if tall else (right.swapaxes(-1, -2), left.swapaxes(-1, -2))


def orthonormal(
    weight: mx.array, rank: int, scale: float, key: mx.array
) -> tuple[mx.array, mx.array]:
    """The first columns of Q and rows of R of the weight's QR decomposition.

    They depend on the weight's first columns alone.
    """
    q = mx.linalg.qr(weight[..., :rank], stream=mx.cpu)[0]
    return q, q.swapaxes(-1, -2) @ weight


@dataclass(frozen=True)
class Method:
    scale: Callable[[float, int], float] = classic  # of alpha and rank
    start: Start | None = None  # of the factors; None: random A, and B zero
    magnitude: bool = False  # DoRA's
    trained: tuple[str, ...] = ("lora_a", "lora_b", "m")


# lora.method -> what it means; "full" has no low-rank layers.
METHODS = {
    "lora": Method(),
    "rslora": Method(scale=rank_stabilized),
    "dora": Method(magnitude=True),
    "pissa": Method(start=principal),
    "olora": Method(start=orthonormal),
    "lora-fa": Method(trained=("lora_b",)),
}


def begin(layer: LowRank, method: Method, path: str, key: mx.array, known: bool = True) -> None:
    """Give a fresh layer its tensors and choose which of them are trained.

    known: False if the base's weights are not to be read (only sizes count). Raises ConfigError
    for a rank that the weight does not have.
    """
    layer.init(key)
    if method.start is not None:
        *_, out, width = weight_shape(layer.base)
        if layer.rank > min(out, width):
            raise ConfigError(
                f"lora.rank = {layer.rank}: {path} is {out} x {width}, so this method can take "
                f"at most {min(out, width)} directions of it"
            )
        left, right = layer.sides(layer.lora_a, layer.lora_b)
        if known:
            left, right = method.start(widen(layer.base), layer.rank, layer.scale, key)
        layer.start_from(left, right)
    if method.magnitude:
        layer.add_magnitude(known)
    layer.freeze()
    layer.unfreeze(keys=list(method.trained), recurse=False)
    if known:  # layer by layer: what a method makes of a weight is as large as the weight
        mx.eval([array for array in layer.values() if isinstance(array, mx.array)])
