"""Rows of a table, and the table's gradient where one token is far more common than the others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import MeshConfig
from gatedjax.layers.token_rows import token_rows
from gatedjax.sharding import RULES, make_mesh

VOCAB = 16


def test_rows_zeros_and_nan():
    table = jax.random.normal(jax.random.key(0), (VOCAB, 8))
    tokens = jnp.asarray([[3, 15, 0, 2], [VOCAB, -1, 5, 5]])
    segment_ids = jnp.asarray([[1, 1, 2, 0], [1, 1, 1, 0]])
    x = token_rows(table, tokens, segment_ids, jnp.bfloat16)
    assert x.dtype == jnp.bfloat16
    rows = np.asarray(table.astype(jnp.bfloat16))
    np.testing.assert_array_equal(x[0], [*rows[[3, 15, 0]], np.zeros(8)])
    assert np.isnan(np.asarray(x[1, :2])).all()
    np.testing.assert_array_equal(x[1, 2:], [rows[5], np.zeros(8)])


@pytest.mark.parametrize(
    "mesh, bound",
    [
        (None, 1e-6),
        ({"fsdp": 8}, 1e-6),
        # Of several devices, sums are added in bfloat16.
        ({"data": 2, "tensor": 4}, 4e-3),
        ({"context": 4, "expert": 2}, 4e-3),
    ],
)
def test_gradients_of_a_common_token_add_up(mesh, bound):
    """Half of 4,096 tokens are one, and all gradients of it have a sign."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((8, 512)) < 0.5, 7, rng.integers(VOCAB, size=(8, 512)))
    segment_ids = np.ones((8, 512), np.int32)
    segment_ids[:, 500:] = 0
    dx = jnp.asarray(rng.normal(1.0, 1.0, (8, 512, 16)), jnp.bfloat16)
    # Behind padding nothing is added, whatever it is.
    dx = dx.at[:, 500:].set(jnp.nan)
    expected = np.zeros((VOCAB, 16))
    np.add.at(expected, tokens[:, :500], np.asarray(dx[:, :500], np.float64))

    def gradient(table):
        rows = lambda table: token_rows(table, tokens, jnp.asarray(segment_ids), jnp.bfloat16)
        return jax.vjp(rows, table)[1](dx)[0]

    table = jnp.zeros((VOCAB, 16), jnp.float32)
    if mesh is None:
        actual = jax.jit(gradient)(table)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(**mesh))), nn.logical_axis_rules(RULES):
            actual = jax.jit(gradient)(table)
    assert rel_rms(actual, expected) < bound
