"""The projection's own gradient is that of the einsum it computes, for one and for several axes on
either side.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import rel_rms

from gatedjax.layers.projection import contract


@pytest.mark.parametrize(
    "x, kernel, formula",
    [
        ((2, 5, 6), (6, 3, 4), "btm,mhd->bthd"),
        ((2, 5, 3, 4), (3, 4, 6), "bthd,hdm->btm"),
        ((5, 6), (6, 7), "tm,mf->tf"),
    ],
)
def test_gradient_is_the_einsums(x, kernel, formula):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)
    axes = x.ndim + kernel.ndim - jnp.einsum(formula, x, kernel).ndim
    y, back = jax.vjp(lambda x, w: contract(x, w, axes // 2), x, kernel)
    expected, expected_back = jax.vjp(lambda x, w: jnp.einsum(formula, x, w), x, kernel)
    dy = jax.random.normal(keys[2], y.shape)
    for a, b in zip((y, *back(dy)), (expected, *expected_back(dy))):
        assert a.shape == b.shape and rel_rms(a, b) < 1e-6
