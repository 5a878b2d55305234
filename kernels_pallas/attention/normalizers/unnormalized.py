"""Normalizers of one pass whose weights need not sum to 1. The contract is in `base.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    online_exp,
    relu,
    row_max,
    row_sum,
    visible,
)
from kernels_pallas.attention.normalizers.singlepass import Elementwise, Summed


@dataclass(frozen=True)
class Exp(Elementwise):
    """exp(min(s, cap)), and no denominator (the recurrent view of softmax, arXiv 2507.23632).

    Something else then bounds the output: a norm over the head, or a gate. A logit above the cap
    has no gradient.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        _check_cap(self, self.cap)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        # No sum connects the keys of a row: each logit has its own gradient.
        p, slope = _capped_exp(self, masked(s, seen), self.cap)
        return p, slope * dp

    def _weights(self, s: Array, seen: Array | None) -> Array:
        p, _ = _capped_exp(self, masked(s, seen), self.cap)
        return p


@dataclass(frozen=True)
class ReluEntropy(Elementwise):
    """-relu(s) log relu(s): what ReLUFormer's loss sums over the keys; no attention of its own."""

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        x = relu(masked(s, seen))
        log_x = jnp.log(jnp.where(x == 0, 1, x))
        # Towards 0 the slope grows without bound; at 0 there is none.
        slope = jnp.where(x == 0, 0, -log_x - 1)
        return -x * log_x, slope * dp

    def _weights(self, s: Array, seen: Array | None) -> Array:
        x = relu(masked(s, seen))
        # 0 log 0 is 0.
        return -x * jnp.log(jnp.where(x == 0, 1, x))


@dataclass(frozen=True)
class _PerKeysSeen(Summed):
    """f(s) times a factor that depends on the number of keys that the row sees."""

    # A key whose logit is -inf is counted if it is seen.
    hidden_by_logit: ClassVar[bool] = False
    # ds needs nothing of the row but that factor.
    deltas: ClassVar[tuple[int, ...]] = ()

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        (count,) = row
        x, _ = self._value_and_slope(masked(s, seen))
        return Added((count + row_sum(visible(s, seen)),), None, (x,))

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
        return x * factor, slope * factor * dp


@dataclass(frozen=True)
class MeanExp(_PerKeysSeen):
    """exp(min(s, cap)) / n, n the keys that the row sees: `Exp`, with its "/ t" (2507.23632)."""

    cap: float = 5.0

    def __post_init__(self) -> None:
        _check_cap(self, self.cap)

    def _value_and_slope(self, s: Array) -> tuple[Array, Array]:
        return _capped_exp(self, s, self.cap)


@dataclass(frozen=True)
class ReluFormer(_PerKeysSeen):
    """relu(s) / sqrt(n / 2), n the keys that the row sees (ReLUFormer, arXiv 2302.06461).

    The variance of the output is then that of the values. The paper's learned gamma of every head
    divides too: a factor of the head's output, which the caller has.
    """

    def _value_and_slope(self, s: Array) -> tuple[Array, Array]:
        x = relu(s)
        # 0 or 1; NaN stays.
        return x, jnp.sign(x)

    def _factor(self, total: Array) -> Array:
        # 1 / sqrt(n / 2), and 0 for a row that sees nothing.
        return jnp.sqrt(2 * inverse(total))


@dataclass(frozen=True)
class PlainSelfAdjust(Softmax):
    """s softmax(s): `SelfAdjust` before its authors normalize it (arXiv 2502.18277).

    The denominator is the softmax's: the factors s are in the sum of values alone.
    """

    takes_sinks: ClassVar[bool] = False
    hidden_by_logit: ClassVar[bool] = False
    has_negative_weights: ClassVar[bool] = True

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        before, total = row
        s_seen = masked(s, seen)
        m, p, keep = online_exp(before, s_seen, row_max(s_seen), self.functions.exp)
        # 0 where p is: -inf * 0 would be NaN.
        s_finite = s if seen is None else jnp.where(seen, s, 0)
        return Added((m, keep * total + row_sum(p)), keep, (s_finite * p,))

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
        p = self.functions.exp(masked(s, seen) - finite(lse))
        s_finite = s if seen is None else jnp.where(seen, s, 0)
        # d (s_j p_j) / d s_k = [j = k] (1 + s_j) p_j - s_j p_j p_k
        return s_finite * p, p * (dp * (1 + s_finite) - deltas[0])


def _check_cap(normalizer: Normalizer, cap: Any) -> None:
    # Written so that NaN is refused too.
    if not 0 < cap < math.inf:
        name = type(normalizer).__name__
        raise ValueError(f"{name}: cap: got {cap}, expected a number above 0")


def _capped_exp(normalizer: Normalizer, s: Array, cap: float) -> tuple[Array, Array]:
    """exp(min(s, cap)) and its slope; NaN stays, which the minimum of a GPU would lose."""
    is_capped = s > cap
    value = normalizer.functions.exp(jnp.where(is_capped, cap, s))
    return value, jnp.where(is_capped, 0, value)
