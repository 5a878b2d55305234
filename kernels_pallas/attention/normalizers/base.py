"""How a row of logits becomes weights on values: one small object per normalizer, used by every implementation.

    o_i = sum_j W_ij v_j,   W_i = a normalizer of the logits s_i that row i sees

An object works on tiles, R rows against C keys, as pure functions of arrays; what differs between machines is which
tiles are visited and where the sums are kept:

    row = normalizer.start(zero, known, sink)                      what a row keeps: a tuple of [R, 1]
    row, keep, weights = normalizer.add(row, s, seen, keys)        for every tile of keys; then, for each of the weights,
    sums[n] = keep * sums[n] + weights[n] @ v                 `normalizer.sums` sums [R, V] (no product where keep is None)
    row, sums = normalizer.merge(row, sums)                        where the keys were split: parts, stacked on a first axis
    outputs, saved = normalizer.finish(row, sums)                  outputs[0] is o; saved, a tuple of [R, 1], is for backward
    deltas = [sum(do * outputs[n]) for n in normalizer.deltas]     [R, 1] each; no other output has to be kept
    weights, ds = normalizer.gradient(s, seen, keys, dp, deltas, saved)    dp = do v^T;  dv += weights^T do;  dq, dk from ds

`seen` is the mask of the tile, None if every key is seen; `keys` [1, C] are the keys' positions, for normalizers that single
out one key. `gradient` works element by element: it takes tiles turned over too, [C, R] with [1, R] and keys [C, 1].
`zero` is zeros [R, 1]; everything has its dtype, float32 or float64. Reductions keep their axis; no gathers.

Normalizers of this file need one walk over the keys. Those of `normalizers/multipass.py` learn something of a row first
(`prepare`). A row that sees nothing ends as zeros, with zero gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

Row = tuple[Array, ...]
# walk(start, add): a row after every tile, from `start` (a tuple of [R, 1]) by add(row, s, seen, keys) -> row.
Walk = Callable[[Row, Callable[..., Row]], Row]


class Added(NamedTuple):
    """What a tile does to a row: its new statistics, what its sums are multiplied by, and the tile's weights."""

    row: Row
    keep: Array | None
    weights: tuple[Array, ...]


@dataclass(frozen=True)
class Normalizer:
    """The contract, and what most normalizers have in common. Another one is a frozen dataclass: it is a static argument."""

    sums: ClassVar[int] = 1  # sums of weighted values that a row keeps
    deltas: ClassVar[tuple[int, ...]] = (
        0,
    )  # the outputs whose product with do the backward pass needs
    walks: ClassVar[int] = 1  # over the keys, forward; more need `prepare`
    takes_sinks: ClassVar[bool] = False

    def for_length(self, length: int) -> Self:
        """The normalizer with what depends on the number of keys filled in."""
        return self

    def prepare(self, walk: Walk, zero: Array) -> Row:
        """What must be known of a row before it is weighed."""
        return ()

    def start(self, zero: Array, known: Row = (), sink: Array | None = None) -> Row:
        return ()

    def add(self, row: Row, s: Array, seen: Array | None, keys: Array) -> Added:
        raise NotImplementedError

    def merge(self, row: Row, sums: Sequence[Array]) -> tuple[Row, list[Array]]:
        """Rows of parts of the keys, [N, R, 1] and sums [N, R, V], as those of all: for caches that are split."""
        return (), [jnp.sum(x, axis=0) for x in sums]

    def finish(self, row: Row, sums: Sequence[Array]) -> tuple[tuple[Array, ...], Row]:
        return tuple(sums), ()

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        raise NotImplementedError


@dataclass(frozen=True)
class Softmax(Normalizer):
    """exp(s) / sum exp(s), its maximum and sum kept online (arXiv 1805.02867).

    With a learned sink b per head exp(b) joins the sum (gpt-oss; b = 0 is "softmax plus one").
    """

    takes_sinks: ClassVar[bool] = True

    def start(self, zero, known=(), sink=None):
        # A sink is a key without a value: it opens the row as its maximum, with weight 1. -inf is no sink.
        if sink is None:
            return zero - jnp.inf, zero
        return sink, (sink > -jnp.inf).astype(zero.dtype)

    def add(self, row, s, seen, keys):
        before, total = row
        s = masked(s, seen)
        m = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
        shift = finite(m)
        p, keep = jnp.exp(s - shift), jnp.exp(before - shift)
        return Added((m, keep * total + jnp.sum(p, axis=-1, keepdims=True)), keep, (p,))

    def merge(self, row, sums):
        m, total, *sums = at_one_maximum(*row, *sums)
        return (m, total), sums

    def finish(self, row, sums):
        m, total = row
        return (sums[0] * inverse(total),), (m + jnp.log(total),)

    def gradient(self, s, seen, keys, dp, deltas, saved):
        p = jnp.exp(masked(s, seen) - finite(saved[0]))
        return p, p * (dp - deltas[0])

    def sink_gradient(self, sink: Array, deltas: Sequence[Array], saved: Row) -> Array:
        """[R, 1]: a sink's value is 0, and so is its dp."""
        return -jnp.exp(sink - finite(saved[0])) * deltas[0]


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """sigmoid(s - log n) (arXiv 2409.04431). n: a constant, as its authors advise; the number of keys if None."""

    length: int | None = None
    deltas: ClassVar[tuple[int, ...]] = ()

    def for_length(self, length):
        return self if self.length else replace(self, length=length)

    def add(self, row, s, seen, keys):
        return Added(row, None, (self._weights(s, seen),))

    def gradient(self, s, seen, keys, dp, deltas, saved):
        p = self._weights(s, seen)
        return p, p * (1 - p) * dp

    def _weights(self, s, seen):
        return jax.nn.sigmoid(masked(s, seen) - math.log(self.length))


@dataclass(frozen=True)
class Relu(Normalizer):
    """relu(s)^power / n (arXiv 2309.08586), power 1 or 2. n: the number of keys if None."""

    power: int = 1
    length: int | None = None
    deltas: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self):
        if self.power not in (1, 2):
            raise ValueError(f"Relu: power: got {self.power}, expected 1 or 2")

    def for_length(self, length):
        return self if self.length else replace(self, length=length)

    def add(self, row, s, seen, keys):
        return Added(row, None, (self._weights(s, seen),))

    def gradient(self, s, seen, keys, dp, deltas, saved):
        x = jnp.maximum(masked(s, seen), 0)
        slope = (x > 0).astype(s.dtype) if self.power == 1 else 2 * x
        return self._weights(s, seen), slope * dp * (1 / self.length)

    def _weights(self, s, seen):
        x = jnp.maximum(masked(s, seen), 0) * (1 / self.length)
        return x if self.power == 1 else x * x * self.length


@dataclass(frozen=True)
class Softpick(Normalizer):
    """relu(e^s - 1) / (sum |e^s - 1| + eps) (arXiv 2504.20966), eps in units of e^m with m = max(0, max s).

    e^(s-m) - e^(-m) is computed as tanh(s / 2) (e^(s-m) + e^(-m)), which does not cancel near s = 0. m counts as a
    constant of the row, as in the paper: only eps depends on it.
    """

    eps: float = 1e-6

    def start(self, zero, known=(), sink=None):
        return zero, zero

    def add(self, row, s, seen, keys):
        before, total = row
        s = masked(s, seen)
        # From 0 on, or else e^(-m) overflows in a row of large negative logits.
        m = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
        x = jnp.tanh(0.5 * s) * (jnp.exp(s - m) + jnp.exp(-m))
        if seen is not None:
            x = jnp.where(seen, x, 0)
        keep = jnp.exp(before - m)
        total = keep * total + jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
        return Added((m, total), keep, (jnp.maximum(x, 0),))

    def merge(self, row, sums):
        m, total, *sums = at_one_maximum(*row, *sums)
        return (m, total), sums

    def finish(self, row, sums):
        m, total = row
        return (sums[0] / (total + self.eps),), (m + jnp.log(total + self.eps),)

    def gradient(self, s, seen, keys, dp, deltas, saved):
        grown, positive = jnp.exp(masked(s, seen) - saved[0]), s > 0
        p = jnp.where(positive, jnp.tanh(0.5 * s) * (grown + jnp.exp(-saved[0])), 0)
        p = p if seen is None else jnp.where(seen, p, 0)
        return p, grown * (jnp.where(positive, dp, 0) - jnp.sign(s) * deltas[0])


@dataclass(frozen=True)
class SelfAdjust(Normalizer):
    """(s - a) / (b - a) softmax(s), a = min(0, min s), b = max(0, max s) (arXiv 2502.18277, the normalized form).

    Two sums, of exp(s - m) v and of s exp(s - m) v, because a is known last. Gradients flow through a and b, to the
    key that holds the minimum or maximum: the first in order, so that no tile has to find it by comparing floats.
    """

    sums: ClassVar[int] = 2
    deltas: ClassVar[tuple[int, ...]] = (0, 1)

    def start(self, zero, known=(), sink=None):
        return zero - jnp.inf, zero, zero + jnp.inf, zero - 1, zero - 1

    def add(self, row, s, seen, keys):
        m_before, total, least_before, least_key, most_key = row
        positions, s_most = keys.astype(s.dtype), masked(s, seen)
        s_least = s if seen is None else jnp.where(seen, s, jnp.inf)
        most, least = (
            jnp.max(s_most, axis=-1, keepdims=True),
            jnp.min(s_least, axis=-1, keepdims=True),
        )
        first = lambda where: jnp.min(jnp.where(where, positions, jnp.inf), axis=-1, keepdims=True)
        most_key = jnp.where(most > m_before, first(s_most == most), most_key)
        least_key = jnp.where(least < least_before, first(s_least == least), least_key)
        m, least = jnp.maximum(m_before, most), jnp.minimum(least_before, least)
        shift = finite(m)
        p, keep = jnp.exp(s_most - shift), jnp.exp(m_before - shift)
        total = keep * total + jnp.sum(p, axis=-1, keepdims=True)
        weighted = (s if seen is None else jnp.where(seen, s, 0)) * p
        return Added((m, total, least, least_key, most_key), keep, (p, weighted))

    def merge(self, row, sums):
        parts_m, total, parts_least, least_key, most_key = row
        m, total, *sums = at_one_maximum(parts_m, total, *sums)
        least = jnp.min(parts_least, axis=0)
        first = lambda where, keys: jnp.min(jnp.where(where, keys, jnp.inf), axis=0)
        return (
            m,
            total,
            least,
            first(parts_least == least, least_key),
            first(parts_m == m, most_key),
        ), sums

    def finish(self, row, sums):
        m, total, least, least_key, most_key = row
        a, b = jnp.minimum(least, 0), jnp.maximum(m, 0)
        per_range = 1 / (b - a + 1e-10)
        softmax = sums[0] * inverse(total)
        o = (sums[1] * inverse(total) - a * softmax) * per_range
        # A bound that is 0 belongs to no key.
        saved = (
            m + jnp.log(total),
            a,
            per_range,
            jnp.where(a < 0, least_key, -1),
            jnp.where(b > 0, most_key, -1),
        )
        return (o, softmax), saved

    def gradient(self, s, seen, keys, dp, deltas, saved):
        lse, a, per_range, least_key, most_key = saved
        delta, delta_softmax = deltas
        p = jnp.exp(masked(s, seen) - finite(lse))
        share, positions = (s - a) * per_range, keys.astype(s.dtype)
        share = share if seen is None else jnp.where(seen, share, 0)
        ds = p * (dp * (share + per_range) - delta)
        ds = ds + jnp.where(positions == least_key, (delta - delta_softmax) * per_range, 0)
        return p * share, ds - jnp.where(positions == most_key, delta * per_range, 0)


@dataclass(frozen=True)
class _Summed(Normalizer):
    """f(s) / sum f(s) for a positive f that needs no maximum. Rows whose every f underflows end as zeros."""

    def start(self, zero, known=(), sink=None):
        return (zero,)

    def add(self, row, s, seen, keys):
        x, _ = self._value_and_slope(masked(s, seen))
        return Added((row[0] + jnp.sum(x, axis=-1, keepdims=True),), None, (x,))

    def merge(self, row, sums):
        return (jnp.sum(row[0], axis=0),), [jnp.sum(x, axis=0) for x in sums]

    def finish(self, row, sums):
        per_total = inverse(row[0])
        return (sums[0] * per_total,), (per_total,)

    def gradient(self, s, seen, keys, dp, deltas, saved):
        x, slope = self._value_and_slope(masked(s, seen))
        return x * saved[0], slope * saved[0] * (dp - deltas[0])

    def _value_and_slope(self, s: Array) -> tuple[Array, Array]:
        raise NotImplementedError


@dataclass(frozen=True)
class StableMax(_Summed):
    """f(s) = s + 1 for s >= 0, 1 / (1 - s) below (arXiv 2501.04697)."""

    def _value_and_slope(self, s):
        below = 1 / (1 - jnp.minimum(s, 0))
        return jnp.where(s >= 0, s + 1, below), jnp.where(s >= 0, 1.0, below * below)


@dataclass(frozen=True)
class Softplus(_Summed):
    """f(s) = log(1 + e^s) (LSSA, arXiv 2501.13428).

    The paper's queries and keys have length 1 and its scale is log K log n, so logits are small and no maximum is kept.
    Float32 rows whose every logit is below about -100 end as zeros.
    """

    def _value_and_slope(self, s):
        return softplus(s), jax.nn.sigmoid(s)


def softplus(s: Array) -> Array:
    return jnp.maximum(s, 0) + jnp.log1p(jnp.exp(-jnp.abs(s)))


def masked(s: Array, seen: Array | None) -> Array:
    return s if seen is None else jnp.where(seen, s, -jnp.inf)


def finite(m: Array) -> Array:
    """0 where a row has seen nothing, so that -inf - m stays -inf and is no NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def at_one_maximum(m: Array, *sums: Array) -> tuple[Array, ...]:
    """The largest of parts' maxima [N, R, 1], and sums [N, ...] that were taken at those, added up at that one."""
    most = jnp.max(m, axis=0)
    keep = jnp.exp(m - finite(most))
    return most, *(jnp.sum(keep * x, axis=0) for x in sums)


def inverse(total: Array) -> Array:
    """1 / total; 0 for a row that has seen nothing."""
    return jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
