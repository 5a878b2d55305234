"""The projection's own gradient is that of the einsum it computes, for one and for several axes on
either side.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import rel_rms

from gatedjax.config import MeshConfig
from gatedjax.layers.projection import contract
from gatedjax.sharding import make_mesh


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


def test_a_gradient_that_a_mesh_scatters_is_the_same():
    """Heads to the model's width, which fsdp cuts."""
    x = jax.random.normal(jax.random.key(0), (8, 3, 2, 4))
    kernel = jax.random.normal(jax.random.key(1), (2, 4, 16))

    def gradient(names, x, kernel):
        return jax.grad(lambda w: jnp.sum(jnp.sin(contract(x, w, 2, names))))(kernel)

    expected = gradient((), x, kernel)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        scattered = jax.jit(gradient, static_argnums=0)(("heads", "head_dim", "embed"), x, kernel)
    assert scattered.shape == expected.shape and rel_rms(scattered, expected) < 1e-6
