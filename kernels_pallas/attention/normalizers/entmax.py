"""alpha-entmax and sparsemax: sparse weights, by Newton's method on a row's threshold.

The contract is that of `base.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import (
    Added,
    KeyPass,
    Normalizer,
    Row,
    checked_integer,
    finite,
    inverse,
    masked,
    row_max,
    row_sum,
)


@dataclass(frozen=True)
class Entmax(Normalizer):
    """alpha-entmax (arXiv 1905.05702): relu((alpha - 1) s - tau)^(1 / (alpha - 1)).

    tau is such that a row sums to 1. 1 < alpha <= 2; 2 is sparsemax (1602.02068). The sum is convex
    and falls with tau, so Newton's steps from the left never pass the root: no bisection is needed,
    and steps end when tau moves no more (about 10 passes). The backward pass needs sum u v / sum u,
    u = weights^(2 - alpha) (2502.12082): the second sum.

    Attributes:
      steps: Newton's steps, at most.
    """

    alpha: float = 1.5
    steps: int = 60
    # Of the weights, and of u.
    sums: ClassVar[int] = 2
    # do times the mean of the values by u.
    deltas: ClassVar[tuple[int, ...]] = (1,)
    # About so many.
    passes: ClassVar[int] = 12
    from_maximum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            expected = "above 1 and at most 2 (1 is softmax)"
            raise ValueError(f"Entmax: alpha: got {self.alpha}, expected {expected}")
        # The dataclass is frozen, so that it is hashable.
        object.__setattr__(self, "steps", checked_integer("Entmax: steps", self.steps, 1))

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        return _threshold(pass_over_keys, zero, self.alpha, self.steps, self._weights)

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
        tau, m, total, total_u = row
        p, u = self._weights(s, seen, tau, m)
        total = total + row_sum(p)
        total_u = total_u + row_sum(u)
        return Added((tau, m, total, total_u), None, (p, u))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        tau, m, total, total_u = row
        # tau is exact up to rounding, and the weights sum to 1 after this.
        per_total = inverse(total)
        o = sums[0] * per_total
        mean_u = sums[1] * inverse(total_u)
        return (o, mean_u), (tau, m, per_total)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        tau, m, per_total = saved
        p, u = self._weights(s, seen, tau, m)
        # The Jacobian is diag(u) - u u^T / sum u.
        return p * per_total, u * (dp - deltas[0])

    def _weights(
        self,
        s: Array,
        seen: Array | None,
        tau: Array,
        m: Array,
    ) -> tuple[Array, Array]:
        """The weights, and weights^(2 - alpha), which is 1 on the support for sparsemax."""
        y = _above(s, seen, tau, m, self.alpha)
        # y^(1 / (alpha - 1)) and y^((2 - alpha) / (alpha - 1)), which two cases have in short.
        if self.alpha == 2:
            # 0, 1 or NaN.
            return y, jnp.sign(y)
        if self.alpha == 1.5:
            return y * y, y
        weight, u, _ = _by_logarithms(y, self.alpha)
        return weight, u


@dataclass(frozen=True)
class LearnedEntmax(Normalizer):
    """alpha-entmax with an alpha of every head, which has a gradient (arXiv 1909.00015).

    With p the weights, u = p^(2 - alpha) and h = -p log p:

        dp / d alpha = (p - u / sum u) / (alpha - 1)^2 + (h - u / sum u sum h) / (alpha - 1)

    So the sum of h v, a third one, is all that this gradient needs: do times the sums gives it row
    by row, with no pass of its own. The paper's alpha is 1 + sigmoid(a), a = 0 at the start. Alphas
    are above 1 and at most 2: traced numbers, which are not checked.

    Attributes:
      steps: Newton's steps, at most.
    """

    steps: int = 60
    # Of the weights, of u and of h.
    sums: ClassVar[int] = 3
    deltas: ClassVar[tuple[int, ...]] = (0, 1, 2)
    # About so many.
    passes: ClassVar[int] = 12
    from_maximum: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, float]] = {"alpha": 1.5}

    def __post_init__(self) -> None:
        # The dataclass is frozen, so that it is hashable.
        steps = checked_integer("LearnedEntmax: steps", self.steps, 1)
        object.__setattr__(self, "steps", steps)

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        (alpha,) = parameters

        # The passes for the threshold need no entropy.
        def weigh(s: Array, seen: Array | None, tau: Array, m: Array) -> tuple[Array, Array]:
            weight, u, _ = _by_logarithms(_above(s, seen, tau, m, alpha), alpha)
            return weight, u

        tau, m = _threshold(pass_over_keys, zero, alpha, self.steps, weigh)
        return alpha, tau, m

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        return (*known, zero, zero, zero)

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        alpha, tau, m, total, total_u, total_h = row
        p, u, log_p = _by_logarithms(_above(s, seen, tau, m, alpha), alpha)
        # Of a weight of 0 it is 0: `_by_logarithms` gives 0 for that logarithm too.
        h = -p * log_p
        total = total + row_sum(p)
        total_u = total_u + row_sum(u)
        total_h = total_h + row_sum(h)
        return Added((alpha, tau, m, total, total_u, total_h), None, (p, u, h))

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        alpha, tau, m, total, total_u, total_h = row
        # As in `Entmax`.
        per_total = inverse(total)
        outputs = (sums[0] * per_total, sums[1] * inverse(total_u), sums[2])
        return outputs, (alpha, tau, m, per_total, total_h)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        alpha, tau, m, per_total, _ = saved
        # As in `Entmax`: the Jacobian by the logits does not know that alpha is learned.
        p, u, _ = _by_logarithms(_above(s, seen, tau, m, alpha), alpha)
        return p * per_total, u * (dp - deltas[1])

    def parameter_gradients(
        self,
        deltas: Sequence[Array],
        saved: Row,
    ) -> Row:
        alpha, _, _, _, entropy = saved
        # do times the output, times the mean of the values by u, times the sum of h v.
        of_weights, of_u, of_h = deltas
        # A row that sees nothing, or one of padding, has zeros for all of these.
        per_alpha = 1 / (alpha - 1)
        return (per_alpha * (per_alpha * (of_weights - of_u) + of_h - of_u * entropy),)


def _threshold(
    pass_over_keys: KeyPass,
    zero: Array,
    alpha: float | Array,
    steps: int,
    weigh: Callable[[Array, Array | None, Array, Array], tuple[Array, Array]],
) -> Row:
    """tau and the largest logit of every row, by Newton's steps.

    Args:
      pass_over_keys, zero: as of `Normalizer.prepare`.
      alpha: one number, or one of every row.
      steps: at most.
      weigh: the weights and their powers 2 - alpha, from logits, mask, tau and maximum.

    Returns:
      (tau, maximum), [R, 1] each.
    """

    def add_maximum(
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Row:
        (m,) = row
        return (jnp.maximum(m, row_max(masked(s, seen))),)

    (m,) = pass_over_keys((zero - jnp.inf,), add_maximum)
    m = finite(m)
    # Less than this is rounding error of tau, whose size is at most 1.
    smallest_step = 2 * jnp.finfo(zero.dtype).eps

    def newton_step(state: tuple) -> tuple:
        i, tau, _ = state

        def add(
            row: Row,
            s: Array,
            seen: Array | None,
            keys: Array,
        ) -> Row:
            total, slope = row
            p, u = weigh(s, seen, tau, m)
            return total + row_sum(p), slope + row_sum(u)

        total, slope = pass_over_keys((zero, zero), add)
        # d total / d tau = -slope / (alpha - 1)
        step = (total - 1) * (alpha - 1) * inverse(slope)
        # From the right of the root, which only rounding reaches, tau does not go back.
        step = jnp.where(total > 1, step, 0)
        return i + 1, tau + step, step

    def moves(state: tuple) -> Array:
        i, _, step = state
        # As long as any row moves: all rows of a block step together.
        return (i < steps) & jnp.any(step > smallest_step)

    # Logits count from their maximum, so tau lies in [-1, 0) however large they are.
    _, tau, _ = jax.lax.while_loop(moves, newton_step, (0, zero - 1, zero + 1))
    return tau, m


def _above(
    s: Array,
    seen: Array | None,
    tau: Array,
    m: Array,
    alpha: float | Array,
) -> Array:
    """How far (alpha - 1) s is above the threshold, 0 below it: a weight to the power alpha - 1."""
    return jnp.maximum((alpha - 1) * (masked(s, seen) - m) - tau, 0)


def _by_logarithms(y: Array, alpha: float | Array) -> tuple[Array, Array, Array]:
    """y^(1 / (alpha - 1)), its power 2 - alpha, its logarithm; zeros where y is 0. NaN stays."""
    log_weight = jnp.log(jnp.where(y == 0, 1, y)) / (alpha - 1)
    weight = jnp.where(y == 0, 0, jnp.exp(log_weight))
    u = jnp.where(y == 0, 0, jnp.exp((2 - alpha) * log_weight))
    return weight, u, log_weight
