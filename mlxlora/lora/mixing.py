"""How adapters are mixed, module by module: a method is one function and one line in METHODS.

"cat" is exactly the weighted sum of what the adapters do to the weights, "svd" the best that a
rank can hold of it. The others mix A with A and B with B, as if adapters lay in one space: what
comes out has products of one's B and another's A in it. Scales, roots and signs of the weights
are those of PEFT (add_weighted_adapter, 0.21), so that the results are, too.

TIES: Yadav et al. 2023, arXiv:2306.01708. DARE: Yu et al. 2023, arXiv:2311.03099.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx


@dataclass(frozen=True)
class Share:
    """What one adapter adds to a module's weight (..., out, in): weight * left @ right."""

    left: mx.array  # (..., out, r) float32: B
    right: mx.array  # (..., r, in) float32: A
    weight: float  # the one asked for, times the adapter's scale
    key: mx.array  # for what is drawn


Factors = tuple[mx.array, mx.array]  # left, right; what is added is left @ right
Combine = Callable[[Sequence[Share], int, float], Factors]  # of the shares, the rank, the density


def linear(shares: Sequence[Share], rank: int, density: float) -> Factors:
    """A the sum of the A, B of the B, each weighted with the root of its share's weight."""
    return _sum(*_lefts(shares)), _sum(*_rights(shares))


def cat(shares: Sequence[Share], rank: int, density: float) -> Factors:
    """The factors one after another."""
    left = mx.concatenate([share.left for share in shares], axis=-1)
    return left, mx.concatenate([share.right * share.weight for share in shares], axis=-2)


def svd(shares: Sequence[Share], rank: int, density: float) -> Factors:
    """The best approximation of the sum by this rank."""
    return best(*cat(shares, rank, density), rank)


def best(left: mx.array, right: mx.array, rank: int) -> Factors:
    """The best approximation of left @ right by a rank, from the factors alone.

    L R = Q1 (R1 R2') Q2', whose singular vectors are those of the small product, turned.
    """
    (q1, r1), (q2, r2) = _triangular(left, right)
    u, values, v = mx.linalg.svd(r1 @ r2.swapaxes(-1, -2), stream=mx.cpu)
    kept = min(rank, values.shape[-1])
    left = q1 @ (u[..., :kept] * values[..., None, :kept])
    return left, v[..., :kept, :] @ q2.swapaxes(-1, -2)


def ties(shares: Sequence[Share], rank: int, density: float) -> Factors:
    """linear() of each one's largest numbers, averaged over those with the elected sign."""

    def agreed(tensors: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
        largest = mx.stack([_largest(tensor, density) for tensor in tensors])
        elected = mx.where(largest.sum(0) >= 0, 1, -1)
        agree = mx.sign(largest) == elected
        return _sum(list(largest * agree), weights) / mx.maximum(agree.sum(0), 1)

    return agreed(*_lefts(shares)), agreed(*_rights(shares))


def dare(shares: Sequence[Share], rank: int, density: float) -> Factors:
    """linear() of numbers of which some are dropped at random and the rest made larger."""
    keys = [mx.random.split(share.key) for share in shares]

    def thinned(tensors: Sequence[mx.array], side: int) -> list[mx.array]:
        pairs = zip(tensors, keys, strict=True)
        return [at_random(tensor, density, key[side]) for tensor, key in pairs]

    (lefts, left_weights), (rights, right_weights) = _lefts(shares), _rights(shares)
    return _sum(thinned(lefts, 0), left_weights), _sum(thinned(rights, 1), right_weights)


@dataclass(frozen=True)
class Method:
    combine: Combine
    rank: Callable[[Sequence[int]], int] = max  # of the result, from those of the adapters
    any_ranks: bool = False
    takes: tuple[str, ...] = ()  # which of density and seed can be chosen
    density: float = 1.0  # unless chosen


# Densities: the share that TIES's paper keeps by default. DARE drops from both factors, which
# adds noise of sqrt(1 / density^2 - 1) times the result: 0.48 at 0.9, but 4.9 at 0.2.
METHODS = {
    "linear": Method(linear),
    "cat": Method(cat, rank=sum, any_ranks=True),
    "svd": Method(svd, any_ranks=True),
    "ties": Method(ties, takes=("density",), density=0.2),
    "dare": Method(dare, takes=("density", "seed"), density=0.9),
}


@dataclass(frozen=True)
class Mixed:
    """A module of the result, and how far it is from the weighted sum, in Frobenius's norm."""

    left: mx.array  # (..., out, rank)
    right: mx.array  # (..., rank, in)
    norm: float  # of the weighted sum
    distance: float  # from it; both are inf or NaN where numbers grow beyond float32


def mix(method: Method, shares: Sequence[Share], rank: int, density: float) -> Mixed:
    """One module of the adapters that have it; ranks that are not needed are zeros."""
    exact_left, exact_right = cat(shares, rank, density)
    norm = _norm(exact_left, exact_right)
    if not math.isfinite(norm):  # nothing to decompose
        return Mixed(exact_left, exact_right, norm, norm)
    left, right = method.combine(_trimmed(shares), rank, density)
    if left.shape[-1] > rank:
        left, right = best(left, right, rank)
    distance = _norm(
        mx.concatenate([left, -exact_left], axis=-1), mx.concatenate([right, exact_right], axis=-2)
    )
    outer, longer = [(0, 0)] * (left.ndim - 2), (0, rank - left.shape[-1])
    left, right = mx.pad(left, [*outer, (0, 0), longer]), mx.pad(right, [*outer, longer, (0, 0)])
    mx.eval(left, right)
    return Mixed(left, right, norm, distance)


def _trimmed(shares: Sequence[Share]) -> list[Share]:
    """Without the directions at the end that are zero in all of them: an adapter's padding."""
    used = max(_used(share) for share in shares)
    return [replace(s, left=s.left[..., :used], right=s.right[..., :used, :]) for s in shares]


def _used(share: Share) -> int:
    """How many directions there are up to the last that is not zero; at least 1."""
    both = mx.concatenate([share.left, share.right.swapaxes(-1, -2)], axis=-2)
    largest = mx.abs(both).flatten(0, -2).max(0)
    return max(
        (n for n, size in enumerate(cast(list[float], largest.tolist()), 1) if size), default=1
    )


def _lefts(shares: Sequence[Share]) -> tuple[list[mx.array], list[float]]:
    """The left factors, and the roots of the weights."""
    return [share.left for share in shares], [math.sqrt(abs(share.weight)) for share in shares]


def _rights(shares: Sequence[Share]) -> tuple[list[mx.array], list[float]]:
    """The right factors, and the roots of the weights with their signs."""
    roots = [math.copysign(math.sqrt(abs(share.weight)), share.weight) for share in shares]
    return [share.right for share in shares], roots


def _sum(tensors: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    terms = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    return sum(terms[1:], start=terms[0])


def _largest(tensor: mx.array, density: float) -> mx.array:
    """Zeros instead of all but this share of each matrix's numbers, the largest in size."""
    sizes = mx.abs(tensor)
    kept = int(density * tensor.shape[-1] * tensor.shape[-2])
    if not kept:
        return mx.zeros_like(tensor)
    least = mx.sort(sizes.flatten(-2), axis=-1)[..., -kept, None, None]
    return mx.where(sizes >= least, tensor, 0)


def at_random(tensor: mx.array, density: float, key: mx.array) -> mx.array:
    """Zeros instead of all but this share of the numbers, and what stays divided by it."""
    return tensor * mx.random.bernoulli(density, tensor.shape, key=key) / density


def _triangular(left: mx.array, right: mx.array) -> tuple[Factors, Factors]:
    """(q1, r1), (q2, r2) with left @ right = q1 (r1 r2') q2', the q orthonormal."""
    q1, r1 = mx.linalg.qr(left, stream=mx.cpu)  # MLX factorizes there only
    q2, r2 = mx.linalg.qr(right.swapaxes(-1, -2), stream=mx.cpu)
    return (q1, r1), (q2, r2)


def _norm(left: mx.array, right: mx.array) -> float:
    """Frobenius's, of left @ right, without that product."""
    (_, r1), (_, r2) = _triangular(left, right)
    return float(mx.linalg.norm(r1 @ r2.swapaxes(-1, -2)))
