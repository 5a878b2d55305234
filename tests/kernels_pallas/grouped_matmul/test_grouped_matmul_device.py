"""grouped_matmul's kernels on the GPU of this machine: values and gradients (gpu_device.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_device import INTERPRET, TOLERANCE, needs_gpu, only_some_interpreted
from helpers import rel_rms

from kernels_pallas.ops import grouped_matmul

pytestmark = needs_gpu

# Rows of each group; tiles have 64 or 128. A tile and one row, two tiles, none, one row, and rows
# that belong to no group.
CROSSING = [129, 256, 0, 1, 65]
SPARE = 7
# No block divides them; above one block and above two.
WIDTHS = [(64, 128), (65, 129), (200, 72), (300, 260)]


def draw(group_sizes: list[int], K: int, N: int, dtype: str) -> tuple[jax.Array, ...]:
    """Rows, matrices, sizes, and the cotangent of the result."""
    random = np.random.default_rng(K + N)
    M = sum(group_sizes) + SPARE
    shapes = [(M, K), (len(group_sizes), K, N), (M, N)]
    lhs, rhs, cotangent = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    return lhs, rhs, jnp.asarray(group_sizes, jnp.int32), cotangent


def results(lhs, rhs, group_sizes, cotangent, **options) -> dict[str, jax.Array]:
    def call(lhs, rhs):
        return grouped_matmul(lhs, rhs, group_sizes, **options)

    out, vjp = jax.vjp(call, lhs, rhs)
    dlhs, drhs = vjp(cotangent)
    return {"out": out, "lhs": dlhs, "rhs": drhs}


def truth(lhs, rhs, group_sizes, cotangent) -> dict[str, jax.Array]:
    """In float64, of the same rounded numbers."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in (lhs, rhs, cotangent)]
        sizes = jnp.asarray(np.asarray(group_sizes))
        lhs, rhs, cotangent = arrays
        return results(lhs, rhs, sizes, cotangent, implementation="reference")


def compare(group_sizes: list[int], K: int, N: int, dtype: str) -> None:
    arrays = draw(group_sizes, K, N, dtype)
    got = results(*arrays, implementation="gpu", interpret=INTERPRET)
    errors = {name: rel_rms(got[name], want) for name, want in truth(*arrays).items()}
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    beyond = sum(group_sizes)
    assert not np.any(got["out"][beyond:])
    assert not np.any(got["lhs"][beyond:])
    assert not np.any(got["rhs"][np.asarray(group_sizes) == 0])


@pytest.mark.parametrize("K, N", WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_that_cross_blocks(dtype, K, N):
    only_some_interpreted((dtype, K) == ("float32", 65))
    compare(CROSSING, K, N, dtype)


@pytest.mark.parametrize("group_sizes", [[0, 0, 500], [1] * 70, [1000]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uneven_groups(dtype, group_sizes):
    only_some_interpreted(False)
    compare(group_sizes, 128, 96, dtype)


def test_two_runs_agree_to_the_bit():
    arrays = draw([500, 3, 900], 256, 384, "bfloat16")
    only_some_interpreted(False)
    first, second = (results(*arrays, implementation="gpu") for _ in range(2))
    for name, array in first.items():
        assert np.array_equal(array, second[name])
