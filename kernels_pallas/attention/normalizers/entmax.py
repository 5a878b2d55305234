"""alpha-entmax and sparsemax: sparse weights, by Newton's method on a row's threshold.

The contract is that of `base.py`.
"""

from collections.abc import Sequence
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
    ) -> Row:
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
                p, u = self._weights(s, seen, tau, m)
                return total + row_sum(p), slope + row_sum(u)

            total, slope = pass_over_keys((zero, zero), add)
            # d total / d tau = -slope / (alpha - 1)
            step = (total - 1) * (self.alpha - 1) * inverse(slope)
            # From the right of the root, which only rounding reaches, tau does not go back.
            step = jnp.where(total > 1, step, 0)
            return i + 1, tau + step, step

        def moves(state: tuple) -> Array:
            i, _, step = state
            # As long as any row moves: all rows of a block step together.
            return (i < self.steps) & jnp.any(step > smallest_step)

        # Logits count from their maximum, so tau lies in [-1, 0) however large they are.
        _, tau, _ = jax.lax.while_loop(moves, newton_step, (0, zero - 1, zero + 1))
        return tau, m

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
        y = jnp.maximum((self.alpha - 1) * (masked(s, seen) - m) - tau, 0)
        # y^(1 / (alpha - 1)) and y^((2 - alpha) / (alpha - 1)), which two cases have in short.
        if self.alpha == 2:
            # 0, 1 or NaN.
            return y, jnp.sign(y)
        if self.alpha == 1.5:
            return y * y, y
        # By logarithms; 0 stays 0, and NaN stays NaN.
        log_weight = jnp.log(jnp.where(y == 0, 1, y)) / (self.alpha - 1)
        weight = jnp.where(y == 0, 0, jnp.exp(log_weight))
        u = jnp.where(y == 0, 0, jnp.exp((2 - self.alpha) * log_weight))
        return weight, u
