"""Gradients through random bits against the exact gradient of a network of four, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.errors import InputError
from gatedjax.layers import stochastic_gate as gates

RNG = np.random.default_rng(0)
LOGITS = np.array([-2.0, -0.5, 0.3, 1.5])
W, B, OUT = RNG.normal(size=(4, 6)), RNG.normal(size=6), RNG.normal(size=6)
P = 1 / (1 + np.exp(-LOGITS))
ALL_BITS = np.array(list(itertools.product([0.0, 1.0], repeat=4)))
DRAWS = 20_000
# Standard deviations of a mean.
MOST = 5.0


def loss(h, xp=np):
    """(tanh(h W + b) w - 1)^2 of each row of h."""
    return (xp.tanh(h @ xp.asarray(W, h.dtype) + xp.asarray(B, h.dtype)) @ OUT - 1.0) ** 2


def slope(h):
    """dL / dh."""
    hidden = np.tanh(h @ W + B)
    return (2 * (hidden @ OUT - 1.0)[:, None] * (OUT * (1 - hidden**2))) @ W.T


def chances(p):
    return np.prod(np.where(ALL_BITS == 1, p, 1 - p), axis=-1)


def mean(values, p=P):
    """Over all sixteen draws."""
    return chances(p) @ values


EXACT = mean((ALL_BITS - P) * loss(ALL_BITS)[:, None])
ROOT = np.sqrt(P)
BASELINE = mean((ALL_BITS - P) ** 2 * loss(ALL_BITS)[:, None]) / mean((ALL_BITS - P) ** 2)


def variance(constant):
    """Of (h - p) (L - constant), for every unit."""
    estimates = (ALL_BITS - P) * (loss(ALL_BITS)[:, None] - constant)
    np.testing.assert_allclose(mean(estimates), EXACT, atol=1e-12)
    return mean(estimates**2) - EXACT**2


EXPECTED = {
    "one": mean(slope(ALL_BITS)),
    "sigmoid": mean(slope(ALL_BITS)) * P * (1 - P),
    "unbiased": EXACT,
    "least variance": EXACT,
    # d sqrt(p) / da = sqrt(p) (1 - p) / 2, where b is 1.
    "smooth": mean(slope(ALL_BITS * ROOT) * ALL_BITS, ROOT) * ROOT * (1 - P) / 2,
}


@pytest.fixture(scope="module")
def estimates():
    """Of many draws: every estimator's gradients [draws, 4], the bits, the baseline that is found
    from them, and gradients and values of rectifiers. One compilation.
    """
    key = jax.random.key(0)

    def through(gate):
        return lambda a: jnp.sum(loss(gate(a), jnp))

    def by_ratio(baseline):
        def total(a):
            bits = jax.lax.stop_gradient(gates.bernoulli_gate(key, a))
            losses = loss(bits, jnp)
            return jnp.sum(losses + gates.likelihood_ratio(bits, a, losses, baseline))

        return total

    totals = {
        "one": through(lambda a: gates.bernoulli_gate(key, a, "one")),
        "sigmoid": through(lambda a: gates.bernoulli_gate(key, a)),
        "unbiased": by_ratio(0.0),
        "least variance": by_ratio(jnp.asarray(BASELINE, jnp.float32)),
        "smooth": through(lambda a: gates.stochastic_times_smooth(key, a)),
    }

    def rectified(a, noise):
        h = gates.noisy_rectifier(key, a, noise)
        return jnp.sum(h), h

    @jax.jit
    def run(a):
        found = {k: jax.grad(f)(a) for k, f in totals.items()}
        bits = gates.bernoulli_gate(key, a)
        first = gates.first_baseline(4)
        baseline = gates.updated_baseline(first, bits, a, loss(bits, jnp))
        rectifier = jax.grad(rectified, has_aux=True)
        by_noise = {noise: rectifier(a, noise) for noise in ("logistic", "normal")}
        return found, bits, first.value, baseline.value, by_noise

    a = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, 4))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), run(a))


@pytest.mark.parametrize("name", EXPECTED)
def test_mean_is_that_of_all_draws(name, estimates):
    """Straight-through and smooth ones are biased, by as much as the formula says."""
    found = estimates[0][name]
    error = np.abs(found.mean(0) - EXPECTED[name])
    assert (error < MOST * found.std(0) / DRAWS**0.5 + 1e-6).all()


def test_what_is_biased_and_what_varies(estimates):
    """The unbiased ones vary more than straight-through ones; a baseline helps, this one most."""
    for name in ("one", "sigmoid", "smooth"):
        assert np.abs(EXPECTED[name] - EXACT).max() > 0.05 * np.abs(EXACT).max()
    least = variance(BASELINE)
    for constant in (0.0, mean(loss(ALL_BITS)), BASELINE + 0.1, BASELINE - 0.1):
        assert (variance(constant) > least).all()
    found = {name: values.var(0) for name, values in estimates[0].items()}
    np.testing.assert_allclose(found["unbiased"], variance(0.0), rtol=0.1)
    np.testing.assert_allclose(found["least variance"], least, rtol=0.1)
    assert found["sigmoid"].sum() < least.sum() < variance(0.0).sum()


def test_bits_are_bits_drawn_by_the_sigmoid(estimates):
    bits = estimates[1]
    assert set(np.unique(bits)) == {0.0, 1.0}
    np.testing.assert_allclose(bits.mean(0), P, atol=MOST * 0.5 / DRAWS**0.5)


def test_the_baseline_is_found_from_draws(estimates):
    assert not estimates[2].any()
    np.testing.assert_allclose(estimates[3], BASELINE, rtol=0.05)


def test_likelihood_ratio_adds_nothing_going_forward():
    a = jnp.array([[1e4, -1e4, 0.0, 3.0]])
    added, gradient = jax.jit(
        jax.value_and_grad(
            lambda a: gates.likelihood_ratio(jnp.ones((1, 4)), a, jnp.full(1, 7.0), 2.0)[0]
        )
    )(a)
    assert added == 0.0
    np.testing.assert_allclose(gradient[0], [0.0, 5.0, 2.5, 5 * (1 - 1 / (1 + np.exp(-3)))], 1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_is_its_formula(hard):
    """Values and gradients, given the noise; hard ones are the largest of any temperature."""
    key = jax.random.key(3)
    logits = np.array([[1.0, 0.2, -0.7], [0.0, 0.0, 2.0]])
    weights = np.array([0.3, -1.0, 2.0])
    tau = 0.4

    def number(z):
        y = gates.gumbel_softmax(key, z, tau, hard=hard)
        return jnp.sum(y * weights), y

    gradient, y = jax.jit(jax.grad(number, has_aux=True))(jnp.asarray(logits, jnp.float32))
    noise = np.asarray(jax.random.gumbel(key, (2, 3), jnp.float32), np.float64)
    soft = np.exp((logits + noise) / tau)
    soft /= soft.sum(-1, keepdims=True)
    expected = np.eye(3)[(logits + noise).argmax(-1)] if hard else soft
    np.testing.assert_allclose(y, expected, atol=1e-6)
    by_logits = soft * (weights - (soft * weights).sum(-1, keepdims=True)) / tau
    np.testing.assert_allclose(gradient, by_logits, atol=1e-5)


def test_temperature_falls_by_a_factor():
    found = [float(gates.annealed_temperature(step, 4.0, 0.25, 100)) for step in (0, 50, 100, 500)]
    np.testing.assert_allclose(found, [4.0, 1.0, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("noise", ["logistic", "normal"])
def test_noisy_rectifier_has_the_means_of_its_noise(noise, estimates):
    gradient, h = estimates[4][noise]
    # P(noise > -a), and its integral over a.
    points = np.linspace(-12.0, 0.0, 4001)
    if noise == "logistic":
        is_on, whole = P, np.log1p(np.exp(LOGITS))
    else:
        from scipy.special import ndtr

        is_on = ndtr(LOGITS)
        whole = np.trapezoid(ndtr(LOGITS[:, None] + points), points)
    np.testing.assert_allclose(gradient.mean(0), is_on, atol=MOST * 0.5 / DRAWS**0.5)
    np.testing.assert_allclose(h.mean(0), whole, atol=MOST * 1.9 / DRAWS**0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda k, a: gates.bernoulli_gate(k, a, "two"), "slope: got 'two', expected one of"),
        (lambda k, a: gates.noisy_rectifier(k, a, "pink"), "noise: got 'pink', expected one of"),
        (lambda k, a: gates.gumbel_softmax(k, a, 0.0), "temperature: got 0.0, expected a number"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(jax.random.key(0), jnp.zeros(3))
