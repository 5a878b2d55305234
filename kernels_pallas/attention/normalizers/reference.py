"""Every normalizer as its paper writes it, on whole rows of logits, for autodiff: the truth behind `normalizers/base.py`.

`weights(normalizer, s, seen, sink)`: [..., T, S] from logits s and the mask `seen`. Rows that see nothing are zeros.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.attention.normalizers.base import (
    Normalizer,
    Relu,
    SelfAdjust,
    Sigmoid,
    Softmax,
    Softpick,
    Softplus,
    StableMax,
)
from kernels_pallas.attention.normalizers.multipass import (
    AdaptiveTemperature,
    ClippedSoftmax,
    Entmax,
    ReweightedSoftplus,
)


def weights(normalizer: Normalizer, s: Array, seen: Array, sink: Array | None = None) -> Array:
    """Raises NotImplementedError for a normalizer that is not written down here."""
    if type(normalizer) not in _FORMULAS:
        raise NotImplementedError(
            f"attention: implementation='reference' has no formula for {type(normalizer).__name__}"
        )
    # Masked logits are 0, not -inf: no gradient of theirs is 0 times infinity.
    s = jnp.where(seen, s, 0)
    if isinstance(normalizer, Softmax):
        return _softmax(s, seen, sink)
    return jnp.where(seen, _FORMULAS[type(normalizer)](normalizer, s, seen), 0)


def _softmax(s: Array, seen: Array, sink: Array | None = None) -> Array:
    m = _largest(s, seen)
    m = lax.stop_gradient(m if sink is None else jnp.maximum(m, sink))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - m, 0)), 0)
    total = _sum(p) if sink is None else _sum(p) + jnp.exp(sink - m)
    return p / jnp.where(total == 0, 1, total)


def _sigmoid(normalizer: Sigmoid, s: Array, seen: Array) -> Array:
    return jax.nn.sigmoid(s - jnp.log(normalizer.length))


def _relu(normalizer: Relu, s: Array, seen: Array) -> Array:
    return jax.nn.relu(s) ** normalizer.power / normalizer.length


def _softpick(normalizer: Softpick, s: Array, seen: Array) -> Array:
    m = lax.stop_gradient(jnp.maximum(_largest(s, seen), 0))
    # e^(s-m) - e^(-m), of whichever sign s has.
    x = jnp.where(
        s > 0, -jnp.exp(s - m) * jnp.expm1(-jnp.abs(s)), jnp.exp(-m) * jnp.expm1(-jnp.abs(s))
    )
    return jax.nn.relu(x) / (_sum(jnp.where(seen, jnp.abs(x), 0)) + normalizer.eps)


def _self_adjust(normalizer: SelfAdjust, s: Array, seen: Array) -> Array:
    # argmin and argmax, so that of equal logits the first has the gradient.
    at = lambda where: jnp.take_along_axis(s, where, axis=-1)
    a = jnp.minimum(at(jnp.argmin(jnp.where(seen, s, jnp.inf), axis=-1, keepdims=True)), 0)
    b = jnp.maximum(at(jnp.argmax(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True)), 0)
    return (s - a) / (b - a + 1e-10) * _softmax(s, seen)


def _stablemax(normalizer: StableMax, s: Array, seen: Array) -> Array:
    return _normalized(jnp.where(s >= 0, s + 1, 1 / (1 - jnp.minimum(s, 0))), seen)


def _softplus(normalizer: Softplus, s: Array, seen: Array) -> Array:
    return _normalized(jax.nn.softplus(s), seen)


def _clipped_softmax(normalizer: ClippedSoftmax, s: Array, seen: Array) -> Array:
    gamma = -normalizer.alpha / normalizer.length
    stretched = (normalizer.zeta - gamma) * _softmax(s, seen) + gamma
    return jnp.where(stretched < 0, 0, jnp.where(stretched > 1, 1, stretched))


def _reweighted_softplus(normalizer: ReweightedSoftplus, s: Array, seen: Array) -> Array:
    count = _sum(seen.astype(s.dtype))
    x = jax.nn.relu(_softplus(normalizer, s, seen) * count - (count > 3))
    largest = lax.stop_gradient(_largest(x, seen))
    return _normalized(
        (jnp.where(largest > 1e-6, x, 0) / jnp.where(largest > 1e-6, largest, 1))
        ** normalizer.power,
        seen,
    )


def _adaptive_temperature(normalizer: AdaptiveTemperature, s: Array, seen: Array) -> Array:
    p = _softmax(s, seen)
    entropy = -_sum(p * jnp.log(jnp.where(p > 0, p, 1)))
    beta = jnp.maximum(jnp.polyval(jnp.asarray(normalizer.polynomial, s.dtype), entropy), 1)
    return _softmax(s * jnp.where(entropy > normalizer.threshold, beta, 1), seen)


def _entmax(normalizer: Entmax, s: Array, seen: Array) -> Array:
    """Bisection of tau; then one Newton step, which moves it no more and makes its gradient that of the exact root."""
    alpha = normalizer.alpha
    z = (alpha - 1) * jnp.where(seen, s - lax.stop_gradient(_largest(s, seen)), 0)
    above = lambda tau: jnp.where(seen, jax.nn.relu(z - tau), 0)
    power = lambda y, e: jnp.where(y > 0, jnp.where(y > 0, y, 1) ** e, 0)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        too_low = _sum(power(above(middle), 1 / (alpha - 1))) >= 1
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low = jnp.full_like(s[..., :1], -1)
    tau, _ = lax.fori_loop(0, 60, halve, lax.stop_gradient((low, jnp.zeros_like(low))))
    tau = lax.stop_gradient(tau)
    slope = lax.stop_gradient(_sum(power(above(tau), (2 - alpha) / (alpha - 1)))) / (alpha - 1)
    tau = tau + (_sum(power(above(tau), 1 / (alpha - 1))) - 1) / jnp.where(slope == 0, 1, slope)
    return power(above(tau), 1 / (alpha - 1))


_FORMULAS = {
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
    Entmax: _entmax,
}


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _largest(s: Array, seen: Array) -> Array:
    """The row's largest seen logit; 0 in a row that sees none."""
    m = jnp.max(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(m == -jnp.inf, 0, m)


def _normalized(x: Array, seen: Array) -> Array:
    x = jnp.where(seen, x, 0)
    return x / jnp.where(_sum(x) == 0, 1, _sum(x))
