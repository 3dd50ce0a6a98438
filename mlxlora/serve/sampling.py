"""Drawing the next token of every row of a batch at once, each by its own rules and seed.

A row's draw depends on its seed and how many tokens it has drawn, never on who else is in the
batch: the noise of token t is a function of (seed, t). Adding Gumbel noise to log-probabilities
and taking the largest draws from their distribution (Gumbel 1954; Maddison et al. 2014,
arXiv:1411.0030). Temperature comes first, then top_k, top_p and min_p, as in transformers and
vLLM; of candidates that are equally likely at the border, all stay.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxlora.serve.orders import Sampling
from mlxlora.serve.rows import Row, Rows

COLD = 1e-6  # a temperature below it is 0: float32 cannot hold what dividing by it gives

# (tokens so far (T,), logits (1, V)) -> logits (1, V), as mlx-lm's batch generator calls it
Processor = Callable[[mx.array, mx.array], mx.array]


class Sampler:
    """One sampler for all rows, so that mlx-lm calls it once for the whole batch."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._for: list[Row] = []
        self._rules = _Rules([])

    def __call__(self, logprobs: mx.array) -> mx.array:
        """logprobs (B, V), normalized -> tokens (B,)."""
        rows = self._rows.now
        if rows != self._for:
            self._for, self._rules = list(rows), _Rules([row.sampling for row in rows])
        if self._rules.greedy:
            return mx.argmax(logprobs, axis=-1)
        keys = mx.array([(row.seed, row.drawn) for row in rows], mx.uint32)
        for row in rows:
            row.drawn += 1
        return self._rules.draw(logprobs, keys)


class _Rules:
    """The sampling of several rows as arrays."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        cold = [one.temperature < COLD for one in samplings]
        self.greedy = all(cold)
        self._cold = mx.array(cold)
        self._heat = _column([max(one.temperature, COLD) for one in samplings])
        self._top_p = _column([one.top_p for one in samplings])
        self._min_p = _column([one.min_p for one in samplings])
        self._top_k = _column([one.top_k or 1 << 30 for one in samplings])
        self._cut = any(
            not greedy and (one.top_p < 1 or one.top_k or one.min_p)
            for one, greedy in zip(samplings, cold, strict=True)
        )

    def draw(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        heated = logprobs.astype(mx.float32) / self._heat
        if self._cut:
            heated = mx.where(heated < self._border(heated), -mx.inf, heated)
        noise = mx.vmap(lambda key: mx.random.gumbel((logprobs.shape[-1],), key=key))(keys)
        drawn = mx.argmax(heated + noise, axis=-1)
        return mx.where(self._cold, mx.argmax(logprobs, axis=-1), drawn)

    def _border(self, heated: mx.array) -> mx.array:
        """The least value that may be drawn, (B, 1)."""
        falling = -mx.sort(-heated, axis=-1)
        share = mx.softmax(falling, axis=-1)
        before = mx.cumsum(share, axis=-1, inclusive=False)
        kept = mx.arange(heated.shape[-1]) < self._top_k
        # top_p is of what top_k leaves
        left = (share * kept).sum(axis=-1, keepdims=True)
        kept &= before < self._top_p * left
        kept &= share >= self._min_p * share[:, :1]
        count = mx.maximum(kept.sum(axis=-1, keepdims=True), 1)
        return mx.take_along_axis(falling, count - 1, axis=-1)


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(list(values), mx.float32)[:, None] if values else mx.zeros((0, 1))


def processors(sampling: Sampling) -> list[Processor]:
    """What changes a row's logits before it is drawn from: its bias and penalties."""
    found: list[Processor] = []
    if sampling.bias:
        tokens, values = map(list, zip(*sampling.bias, strict=True))
        where, amount = mx.array(tokens), mx.array(values, mx.float32)
        found.append(lambda _, logits: logits.at[:, where].add(amount.astype(logits.dtype)))
    if sampling.repetition != 1:
        found.append(_Repetition(sampling.repetition))
    if sampling.presence or sampling.frequency:
        found.append(_Penalties(sampling.presence, sampling.frequency))
    return found


class _Penalties:
    """OpenAI's presence and frequency penalties, of what was generated."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._counts: mx.array | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._counts is None:  # the first time, all tokens are the prompt's
            self._counts = mx.zeros((logits.shape[-1],))
            return logits
        self._counts = self._counts.at[tokens[-1:]].add(1.0)
        penalty = self._frequency * self._counts + self._presence * (self._counts > 0)
        return logits - penalty.astype(logits.dtype)


class _Repetition:
    """Against tokens of the prompt and of what was generated."""

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty
        self._seen: mx.array | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._seen is None:
            self._seen = mx.zeros((logits.shape[-1],), mx.bool_)
            self._seen[tokens] = True
        else:
            self._seen[tokens[-1:]] = True
        changed = mx.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return mx.where(self._seen, changed, logits)
