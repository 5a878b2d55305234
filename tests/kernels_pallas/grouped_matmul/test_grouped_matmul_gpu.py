"""The GPU kernels of `grouped_matmul`, in interpret mode: values and gradients against float64, any
group sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grouped_matmul import SIZES, G, M, assert_close, cast, draw, truth, value_and_gradients

from kernels_pallas.grouped_matmul.gpu import op as gpu
from kernels_pallas.ops import grouped_matmul

on_gpu = functools.partial(grouped_matmul, implementation="gpu", interpret=True)
run = jax.jit(functools.partial(value_and_gradients, f=on_gpu))


def check(arrays, sizes, tolerance=1e-6):
    actual = run(arrays, jnp.asarray(sizes, jnp.int32))
    assert_close(actual, truth(arrays, sizes), tolerance)
    beyond = sum(sizes)
    assert not np.any(actual["out"][beyond:]) and not np.any(actual["lhs"][beyond:])
    assert not np.any(actual["rhs"][np.asarray(sizes) == 0])


@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients(name):
    check(cast(draw(), jnp.float32), SIZES[name])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, M), min_size=G - 1, max_size=G - 1), st.integers(0, M))
def test_any_group_sizes(cuts, total):
    check(cast(draw(seed=total), jnp.float32), np.diff(np.minimum(np.sort([0, *cuts, M]), total)))


def test_bfloat16():
    check(cast(draw(), jnp.bfloat16), SIZES["unequal"], 2e-3)


def test_tiles_are_those_of_the_groups():
    """Each of ceil(size / tile) tiles once, then those of no group, then none."""
    group, first, end = gpu._tiles(jnp.asarray([5, 0, 9, 1]), 20, 4)
    live = [(int(g), int(f), int(e)) for g, f, e in zip(group, first, end) if g <= 4]
    assert live == [
        (0, 0, 5),
        (0, 4, 5),
        (2, 5, 14),
        (2, 9, 14),
        (2, 13, 14),
        (3, 14, 15),
        (4, 15, 20),
        (4, 19, 20),
    ]


@pytest.mark.slow
def test_a_planted_error_is_seen(monkeypatch):
    """A tile that begins one row too late."""
    tiles = gpu._tiles
    monkeypatch.setattr(gpu, "_tiles", lambda *a: (tiles(*a)[0], tiles(*a)[1] + 1, tiles(*a)[2]))
    arrays = cast(draw(), jnp.float32)
    out = on_gpu(arrays["lhs"], arrays["rhs"], jnp.asarray(SIZES["unequal"]))
    assert rel_rms(np.nan_to_num(out), truth(arrays, SIZES["unequal"])["out"]) > 1e-2
