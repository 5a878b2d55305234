"""Normalizers that must know something of a row before they weigh it: several passes over its keys.

Each pass before the last computes logits again and multiplies no values; what it finds is a number
or two a row. So memory stays linear in T, and time grows with the passes. The contract is that of
`base.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import (
    Added,
    KeyPass,
    Normalizer,
    Row,
    Softmax,
    checked_integer,
    finite,
    inverse,
    masked,
    online_exp,
    row_max,
    row_sum,
    set_length,
    softplus,
)


@dataclass(frozen=True)
class ClippedSoftmax(Normalizer):
    """clip((zeta - gamma) softmax(s) + gamma, 0, 1) (arXiv 2306.12929), gamma = -alpha / n.

    Weights that reach 0 or 1 have no gradient. n: the number of keys if None. The two sums are of
    the weights, and of the softmax inside the clip, which the backward pass needs.
    """

    alpha: float = 4.0
    zeta: float = 1.0
    length: int | None = None
    deltas: ClassVar[tuple[int, ...]] = (1,)
    sums: ClassVar[int] = 2
    passes: ClassVar[int] = 2
    from_maximum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not (0 <= self.alpha < math.inf and 1 <= self.zeta < math.inf):
            got = f"alpha={self.alpha}, zeta={self.zeta}"
            raise ValueError(f"ClippedSoftmax: got {got}, expected at least 0 and at least 1")
        set_length(self, self.length)

    def for_length(self, length: int) -> "ClippedSoftmax":
        return self if self.length else replace(self, length=length)

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        # The first pass finds the softmax's denominator, without values.
        softmax = Softmax()

        def add(
            row: Row,
            s: Array,
            seen: Array | None,
            keys: Array,
        ) -> Row:
            return softmax.add(row, s, seen, keys).row

        m, total = pass_over_keys(softmax.start(zero), add)
        lse = m + jnp.log(total)
        return (lse,)

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
        # The weights are final: they are not divided by anything in `finish`.
        (lse,) = row
        _, weights, unclipped = self._weights(s, seen, lse)
        return Added(row, None, (weights, unclipped))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        return tuple(sums), row

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        (lse,) = saved
        p, weights, unclipped = self._weights(s, seen, lse)
        # With w = (zeta - gamma) p inside the clip, and constant outside of it:
        # ds_j = w_j dp_j - p_j sum_i w_i dp_i, and that sum is sum(do * outputs[1]).
        return weights, unclipped * dp - p * deltas[0]

    def _weights(
        self,
        s: Array,
        seen: Array | None,
        lse: Array,
    ) -> tuple[Array, Array, Array]:
        """The softmax p, its clipped stretch, and (zeta - gamma) p where that is not clipped."""
        assert self.length is not None, "api.py fills it in"
        gamma = -self.alpha / self.length
        p = jnp.exp(masked(s, seen) - finite(lse))
        # A key that is not seen has p = 0, and is clipped to 0: gamma is not positive.
        scaled = (self.zeta - gamma) * p
        stretched = scaled + gamma
        inside = (stretched > 0) & (stretched < 1)
        return p, jnp.clip(stretched, 0, 1), jnp.where(inside, scaled, 0)


@dataclass(frozen=True)
class ReweightedSoftplus(Normalizer):
    """LSSAR (arXiv 2501.13428): A = softplus(s), A / sum A; then relu(n A - 1)^power over its sum.

    n: the keys that the row sees. From rows of 3 keys or fewer no 1 is subtracted, as in the paper.
    The row's largest n A - 1 is divided out before the power, which overflows otherwise. A row
    whose weights are all equal has nothing above its mean: it ends as zeros. The two sums are of
    the weights, and of d weights / d sum A.
    """

    power: int = 15
    sums: ClassVar[int] = 2
    deltas: ClassVar[tuple[int, ...]] = (0, 1)
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        power = checked_integer("ReweightedSoftplus: power", self.power, 2)
        # The dataclass is frozen, so that it is hashable.
        object.__setattr__(self, "power", power)

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        def add(
            row: Row,
            s: Array,
            seen: Array | None,
            keys: Array,
        ) -> Row:
            total, count, m = row
            # How many keys a row sees: with `seen` None all of the tile.
            visible = jnp.ones_like(s) if seen is None else jnp.where(seen, 1, jnp.zeros_like(s))
            count = count + row_sum(visible)
            s = masked(s, seen)
            m = jnp.maximum(m, row_max(s))
            total = total + row_sum(softplus(s))
            return total, count, m

        total, count, m = pass_over_keys((zero, zero, zero - jnp.inf), add)
        # n A is softplus(s) * per_mean.
        per_sum = inverse(total)
        per_mean = count * per_sum
        subtracted = (count > 3).astype(zero.dtype)
        largest = softplus(m) * count * per_sum - subtracted
        # Below this, what is left of n A - 1 is its rounding error.
        per_largest = jnp.where(largest > 1e-6, inverse(largest), 0)
        return per_sum, per_mean, subtracted, per_largest

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        return (*known, zero, zero)

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        *known, total, slopes = row
        s = masked(s, seen)
        steep, weights = self._weights(s, known)
        # Proportional to d weight / d sum A: a weight depends on the sum by softplus(s) / sum A.
        slope = steep * softplus(s)
        total = total + row_sum(weights)
        slopes = slopes + row_sum(slope)
        return Added((*known, total, slopes), None, (weights, slope))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        *known, total, slopes = row
        per_total = inverse(total)
        # o, and the mean of the values by the slopes.
        outputs = tuple(x * per_total for x in sums)
        return outputs, (*known, per_total, slopes * per_total)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        *known, per_total, slopes = saved
        per_sum, per_mean, _, per_largest = known
        s = masked(s, seen)
        steep, weights = self._weights(s, known)
        # Through this key's own weight, and through the sum of A.
        through_weight = steep * per_total * (dp - deltas[0])
        through_sum = per_sum * (deltas[1] - deltas[0] * slopes)
        # d x^power / d A = power x^(power - 1) n / largest; the largest is a constant factor of
        # the row, which the division by the weights' sum takes out again.
        da = per_mean * per_largest * self.power * (through_weight - through_sum)
        # d softplus(s) / ds
        return weights * per_total, da * jax.nn.sigmoid(s)

    def _weights(
        self,
        s: Array,
        known: Sequence[Array],
    ) -> tuple[Array, Array]:
        """x^(power - 1) and x^power of x = relu(n A - 1) / its largest."""
        _, per_mean, subtracted, per_largest = known
        x = jnp.maximum(softplus(s) * per_mean - subtracted, 0) * per_largest
        # An integer power: 0 stays 0, and no logarithm is taken.
        steep = jax.lax.integer_pow(x, self.power - 1)
        return steep, steep * x


@dataclass(frozen=True)
class AdaptiveTemperature(Normalizer):
    """softmax(beta s), beta >= 1 a polynomial of the entropy of softmax(s) (arXiv 2410.01104).

    Its rows are sharper. Meant for inference by its authors; the gradient is there all the same,
    through beta too. The two sums are of the weights, and of d weights / d beta.

    Attributes:
      polynomial: coefficients, the highest power first.
      threshold: rows of less entropy keep beta = 1.
    """

    polynomial: tuple[float, ...] = (-0.037, 0.481, -2.3, 4.917, -1.791)
    threshold: float = 0.5
    # The weights, and d weights / d beta.
    sums: ClassVar[int] = 2
    deltas: ClassVar[tuple[int, ...]] = (0, 1)
    passes: ClassVar[int] = 2
    from_maximum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        numbers = (*self.polynomial, self.threshold)
        if not all(math.isfinite(x) for x in numbers):
            got = f"polynomial={self.polynomial}, threshold={self.threshold}"
            raise ValueError(f"AdaptiveTemperature: got {got}, expected finite numbers")
        # A static argument must be hashable, so no list.
        object.__setattr__(self, "polynomial", tuple(self.polynomial))

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        def add(
            row: Row,
            s: Array,
            seen: Array | None,
            keys: Array,
        ) -> Row:
            before, total, gaps = row
            s = masked(s, seen)
            m, p, keep = online_exp(before, s, row_max(s))
            # How far the maximum rises; 0 in the first tile that a row sees something of.
            rise = jnp.where(before == -jnp.inf, 0, finite(m) - before)
            # The sum of exp(s - m) (m - s), whose terms are all positive: every m - s so far has
            # grown by the rise of the maximum.
            gaps = keep * (gaps + total * rise) + row_sum(p * _gap(s, finite(m)))
            total = keep * total + row_sum(p)
            return m, total, gaps

        m, total, gaps = pass_over_keys((zero - jnp.inf, zero, zero), add)
        # With p = exp(s - m) / total, -sum p log p is log(total) + sum p (m - s).
        log_total = jnp.log(jnp.where(total > 0, total, 1))
        entropy = jnp.where(total > 0, log_total + gaps * inverse(total), 0)
        beta, slope = self._beta(entropy)
        # beta is positive: where s is largest, beta s is too, and m serves both.
        lse = m + jnp.log(total)
        return finite(m), lse, entropy, beta, slope

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        return (*known, zero, zero)

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        *known, total, gaps = row
        p, gap = self._weights(s, seen, known)
        # d exp(beta (s - m)) / d beta = -p gap
        weighted_gap = p * gap
        total = total + row_sum(p)
        gaps = gaps + row_sum(weighted_gap)
        return Added((*known, total, gaps), None, (p, weighted_gap))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        *known, total, gaps = row
        per_total = inverse(total)
        # o, and the mean of the values by p gap.
        outputs = tuple(x * per_total for x in sums)
        return outputs, (*known, per_total, gaps * per_total)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        *known, per_total, gaps = saved
        _, lse, entropy, beta, slope = known
        p, _ = self._weights(s, seen, known)
        p = p * per_total
        # A gap is m - s, so that d weights / d beta has the opposite sign.
        dentropy = slope * (deltas[0] * gaps - deltas[1])
        s = masked(s, seen)
        # The softmax without a temperature, and its logarithm.
        plain = jnp.exp(s - finite(lse))
        log_plain = -_gap(s, finite(lse))
        # Through beta s, with a constant beta.
        ds = beta * p * (dp - deltas[0])
        # d entropy / ds = -plain (log plain + entropy)
        ds = ds - dentropy * plain * (log_plain + entropy)
        return p, ds

    def _weights(
        self,
        s: Array,
        seen: Array | None,
        known: Sequence[Array],
    ) -> tuple[Array, Array]:
        """exp(beta (s - m)) and m - s, which is 0 where masked."""
        m, _, _, beta, _ = known
        s = masked(s, seen)
        return jnp.exp(beta * (s - m)), _gap(s, m)

    def _beta(self, entropy: Array) -> tuple[Array, Array]:
        """beta and its derivative, by Horner's rule."""
        value = jnp.zeros_like(entropy)
        slope = jnp.zeros_like(entropy)
        for coefficient in self.polynomial:
            slope = slope * entropy + value
            value = value * entropy + coefficient
        # Where beta stays 1, it has no gradient.
        sharper = (entropy > self.threshold) & (value > 1)
        return jnp.where(sharper, value, 1), jnp.where(sharper, slope, 0)


def _gap(s: Array, m: Array) -> Array:
    """m - s, 0 where s is masked."""
    return jnp.where(s == -jnp.inf, 0, m - s)
