"""Normalizers that need one pass over the keys, besides softmax. The contract is in `base.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import (
    Added,
    Normalizer,
    Row,
    at_one_maximum,
    finite,
    inverse,
    masked,
    online_exp,
    relu,
    row_max,
    row_sum,
    set_length,
    softplus,
)


@dataclass(frozen=True)
class Elementwise(Normalizer):
    """Weights that depend on their own logit alone: rows keep no statistics."""

    # ds needs nothing of the row either.
    deltas: ClassVar[tuple[int, ...]] = ()
    hidden_by_logit: ClassVar[bool] = True

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        return Added(row, None, (self._weights(s, seen),))

    def _weights(self, s: Array, seen: Array | None) -> Array:
        """The weights, 0 where a key is not seen."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sigmoid(Elementwise):
    """sigmoid(s - log n) (arXiv 2409.04431).

    n is a constant, as its authors advise; the number of keys if None.
    """

    length: int | None = None

    def __post_init__(self) -> None:
        set_length(self, self.length)

    def for_length(self, length: int) -> "Sigmoid":
        return self if self.length else replace(self, length=length)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        p = self._weights(s, seen)
        return p, p * (1 - p) * dp

    def _weights(self, s: Array, seen: Array | None) -> Array:
        assert self.length is not None, "api.py fills it in"
        # sigmoid(-inf) is 0.
        return self.functions.sigmoid(masked(s, seen) - math.log(self.length))


@dataclass(frozen=True)
class Relu(Elementwise):
    """relu(s)^power / n (arXiv 2309.08586), power 1 or 2. n: the number of keys if None."""

    power: int = 1
    length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(f"Relu: power: got {self.power}, expected 1 or 2")
        set_length(self, self.length)

    def for_length(self, length: int) -> "Relu":
        return self if self.length else replace(self, length=length)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        assert self.length is not None, "api.py fills it in"
        # d relu(s)^power / ds, 0 where a key is not seen.
        x = relu(masked(s, seen))
        # Of what is not negative, the sign is 0 or 1, and of NaN it is NaN.
        slope = jnp.sign(x) if self.power == 1 else 2 * x
        ds = slope * dp * (1 / self.length)
        return self._weights(s, seen), ds

    def _weights(self, s: Array, seen: Array | None) -> Array:
        assert self.length is not None, "api.py fills it in"
        x = relu(masked(s, seen)) * (1 / self.length)
        # (s / n)^2 n = s^2 / n, which overflows later.
        return x if self.power == 1 else x * x * self.length


@dataclass(frozen=True)
class Softpick(Normalizer):
    """relu(e^s - 1) / (sum |e^s - 1| + eps) (arXiv 2504.20966).

    eps is in units of e^m with m = max(0, max s). e^(s-m) - e^(-m) is computed as
    tanh(s / 2) (e^(s-m) + e^(-m)), which does not cancel near s = 0. m counts as a constant of the
    row, as in the paper: only eps depends on it.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(f"Softpick: eps: got {self.eps}, expected a number above 0")

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        # The maximum is at least 0, or else e^(-m) overflows in a row of large negative logits.
        return zero, zero

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        before, total = row
        s = masked(s, seen)
        m = jnp.maximum(before, row_max(s))
        # (e^s - 1) e^(-m), of either sign.
        x = jnp.tanh(0.5 * s) * (self.functions.exp(s - m) + self.functions.exp(-m))
        if seen is not None:
            # At -inf it is -e^(-m), which is not 0.
            x = jnp.where(seen, x, 0)
        # What was summed so far has the factor e^(-before).
        keep = self.functions.exp(before - m)
        total = keep * total + row_sum(jnp.abs(x))
        return Added((m, total), keep, (relu(x),))

    def merge(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[Row, list[Array]]:
        m, total, *sums = at_one_maximum(*row, *sums)
        return (m, total), sums

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        m, total = row
        o = sums[0] / (total + self.eps)
        # Of the sum without the factor e^(-m), as `gradient` needs it.
        log_denominator = m + jnp.log(total + self.eps)
        return (o,), (log_denominator,)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        (log_denominator,) = saved
        # e^s over the denominator is the slope of e^s - 1 over it.
        slope = self.functions.exp(masked(s, seen) - log_denominator)
        positive = s > 0
        # (e^s - 1) / denominator, by tanh as in `add`.
        x = jnp.tanh(0.5 * s) * (slope + self.functions.exp(-log_denominator))
        # Not `where(positive, x, 0)`: NaN stays.
        p = relu(x)
        if seen is not None:
            p = jnp.where(seen, p, 0)
        # Negative logits have no weight, but their |e^s - 1| is in the denominator.
        through_weight = jnp.where(positive, dp, 0)
        through_denominator = jnp.sign(s) * deltas[0]
        return p, slope * (through_weight - through_denominator)


@dataclass(frozen=True)
class SelfAdjust(Normalizer):
    """(s - a) / (b - a) softmax(s), a = min(0, min s), b = max(0, max s).

    This is the normalized form of arXiv 2502.18277. Two sums, of exp(s - m) v and of
    s exp(s - m) v, because a is known last. Gradients flow through a and b, to the key that holds
    the minimum or maximum: the first in order, so that no tile has to find it by comparing floats.
    """

    sums: ClassVar[int] = 2
    deltas: ClassVar[tuple[int, ...]] = (0, 1)
    from_maximum: ClassVar[bool] = True

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        # Statistics: the maximum and its sum, as of softmax; the minimum; the keys of both.
        no_key = zero - 1
        return zero - jnp.inf, zero, zero + jnp.inf, no_key, no_key

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        m_before, total, least_before, least_key, most_key = row
        # Positions are floats here, because a row's statistics are: exact up to 2^24.
        positions = keys.astype(s.dtype)
        # What is not seen is neither the maximum nor the minimum.
        s_most = masked(s, seen)
        s_least = s if seen is None else jnp.where(seen, s, jnp.inf)
        most = row_max(s_most)
        least = jnp.min(s_least, axis=-1, keepdims=True)

        def first_key(found: Array) -> Array:
            return jnp.min(jnp.where(found, positions, jnp.inf), axis=-1, keepdims=True)

        # Of equal logits the first one stays: a later tile must have a larger maximum.
        most_key = jnp.where(most > m_before, first_key(s_most == most), most_key)
        least_key = jnp.where(least < least_before, first_key(s_least == least), least_key)
        m, p, keep = online_exp(m_before, s_most, most, self.functions.exp)
        least = jnp.minimum(least_before, least)
        total = keep * total + row_sum(p)
        # 0 where p is: -inf * 0 would be NaN.
        s_finite = s if seen is None else jnp.where(seen, s, 0)
        return Added((m, total, least, least_key, most_key), keep, (p, s_finite * p))

    def merge(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[Row, list[Array]]:
        parts_m, total, parts_least, least_key, most_key = row
        m, total, *sums = at_one_maximum(parts_m, total, *sums)
        least = jnp.min(parts_least, axis=0)

        def first_key(found: Array, keys: Array) -> Array:
            return jnp.min(jnp.where(found, keys, jnp.inf), axis=0)

        # The first of the parts that hold the bound; each part has found its first key.
        least_key = first_key(parts_least == least, least_key)
        most_key = first_key(parts_m == m, most_key)
        return (m, total, least, least_key, most_key), sums

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        m, total, least, least_key, most_key = row
        a = jnp.minimum(least, 0)
        b = jnp.maximum(m, 0)
        # Not infinite where all logits are 0.
        per_range = 1 / (b - a + 1e-10)
        softmax = sums[0] * inverse(total)
        # sum (s - a) p v = sum s p v - a sum p v
        o = (sums[1] * inverse(total) - a * softmax) * per_range
        # A bound that is 0 belongs to no key.
        least_key = jnp.where(a < 0, least_key, -1)
        most_key = jnp.where(b > 0, most_key, -1)
        lse = m + jnp.log(total)
        return (o, softmax), (lse, a, per_range, least_key, most_key)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        lse, a, per_range, least_key, most_key = saved
        delta, delta_softmax = deltas
        p = self.functions.exp(masked(s, seen) - finite(lse))
        # Where the logit is between the bounds, from 0 to 1.
        fraction = (s - a) * per_range
        positions = keys.astype(s.dtype)
        if seen is not None:
            fraction = jnp.where(seen, fraction, 0)
        # Through the softmax and through s itself.
        ds = p * (dp * (fraction + per_range) - delta)
        # Through a = min s and b = max s, to the keys that hold them.
        da = (delta - delta_softmax) * per_range
        db = delta * per_range
        ds = ds + jnp.where(positions == least_key, da, 0)
        ds = ds - jnp.where(positions == most_key, db, 0)
        return p * fraction, ds


@dataclass(frozen=True)
class Summed(Normalizer):
    """f(s) / sum f(s) for a positive f that needs no maximum.

    Rows whose every f underflows end as zeros.
    """

    hidden_by_logit: ClassVar[bool] = True

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        return (zero,)

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        (total,) = row
        # f(-inf) is 0. Without a maximum, sums are never rescaled.
        x, _ = self._value_and_slope(masked(s, seen))
        return Added((total + row_sum(x),), None, (x,))

    def merge(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[Row, list[Array]]:
        (total,) = row
        return (jnp.sum(total, axis=0),), [jnp.sum(x, axis=0) for x in sums]

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        # Known only now, after the last key, and the same for all of them.
        factor = self._factor(*row)
        return (sums[0] * factor,), (factor,)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        (factor,) = saved
        x, slope = self._value_and_slope(masked(s, seen))
        # The weights are x / total: ds_j = x'_j / total (dp_j - sum_i w_i dp_i).
        return x * factor, slope * factor * (dp - deltas[0])

    def _value_and_slope(self, s: Array) -> tuple[Array, Array]:
        """f(s) and f'(s), 0 at s = -inf."""
        raise NotImplementedError

    def _factor(self, total: Array) -> Array:
        """What the weights of a row are multiplied by; 0 for a row that sees nothing."""
        return inverse(total)


@dataclass(frozen=True)
class StableMax(Summed):
    """f(s) = s + 1 for s >= 0, 1 / (1 - s) below (arXiv 2501.04697)."""

    def _value_and_slope(self, s: Array) -> tuple[Array, Array]:
        # The branch that is not taken stays finite: min(s, 0), and NaN stays NaN as in `relu`.
        below = 1 / (1 + relu(-s))
        value = jnp.where(s >= 0, s + 1, below)
        # d (1 - s)^-1 / ds = (1 - s)^-2
        slope = jnp.where(s >= 0, 1.0, below * below)
        return value, slope


@dataclass(frozen=True)
class Softplus(Summed):
    """f(s) = log(1 + e^s) (LSSA, arXiv 2501.13428).

    The paper's queries and keys have length 1 and its scale is log K log n, so logits are small and
    no maximum is kept. Float32 rows whose every logit is below about -100 end as zeros.
    """

    def _value_and_slope(self, s: Array) -> tuple[Array, Array]:
        return softplus(s, self.functions.exp), self.functions.sigmoid(s)
