"""What the ops share: where they are imported from, how they multiply, how rows are split."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gatedjax.ops
import kernels_pallas.attention as attention_package
import kernels_pallas.linear_scan as linear_scan_package
import kernels_pallas.ops
from kernels_pallas.common.mesh import _sizes_within
from kernels_pallas.common.padding import padded, padded_to_multiples, power_of_two, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.rows import row_by_row


def test_packages_of_ops_are_not_hidden_by_their_functions():
    assert isinstance(attention_package, types.ModuleType)
    assert isinstance(linear_scan_package, types.ModuleType)
    assert attention_package.attention is kernels_pallas.ops.attention


def test_ops_are_the_same_from_both_packages():
    assert gatedjax.ops.__all__ == kernels_pallas.ops.__all__
    for name in gatedjax.ops.__all__:
        assert getattr(gatedjax.ops, name) is getattr(kernels_pallas.ops, name)
        assert name in gatedjax.ops.__doc__


def test_bfloat16_is_one_pass_unless_more_is_asked_for():
    x = jnp.zeros(2, jnp.bfloat16)
    assert one_bfloat16_pass(x, x)
    assert not one_bfloat16_pass(x, x.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        assert not one_bfloat16_pass(x, x)


def test_padding():
    x = jnp.ones((3, 5))
    assert padded(x, 1, 5) is x
    assert padded(x, 0, 4).shape == (4, 5)
    assert padded_to_multiples(x, 2, 4).shape == (4, 8)
    assert [round_up(size, 8) for size in (1, 8, 9)] == [8, 8, 16]
    assert [power_of_two(size) for size in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("sizes", [[5, 0, 3, 4], [0, 0, 0, 0], [12, 0, 0, 0], [7, 9, 1, 0]])
def test_rows_of_groups_on_each_device(sizes):
    """Four devices of three rows: what they have of a group adds up to it, up to the last row."""
    parts = [_sizes_within(jnp.asarray(sizes), 12, 3 * device, 3) for device in range(4)]
    ends = np.minimum(np.cumsum(sizes), 12)
    np.testing.assert_array_equal(sum(parts), np.diff(ends, prepend=0))
    assert all(int(part.sum()) <= 3 for part in parts)


def test_rows_one_at_a_time():
    """Values and gradients of all rows, with arrays that are absent, and never two rows at once."""

    def compute(rows):
        x, absent = rows
        assert x.shape[0] == 1
        return x * jnp.cumsum(x, axis=1), absent

    x = jnp.arange(6.0).reshape(3, 2)

    def total(x):
        products, absent = row_by_row(compute, (x, None))
        assert absent is None
        return jnp.sum(products * products)

    np.testing.assert_array_equal(row_by_row(compute, (x, None))[0], x * jnp.cumsum(x, axis=1))
    expected = jax.grad(lambda x: jnp.sum((x * jnp.cumsum(x, axis=1)) ** 2))(x)
    np.testing.assert_allclose(jax.grad(total)(x), expected)
