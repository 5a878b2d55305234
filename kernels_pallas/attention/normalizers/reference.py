"""Every normalizer as its paper writes it, on whole rows of logits, for autodiff.

The truth that the tiles of the other files are tested against.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.attention.normalizers.base import Normalizer, Softmax, row_sum
from kernels_pallas.attention.normalizers.by_head import CenteredSoftmax, NormalizedPooling
from kernels_pallas.attention.normalizers.entmax import Entmax, LearnedEntmax
from kernels_pallas.attention.normalizers.multipass import (
    AdaptiveTemperature,
    ClippedSoftmax,
    ReweightedSoftplus,
)
from kernels_pallas.attention.normalizers.singlepass import (
    Relu,
    SelfAdjust,
    Sigmoid,
    Softpick,
    Softplus,
    StableMax,
)
from kernels_pallas.attention.normalizers.unnormalized import (
    Exp,
    MeanExp,
    PlainSelfAdjust,
    ReluEntropy,
    ReluFormer,
)


def weights(
    normalizer: Normalizer,
    s: Float[Array, "*batch T S"],
    seen: Bool[Array, "..."],
    sink: Float[Array, "..."] | None = None,
    parameters: Sequence[Float[Array, "..."]] = (),
) -> Float[Array, "*batch T S"]:
    """The weights of whole rows.

    Args:
      normalizer: one of those of `NORMALIZERS`, with any parameters.
      s: logits.
      seen: which keys a row sees; broadcasts against `s`. Rows that see nothing are zeros.
      sink: a logit without a value; broadcasts against `s`, softmax only.
      parameters: one for each of `normalizer.parameters`; broadcast against `s`. Their starts if
        there are none.

    Returns:
      The weights, 0 where a key is not seen.

    Raises:
      NotImplementedError: a normalizer that is not written down here.
    """
    if type(normalizer) not in _FORMULAS:
        name = type(normalizer).__name__
        raise NotImplementedError(
            f"attention: implementation='reference' has no formula for {name}"
        )
    # Masked logits are 0, not -inf: no gradient of theirs is 0 times infinity.
    s = jnp.where(seen, s, 0)
    if type(normalizer) is Softmax:
        return _softmax(s, seen, sink)
    formula = _FORMULAS[type(normalizer)]
    starts = normalizer.parameters.values()
    w = formula(normalizer, s, seen, *(parameters or starts))
    return jnp.where(seen, w, 0)


def log_sum_exp(
    s: Float[Array, "*batch T S"],
    seen: Bool[Array, "..."],
    sink: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch T 1"]:
    """log(exp(sink) + sum exp(s)) over the keys that a row sees; -inf if it sees nothing."""
    if sink is not None:
        # A key that every row sees.
        column = (*s.shape[:-1], 1)
        s = jnp.concatenate([s, jnp.broadcast_to(sink, column)], axis=-1)
        every = jnp.ones((*seen.shape[:-1], 1), bool)
        seen = jnp.concatenate([seen, every], axis=-1)
    m = lax.stop_gradient(_largest(s, seen))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - m, 0)), 0)
    total = row_sum(p)
    # The inner `where` keeps the derivative finite where there is nothing.
    return jnp.where(total == 0, -jnp.inf, m + jnp.log(jnp.where(total == 0, 1, total)))


def _softmax(
    s: Array,
    seen: Array,
    sink: Array | None = None,
) -> Array:
    m = _largest(s, seen)
    if sink is not None:
        m = jnp.maximum(m, sink)
    # The result does not depend on m.
    m = lax.stop_gradient(m)
    # The inner `where` keeps the exponential finite where it is not used.
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - m, 0)), 0)
    total = row_sum(p)
    if sink is not None:
        # A key with no value.
        total = total + jnp.exp(sink - m)
    return p / jnp.where(total == 0, 1, total)


def _sigmoid(
    normalizer: Sigmoid,
    s: Array,
    seen: Array,
) -> Array:
    assert normalizer.length is not None, "api.py fills it in"
    return jax.nn.sigmoid(s - jnp.log(normalizer.length))


def _relu(
    normalizer: Relu,
    s: Array,
    seen: Array,
) -> Array:
    assert normalizer.length is not None, "api.py fills it in"
    return _positive_part(s) ** normalizer.power / normalizer.length


def _softpick(
    normalizer: Softpick,
    s: Array,
    seen: Array,
) -> Array:
    # A constant of the row, as in the paper.
    m = lax.stop_gradient(jnp.maximum(_largest(s, seen), 0))
    # e^(s-m) - e^(-m), by expm1 and for either sign of s.
    expm1 = jnp.expm1(-jnp.abs(s))
    x = jnp.where(s > 0, -jnp.exp(s - m) * expm1, jnp.exp(-m) * expm1)
    total = row_sum(jnp.where(seen, jnp.abs(x), 0))
    return _positive_part(x) / (total + normalizer.eps)


def _self_adjust(
    normalizer: SelfAdjust,
    s: Array,
    seen: Array,
) -> Array:
    # argmin and argmax, so that of equal logits the first has the gradient.
    least_key = jnp.argmin(jnp.where(seen, s, jnp.inf), axis=-1, keepdims=True)
    most_key = jnp.argmax(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True)
    a = jnp.minimum(jnp.take_along_axis(s, least_key, axis=-1), 0)
    b = jnp.maximum(jnp.take_along_axis(s, most_key, axis=-1), 0)
    fraction = (s - a) / (b - a + 1e-10)
    return fraction * _softmax(s, seen)


def _stablemax(
    normalizer: StableMax,
    s: Array,
    seen: Array,
) -> Array:
    # The minimum keeps the branch that is not taken, and its gradient, finite.
    below = 1 / (1 - jnp.minimum(s, 0))
    value = jnp.where(s >= 0, s + 1, below)
    return _normalized(value, seen)


def _softplus(
    normalizer: Softplus | ReweightedSoftplus,
    s: Array,
    seen: Array,
) -> Array:
    return _normalized(jax.nn.softplus(s), seen)


def _clipped_softmax(
    normalizer: ClippedSoftmax,
    s: Array,
    seen: Array,
) -> Array:
    assert normalizer.length is not None, "api.py fills it in"
    gamma = -normalizer.alpha / normalizer.length
    stretched = (normalizer.zeta - gamma) * _softmax(s, seen) + gamma
    # Not `clip`, which has half a gradient at the bounds.
    at_most_one = jnp.where(stretched > 1, 1, stretched)
    return jnp.where(stretched < 0, 0, at_most_one)


def _reweighted_softplus(
    normalizer: ReweightedSoftplus,
    s: Array,
    seen: Array,
) -> Array:
    count = row_sum(seen.astype(s.dtype))
    # n A - 1; in rows of 3 keys or fewer n A.
    above_mean = _softplus(normalizer, s, seen) * count - (count > 3)
    x = _positive_part(above_mean)
    # Divided out: a constant factor of the row, which the sum takes out again.
    largest = lax.stop_gradient(_largest(x, seen))
    # What is left of a row whose weights are all equal is rounding error. NaN is not: it stays,
    # although XLA on a CPU may take the maximum of a row without its NaN.
    is_nothing = largest <= 1e-6
    x = jnp.where(is_nothing, 0 * x, x) / jnp.where(is_nothing, 1, largest)
    return _normalized(x**normalizer.power, seen)


def _adaptive_temperature(
    normalizer: AdaptiveTemperature,
    s: Array,
    seen: Array,
) -> Array:
    p = _softmax(s, seen)
    # 0 log 0 is 0.
    entropy = -row_sum(p * jnp.log(jnp.where(p > 0, p, 1)))
    coefficients = jnp.asarray(normalizer.polynomial, s.dtype)
    beta = jnp.maximum(jnp.polyval(coefficients, entropy), 1)
    beta = jnp.where(entropy > normalizer.threshold, beta, 1)
    # Of a weight of 0 the temperature's derivative is 0, and not 0 times infinity.
    is_nothing = s == -jnp.inf
    sharper = jnp.where(is_nothing, 0, s) * beta
    return _softmax(jnp.where(is_nothing, s, sharper), seen)


def _fixed_entmax(
    normalizer: Entmax,
    s: Array,
    seen: Array,
) -> Array:
    return _entmax(normalizer, s, seen, normalizer.alpha)


def _entmax(
    normalizer: Entmax | LearnedEntmax,
    s: Array,
    seen: Array,
    alpha: float | Array,
) -> Array:
    """Bisection of tau, then two Newton steps.

    The steps move tau no more. The first makes its gradient that of the exact root, the second its
    second derivative.
    """
    # Logits count from their maximum, so tau lies in [-1, 0).
    m = lax.stop_gradient(_largest(s, seen))
    z = (alpha - 1) * jnp.where(seen, s - m, 0)

    def above(tau: Array) -> Array:
        """relu(z - tau)."""
        return jnp.where(seen, _positive_part(z - tau), 0)

    def power(y: Array, exponent: float | Array) -> Array:
        """y^exponent, 0 at 0 with no gradient; NaN stays."""
        positive = jnp.where(y == 0, 1, y)
        return jnp.where(y == 0, 0, positive**exponent)

    def total(tau: Array) -> Array:
        return row_sum(power(above(tau), 1 / (alpha - 1)))

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        # The sum falls with tau.
        too_low = total(middle) >= 1
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low = jnp.full_like(s[..., :1], -1)
    high = jnp.zeros_like(low)
    tau, _ = lax.fori_loop(0, 60, halve, lax.stop_gradient((low, high)))
    tau = lax.stop_gradient(tau)
    for _ in range(2):
        slope = row_sum(power(above(tau), (2 - alpha) / (alpha - 1))) / (alpha - 1)
        # A row that sees nothing has slope 0.
        tau = tau + (total(tau) - 1) / jnp.where(slope == 0, 1, slope)
    return power(above(tau), 1 / (alpha - 1))


def _exp(
    normalizer: Exp | MeanExp,
    s: Array,
    seen: Array,
) -> Array:
    return jnp.exp(jnp.where(s > normalizer.cap, normalizer.cap, s))


def _mean_exp(
    normalizer: MeanExp,
    s: Array,
    seen: Array,
) -> Array:
    return _exp(normalizer, s, seen) / _count(s, seen)


def _reluformer(
    normalizer: ReluFormer,
    s: Array,
    seen: Array,
) -> Array:
    return _positive_part(s) / jnp.sqrt(_count(s, seen) / 2)


def _relu_entropy(
    normalizer: ReluEntropy,
    s: Array,
    seen: Array,
) -> Array:
    x = _positive_part(s)
    # 0 log 0 is 0, with no gradient.
    return -x * jnp.log(jnp.where(x == 0, 1, x))


def _plain_self_adjust(
    normalizer: PlainSelfAdjust,
    s: Array,
    seen: Array,
) -> Array:
    return s * _softmax(s, seen)


def _normalized_pooling(
    normalizer: NormalizedPooling,
    s: Array,
    seen: Array,
    gain: float | Array,
    bias: float | Array,
) -> Array:
    count = _count(s, seen)
    mean = row_sum(s) / count
    centered = jnp.where(seen, s - mean, 0)
    variance = row_sum(centered**2) / count
    # Of equal logits the deviation is 0, and counts as a constant.
    is_varied = variance != 0
    std = jnp.where(is_varied, jnp.sqrt(jnp.where(is_varied, variance, 1)), 0)
    return gain * centered / (std + normalizer.eps) + bias


def _centered_softmax(
    normalizer: CenteredSoftmax,
    s: Array,
    seen: Array,
    beta: float | Array,
    gamma: float | Array,
) -> Array:
    return beta * _softmax(s, seen) - gamma / _count(s, seen)


_FORMULAS: dict[type[Normalizer], Callable[..., Any]] = {
    Softmax: _softmax,
    Sigmoid: _sigmoid,
    Relu: _relu,
    Softpick: _softpick,
    SelfAdjust: _self_adjust,
    StableMax: _stablemax,
    Softplus: _softplus,
    ClippedSoftmax: _clipped_softmax,
    ReweightedSoftplus: _reweighted_softplus,
    AdaptiveTemperature: _adaptive_temperature,
    Entmax: _fixed_entmax,
    LearnedEntmax: _entmax,
    Exp: _exp,
    MeanExp: _mean_exp,
    ReluFormer: _reluformer,
    ReluEntropy: _relu_entropy,
    PlainSelfAdjust: _plain_self_adjust,
    NormalizedPooling: _normalized_pooling,
    CenteredSoftmax: _centered_softmax,
}


def _positive_part(x: Array) -> Array:
    """relu(x), with NaN's gradient where x is NaN: that of `jax.nn.relu` is 0 there."""
    return jnp.where(x <= 0, 0, x)


def _largest(s: Array, seen: Array) -> Array:
    """The row's largest seen logit; 0 in a row that sees none."""
    m = jnp.max(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True)
    # Not where m is -inf: of a row that sees only that, softmax is NaN.
    return jnp.where(jnp.any(seen, axis=-1, keepdims=True), m, 0)


def _count(s: Array, seen: Array) -> Array:
    """How many keys a row sees, in the dtype of the logits; 1 where it sees none."""
    return jnp.maximum(row_sum(jnp.broadcast_to(seen, s.shape).astype(s.dtype)), 1)


def _normalized(x: Array, seen: Array) -> Array:
    """x over the sum of what is seen."""
    x = jnp.where(seen, x, 0)
    total = row_sum(x)
    return x / jnp.where(total == 0, 1, total)
