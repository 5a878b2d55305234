"""The short convolution, its SiLU, and the gradient that it has of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms

from gatedjax.layers.conv import causal_conv

B, T, F = 2, 9, 5
SEGMENT_IDS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3, 3, 3, 3]], np.int32)


def draw(width, seed=0):
    """x, kernel, bias and a gradient of y."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, F), (width, F), (F,), (B, T, F)]
    return [rng.normal(size=shape) for shape in shapes]


def formula(x, kernel, bias, segment_ids, is_activated):
    """Token by token, in float64."""
    width = kernel.shape[0]
    y = np.zeros(x.shape) + bias
    for b, t, w in np.ndindex(x.shape[0], x.shape[1], width):
        source = t - (width - 1) + w
        if source >= 0 and segment_ids[b, source] == segment_ids[b, t]:
            y[b, t] += kernel[w] * x[b, source]
    return y / (1 + np.exp(-y)) if is_activated else y


def results(arrays, segment_ids, is_activated, dtype):
    """y and the gradients of x, kernel and bias; these two are float32."""
    x, kernel, bias, dy = (jnp.asarray(z, jnp.float32) for z in arrays)

    def call(x, kernel, bias):
        return causal_conv(x, kernel, segment_ids, None, bias, is_activated=is_activated)[0]

    y, pull_back = jax.vjp(call, x.astype(dtype), kernel, bias)
    assert y.dtype == dtype
    return [y, *pull_back(dy.astype(dtype))]


# More taps than tokens, one tap.
@pytest.mark.parametrize("width", [4, 11, 1])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("is_activated", [True, False])
def test_values_and_gradients(is_activated, is_packed, width):
    arrays = draw(width)
    segment_ids = SEGMENT_IDS if is_packed else np.ones_like(SEGMENT_IDS)
    given = dict(zip(("x", "kernel", "bias"), arrays))
    y, *gradients = results(
        arrays,
        jnp.asarray(segment_ids) if is_packed else None,
        is_activated,
        jnp.float32,
    )
    assert rel_rms(y, formula(**given, segment_ids=segment_ids, is_activated=is_activated)) < 1e-6

    def number(given):
        z = formula(**given, segment_ids=segment_ids, is_activated=is_activated)
        return (z * arrays[-1]).sum()

    check_gradients(number, given, dict(zip(given, gradients)))


def test_bfloat16_is_rounded_once_on_the_way_forward_and_twice_on_the_way_back():
    """And gradients of kernel and bias, of 4,096 tokens that pull in one direction, are summed in
    float32.
    """
    rng = np.random.default_rng(1)
    arrays = [rng.normal(1.0, 1.0, size=s) for s in [(2, 2048, 8), (4, 8), (8,), (2, 2048, 8)]]
    arrays = [np.asarray(jnp.asarray(z, jnp.bfloat16), np.float64) for z in arrays]
    segment_ids = jnp.asarray(rng.integers(1, 3, size=(2, 1)) + np.arange(2048) // 100)
    found = results(arrays, segment_ids, True, jnp.bfloat16)
    with jax.enable_x64(True):
        x, kernel, bias, dy = (jnp.asarray(z) for z in arrays)

        def exact(x, kernel, bias):
            y = jnp.zeros_like(x) + bias
            for lag in range(4):
                back = jnp.roll(x, lag, 1)
                here = jnp.roll(segment_ids, lag, 1) == segment_ids
                here &= (jnp.arange(2048) >= lag)[None]
                y += jnp.where(here[..., None], back, 0) * kernel[3 - lag]
            return y / (1 + jnp.exp(-y))

        y, pull_back = jax.vjp(exact, x, kernel, bias)
        expected = [np.asarray(z) for z in (y, *pull_back(dy))]
    errors = [rel_rms(a, b) for a, b in zip(found, expected)]
    assert errors[0] < 1.8e-3, errors
    assert errors[1] < 2.5e-3, errors
    assert max(errors[2:]) < 2e-4, errors


@pytest.mark.parametrize("is_activated", [True, False])
def test_what_is_not_finite_stays_in_its_document(is_activated):
    """Values and gradients of x, before and behind it."""
    segment_ids = jnp.asarray(SEGMENT_IDS)
    x, kernel, bias, dy = draw(4)
    clean = results([x, kernel, bias, dy], segment_ids, is_activated, jnp.float32)
    x[0, 2], dy[0, 6], x[1, 0] = np.nan, np.inf, np.inf
    found = results([x, kernel, bias, dy], segment_ids, is_activated, jnp.float32)
    good = np.ones((B, T), bool)
    good[0, :8] = good[1, 0] = False
    for a, b in zip(found[:2], clean[:2]):
        np.testing.assert_array_equal(np.asarray(a)[good], np.asarray(b)[good])
    assert np.isnan(found[0][0, 2:5]).all() and np.isfinite(found[0][0, 5:]).all()


def test_a_tail_is_the_tokens_before():
    """Values and gradients of a row in two parts, as of the whole."""
    x, kernel, bias, dy = (jnp.asarray(z, jnp.float32) for z in draw(4))

    def whole(x, kernel):
        return causal_conv(x, kernel, None, None, bias, is_activated=True)[0]

    def in_parts(x, kernel):
        first, tail = causal_conv(x[:, :2], kernel, None, None, bias, is_activated=True)
        rest, _ = causal_conv(x[:, 2:], kernel, None, tail, bias, is_activated=True)
        return jnp.concatenate([first, rest], 1)

    for a, b in zip(jax.vjp(in_parts, x, kernel)[1](dy), jax.vjp(whole, x, kernel)[1](dy)):
        assert rel_rms(a, b) < 1e-6


def test_second_derivatives():
    x, kernel, bias, dy = (jnp.asarray(z, jnp.float32) for z in draw(3))
    segment_ids = jnp.asarray(SEGMENT_IDS)
    # With a tail of zeros nothing has a gradient of its own.
    tail = jnp.zeros((B, 2, F))

    def curvature(tail):
        def loss(x):
            y, _ = causal_conv(x, kernel, segment_ids, tail, bias, is_activated=True)
            return (y * dy).sum()

        return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

    assert rel_rms(curvature(None), curvature(tail)) < 1e-6
