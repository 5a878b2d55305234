"""Normalizers with learned numbers of every head, besides entmax. The contract is in `base.py`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import (
    Added,
    KeyPass,
    Normalizer,
    Row,
    Softmax,
    finite,
    inverse,
    masked,
    row_sum,
    visible,
)


@dataclass(frozen=True)
class NormalizedPooling(Normalizer):
    """gain (s - mean) / (std + eps) + bias over the keys that a row sees (NAP, arXiv 2005.09561).

    Weights of either sign, which sum to n bias. Mean and deviation come from sums of s and s^2,
    the output from sums of v and s v: one pass. Logits count from the mean of the row's first tile,
    so that a common part of them does not cancel what tells them apart.
    """

    eps: float = 1e-3
    sums: ClassVar[int] = 2
    # The pooled values and the sum of all values.
    deltas: ClassVar[tuple[int, ...]] = (1, 2)
    has_negative_weights: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, float]] = {"gain": 1.0, "bias": 0.0}

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            got = f"got {self.eps}, expected a number above 0"
            raise ValueError(f"NormalizedPooling: eps: {got}")

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        # What logits count from; the keys seen; the sums of logits and of their squares.
        return (*known, zero, zero, zero, zero)

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        gain, bias, origin, count, total, squares = row
        ones = visible(s, seen)
        num_seen = row_sum(ones)
        # 0 where the row sees nothing of this tile.
        tile_mean = row_sum(s if seen is None else jnp.where(seen, s, 0)) * inverse(num_seen)
        # Before a row has seen anything, its sums are zeros from any origin.
        origin = jnp.where(count == 0, tile_mean, origin)
        # Selected, not multiplied: a logit that is not seen may be NaN.
        x = s - origin
        x = x if seen is None else jnp.where(seen, x, 0)
        count = count + num_seen
        total = total + row_sum(x)
        squares = squares + row_sum(x * x)
        return Added((gain, bias, origin, count, total, squares), None, (ones, x))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        gain, bias, origin, count, total, squares = row
        per_count = inverse(count)
        mean = total * per_count
        variance = squares * per_count - mean * mean
        # Rounding may leave a little less than 0; NaN stays.
        std = jnp.sqrt(jnp.where(variance < 0, 0, variance))
        per_std = 1 / (std + self.eps)
        # sum (s - mean) v, of logits that count from the origin as the mean does.
        pooled = per_std * (sums[1] - mean * sums[0])
        o = gain * pooled + bias * sums[0]
        # d std / d s_j = (s_j - mean) / (n std), which `gradient` takes from (s_j - mean) per_std.
        # Where all logits are equal std has no derivative, and this none either.
        spread = per_count * inverse(std) * (std + self.eps)
        return (o, pooled, sums[0]), (gain, bias, origin + mean, per_std, per_count, spread)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        gain, bias, mean, per_std, per_count, spread = saved
        of_pooled, of_values = deltas
        z = per_std * (s - mean)
        p = gain * z + bias
        # Through the logit itself, through the mean and through the deviation.
        ds = gain * per_std * (dp - of_values * per_count - z * spread * of_pooled)
        if seen is None:
            return p, ds
        return jnp.where(seen, p, 0), jnp.where(seen, ds, 0)

    def parameter_gradients(
        self,
        deltas: Sequence[Array],
        saved: Row,
    ) -> Row:
        # The output is gain times the one, plus bias times the other.
        return tuple(deltas)


@dataclass(frozen=True)
class CenteredSoftmax(Normalizer):
    """beta softmax(s) - gamma / n, n the keys that a row sees (shaped attention, 2306.17759).

    With beta = gamma rows sum to 0, and logits of 0 have no weight. The paper adds the identity,
    which a layer has outside: `value_skip` of `gatedjax.GatedAttentionConfig`. The two sums are of
    the softmax and of 1 / n; beta and gamma of a head are learned (2311.01906).
    """

    sums: ClassVar[int] = 2
    # The softmax's output and the mean of the values.
    deltas: ClassVar[tuple[int, ...]] = (1, 2)
    passes: ClassVar[int] = 2
    from_maximum: ClassVar[bool] = True
    has_negative_weights: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, float]] = {"beta": 1.0, "gamma": 1.0}

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        # The denominators first: the mean's sum is not rescaled as the softmax's would be.
        softmax = Softmax()

        def add(
            row: Row,
            s: Array,
            seen: Array | None,
            keys: Array,
        ) -> Row:
            *of_softmax, count = row
            of_softmax = softmax.add(tuple(of_softmax), s, seen, keys).row
            return *of_softmax, count + row_sum(visible(s, seen))

        # Seen keys are counted, those of weight 0 too.
        m, total, count = pass_over_keys((*softmax.start(zero), zero), add)
        return (*parameters, m + jnp.log(total), inverse(count))

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        return known

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        # Both are final: they are not divided by anything in `finish`.
        _, _, lse, per_count = row
        p = jnp.exp(masked(s, seen) - finite(lse))
        return Added(row, None, (p, visible(s, seen) * per_count))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        beta, gamma, _, _ = row
        # Rows that see nothing have zeros for both.
        attended, mean = sums
        return (beta * attended - gamma * mean, attended, mean), row

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        beta, gamma, lse, per_count = saved
        p = jnp.exp(masked(s, seen) - finite(lse))
        weights = beta * p - gamma * visible(s, seen) * per_count
        # The mean over the keys is the same for all logits: only the softmax has a gradient.
        return weights, beta * p * (dp - deltas[0])

    def parameter_gradients(
        self,
        deltas: Sequence[Array],
        saved: Row,
    ) -> Row:
        of_softmax, of_mean = deltas
        return of_softmax, -of_mean
