"""Normalizers that must know something of a row before they weigh it: they walk over its keys more than once.

Each walk before the last computes logits again and multiplies no values; what it finds is a number or two a row. So
memory stays linear in T, and time grows with the walks. The contract is that of `normalizers/base.py`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import (
    Added,
    Normalizer,
    Row,
    Softmax,
    finite,
    inverse,
    masked,
    softplus,
)


@dataclass(frozen=True)
class ClippedSoftmax(Normalizer):
    """clip((zeta - gamma) softmax(s) + gamma, 0, 1) (arXiv 2306.12929), gamma = -alpha / n.

    Weights that reach 0 or 1 have no gradient. n: the number of keys if None.
    """

    alpha: float = 4.0
    zeta: float = 1.0
    length: int | None = None
    deltas: ClassVar[tuple[int, ...]] = (1,)
    sums: ClassVar[int] = 2  # of the weights, and of those inside the clip, for the backward pass
    walks: ClassVar[int] = 2

    def __post_init__(self):
        if self.alpha < 0 or self.zeta < 1:
            raise ValueError(
                f"ClippedSoftmax: got alpha={self.alpha}, zeta={self.zeta}, expected at least 0 and at least 1"
            )

    def for_length(self, length):
        return self if self.length else replace(self, length=length)

    def prepare(self, walk, zero):
        m, total = walk(Softmax().start(zero), lambda *tile: Softmax().add(*tile).row)
        return (m + jnp.log(total),)

    def start(self, zero, known=(), sink=None):
        return known

    def add(self, row, s, seen, keys):
        _, weights, unclipped = self._weights(s, seen, row[0])
        return Added(row, None, (weights, unclipped))

    def finish(self, row, sums):
        return tuple(sums), row

    def gradient(self, s, seen, keys, dp, deltas, saved):
        p, weights, unclipped = self._weights(s, seen, saved[0])
        return weights, unclipped * dp - p * deltas[0]

    def _weights(self, s: Array, seen: Array | None, lse: Array) -> tuple[Array, Array, Array]:
        """The softmax, its clipped stretch, and the softmax's share of that where it is not clipped."""
        gamma = -self.alpha / self.length
        p = jnp.exp(masked(s, seen) - finite(lse))
        stretched = (self.zeta - gamma) * p + gamma
        inside = (stretched > 0) & (stretched < 1)
        return p, jnp.clip(stretched, 0, 1), jnp.where(inside, (self.zeta - gamma) * p, 0)


@dataclass(frozen=True)
class ReweightedSoftplus(Normalizer):
    """LSSAR (arXiv 2501.13428): A = softplus(s), A / sum A; then relu(n A - 1)^power, divided by its sum.

    n: the keys that the row sees. Rows of 3 keys or fewer are not lessened by 1, as in the paper. The row's largest
    n A - 1 is divided out before the power, which overflows otherwise. A row whose weights are all equal has nothing
    above its mean: it ends as zeros.
    """

    power: int = 15
    sums: ClassVar[int] = 2  # of the weights, and of d weights / d sum A
    deltas: ClassVar[tuple[int, ...]] = (0, 1)
    walks: ClassVar[int] = 2

    def __post_init__(self):
        if not isinstance(self.power, int) or self.power < 2:
            raise ValueError(
                f"ReweightedSoftplus: power: got {self.power}, expected an integer from 2 on"
            )

    def prepare(self, walk, zero):
        def add(row, s, seen, keys):
            total, count, m = row
            s = masked(s, seen)
            visible = (s > -jnp.inf).astype(s.dtype)
            count = count + jnp.sum(visible, axis=-1, keepdims=True)
            m = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
            return total + jnp.sum(softplus(s), axis=-1, keepdims=True), count, m

        total, count, m = walk((zero, zero, zero - jnp.inf), add)
        per_sum, less = inverse(total), (count > 3).astype(zero.dtype)
        largest = softplus(m) * count * per_sum - less
        # Below this, what is left of n A - 1 is its rounding error.
        return per_sum, count * per_sum, less, jnp.where(largest > 1e-6, inverse(largest), 0)

    def start(self, zero, known=(), sink=None):
        return (*known, zero, zero)

    def add(self, row, s, seen, keys):
        *known, total, slopes = row
        s = masked(s, seen)
        steep, weights = self._weights(s, known)
        slope = steep * softplus(s)
        added = lambda sum_, x: sum_ + jnp.sum(x, axis=-1, keepdims=True)
        return Added((*known, added(total, weights), added(slopes, slope)), None, (weights, slope))

    def finish(self, row, sums):
        *known, total, slopes = row
        per_total = inverse(total)
        return tuple(x * per_total for x in sums), (*known, per_total, slopes * per_total)

    def gradient(self, s, seen, keys, dp, deltas, saved):
        *known, per_total, slopes = saved
        per_sum, per_mean, _, per_largest = known
        s = masked(s, seen)
        steep, weights = self._weights(s, known)
        # Through this key's own weight, and through the sum of A.
        own, through_sum = (
            steep * per_total * (dp - deltas[0]),
            per_sum * (deltas[1] - deltas[0] * slopes),
        )
        da = per_mean * per_largest * self.power * (own - through_sum)
        return weights * per_total, da * jax.nn.sigmoid(s)

    def _weights(self, s: Array, known: Row) -> tuple[Array, Array]:
        """x^(power - 1) and x^power of x = relu(n A - 1) / its largest."""
        _, per_mean, less, per_largest = known
        x = jnp.maximum(softplus(s) * per_mean - less, 0) * per_largest
        steep = jax.lax.integer_pow(x, self.power - 1)
        return steep, steep * x


@dataclass(frozen=True)
class AdaptiveTemperature(Normalizer):
    """softmax(beta s), beta >= 1 a polynomial of the entropy of softmax(s) (arXiv 2410.01104); its rows are sharper.

    Meant for inference by its authors; the gradient is there all the same, through beta too.
    """

    polynomial: tuple[float, ...] = (-0.037, 0.481, -2.3, 4.917, -1.791)  # highest power first
    threshold: float = 0.5  # rows of less entropy keep beta = 1
    sums: ClassVar[int] = 2  # of the weights, and of d weights / d beta
    deltas: ClassVar[tuple[int, ...]] = (0, 1)
    walks: ClassVar[int] = 2

    def prepare(self, walk, zero):
        def add(row, s, seen, keys):
            before, total, fallen = row
            s = masked(s, seen)
            m = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
            shift = finite(m)
            keep, rise = jnp.exp(before - shift), jnp.where(before == -jnp.inf, 0, shift - before)
            p = jnp.exp(s - shift)
            # The sum of exp(s - m) (m - s), whose terms are all positive.
            fallen = keep * (fallen + total * rise) + jnp.sum(
                p * _fall(s, shift), axis=-1, keepdims=True
            )
            return m, keep * total + jnp.sum(p, axis=-1, keepdims=True), fallen

        m, total, fallen = walk((zero - jnp.inf, zero, zero), add)
        entropy = jnp.where(
            total > 0, jnp.log(jnp.where(total > 0, total, 1)) + fallen * inverse(total), 0
        )
        beta, slope = self._beta(entropy)
        return finite(m), m + jnp.log(total), entropy, beta, slope

    def start(self, zero, known=(), sink=None):
        return (*known, zero, zero)

    def add(self, row, s, seen, keys):
        *known, total, fallen = row
        p, fall = self._weights(s, seen, known)
        added = lambda sum_, x: sum_ + jnp.sum(x, axis=-1, keepdims=True)
        return Added((*known, added(total, p), added(fallen, p * fall)), None, (p, p * fall))

    def finish(self, row, sums):
        *known, total, fallen = row
        per_total = inverse(total)
        return tuple(x * per_total for x in sums), (*known, per_total, fallen * per_total)

    def gradient(self, s, seen, keys, dp, deltas, saved):
        *known, per_total, fallen = saved
        _, lse, entropy, beta, slope = known
        p, _ = self._weights(s, seen, known)
        p = p * per_total
        # A fall is m - s, so that d weights / d beta has the opposite sign.
        dentropy = slope * (deltas[0] * fallen - deltas[1])
        s = masked(s, seen)
        plain, log_plain = jnp.exp(s - finite(lse)), -_fall(s, finite(lse))
        return p, beta * p * (dp - deltas[0]) - dentropy * plain * (log_plain + entropy)

    def _weights(self, s: Array, seen: Array | None, known: Row) -> tuple[Array, Array]:
        """exp(beta (s - m)) and m - s, which is 0 where masked."""
        m, _, _, beta, _ = known
        s = masked(s, seen)
        return jnp.exp(beta * (s - m)), _fall(s, m)

    def _beta(self, entropy: Array) -> tuple[Array, Array]:
        """beta and its derivative."""
        value, slope = jnp.zeros_like(entropy), jnp.zeros_like(entropy)
        for coefficient in self.polynomial:
            value, slope = value * entropy + coefficient, slope * entropy + value
        raised = (entropy > self.threshold) & (value > 1)
        return jnp.where(raised, value, 1), jnp.where(raised, slope, 0)


@dataclass(frozen=True)
class Entmax(Normalizer):
    """alpha-entmax (arXiv 1905.05702): relu((alpha - 1) s - tau)^(1 / (alpha - 1)), tau such that a row sums to 1.

    1 < alpha <= 2; 2 is sparsemax (1602.02068). The sum is convex and falls with tau, so Newton's steps from the left
    never pass the root: no bisection is needed, and steps end when tau stands still (about 10 walks). The backward
    pass needs sum u v / sum u, u = weights^(2 - alpha) (2502.12082).
    """

    alpha: float = 1.5
    steps: int = 60  # at most
    sums: ClassVar[int] = 2
    deltas: ClassVar[tuple[int, ...]] = (1,)
    walks: ClassVar[int] = 12  # about

    def __post_init__(self):
        if not 1 < self.alpha <= 2:
            raise ValueError(
                f"Entmax: alpha: got {self.alpha}, expected above 1 and at most 2 (1 is softmax)"
            )

    def prepare(self, walk, zero):
        largest = lambda row, s, seen, keys: (
            jnp.maximum(row[0], jnp.max(masked(s, seen), axis=-1, keepdims=True)),
        )
        (m,) = walk((zero - jnp.inf,), largest)
        m, still = finite(m), 2 * jnp.finfo(zero.dtype).eps

        def step(state):
            i, tau, _ = state

            def add(row, s, seen, keys):
                p, u = self._weights(s, seen, (tau, m))
                return tuple(
                    sum_ + jnp.sum(x, axis=-1, keepdims=True) for sum_, x in zip(row, (p, u))
                )

            total, slope = walk((zero, zero), add)
            rise = jnp.where(total > 1, (total - 1) * (self.alpha - 1) * inverse(slope), 0)
            return i + 1, tau + rise, rise

        moving = lambda state: (state[0] < self.steps) & jnp.any(state[2] > still)
        # Logits count from their maximum, so tau lies in [-1, 0) however large they are.
        _, tau, _ = jax.lax.while_loop(moving, step, (0, zero - 1, zero + 1))
        return tau, m

    def start(self, zero, known=(), sink=None):
        return (*known, zero, zero)

    def add(self, row, s, seen, keys):
        tau, m, *totals = row
        weights = self._weights(s, seen, (tau, m))
        totals = [total + jnp.sum(x, axis=-1, keepdims=True) for total, x in zip(totals, weights)]
        return Added((tau, m, *totals), None, weights)

    def finish(self, row, sums):
        tau, m, *totals = row
        per_totals = [inverse(total) for total in totals]
        return tuple(x * y for x, y in zip(sums, per_totals)), (tau, m, per_totals[0])

    def gradient(self, s, seen, keys, dp, deltas, saved):
        tau, m, per_total = saved
        p, u = self._weights(s, seen, (tau, m))
        return p * per_total, u * (dp - deltas[0])

    def _weights(self, s: Array, seen: Array | None, known: Row) -> tuple[Array, Array]:
        """The weights, and weights^(2 - alpha), which is 1 on the support for sparsemax."""
        tau, m = known
        y = jnp.maximum((self.alpha - 1) * (masked(s, seen) - m) - tau, 0)
        if self.alpha == 2:
            return y, (y > 0).astype(y.dtype)
        if self.alpha == 1.5:
            return y * y, y
        log_y = jnp.log(jnp.where(y > 0, y, 1)) / (self.alpha - 1)
        return jnp.where(y > 0, jnp.exp(log_y), 0), jnp.where(
            y > 0, jnp.exp((2 - self.alpha) * log_y), 0
        )


def _fall(s: Array, m: Array) -> Array:
    """m - s, 0 where s is masked."""
    return jnp.where(s == -jnp.inf, 0, m - s)
