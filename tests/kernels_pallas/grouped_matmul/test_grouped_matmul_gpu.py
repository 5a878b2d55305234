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
    plan = gpu.Plan(jnp.float32, True)
    group, first, end = gpu._tiles(plan, jnp.asarray([5, 0, 9, 1]), 20, 4)
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


def test_a_table_of_several_programs(monkeypatch):
    """Sizes that count rows beyond the last, and more tiles than a program finds."""
    plan, sizes = gpu.Plan(jnp.float32, True), jnp.asarray([7, 0, 30, 2, 90])
    at_once = gpu._tiles(plan, sizes, 100, 4)
    monkeypatch.setattr(gpu, "TABLE_ELEMENTS", 64)
    jax.tree.map(np.testing.assert_array_equal, gpu._tiles(plan, sizes, 100, 4), at_once)
    assert int(at_once.group.max()) == 6 and int((at_once.group == 4).sum()) == 16


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-3)])
def test_lengths_that_cross_two_blocks(dtype, tolerance):
    """Of rows, of the inner axis and of columns, in the kernels of either size of operands."""
    rng = np.random.default_rng(0)
    sizes = [300, 0, 1, 129]
    arrays = {"lhs": rng.normal(size=(450, 150)), "rhs": rng.normal(size=(4, 150, 140))}
    low = cast(arrays, dtype)
    got = jax.jit(lambda a: on_gpu(a["lhs"], a["rhs"], jnp.asarray(sizes)))
    vjp = jax.jit(lambda a, dout: jax.vjp(got, a)[1](dout)[0])
    dout = jnp.asarray(rng.normal(size=(450, 140)), dtype)
    want = {
        "out": np.zeros((450, 140)),
        "lhs": np.zeros((450, 150)),
        "rhs": np.zeros((4, 150, 140)),
    }
    x, w, d = (np.asarray(a, np.float64) for a in (low["lhs"], low["rhs"], dout))
    start = 0
    for g, size in enumerate(sizes):
        at = slice(start, start + size)
        want["out"][at], want["lhs"][at], want["rhs"][g] = (
            x[at] @ w[g],
            d[at] @ w[g].T,
            x[at].T @ d[at],
        )
        start += size
    assert_close({"out": got(low)} | vjp(low, dout), want, tolerance)


def test_what_is_not_finite_stays_in_its_group():
    """A row of one group, rows of none, and the matrix of another: forward and backward."""
    sizes = [90, 3, 60, 17, 20]  # 10 rows of no group
    arrays = {name: np.asarray(x, np.float32) for name, x in draw().items()}
    clean = run(arrays, jnp.asarray(sizes))
    for value in (np.nan, np.inf):
        bad = {name: x.copy() for name, x in arrays.items()}
        bad["lhs"][100, 3] = value  # of group 2
        bad["lhs"][190:] = value
        bad["rhs"][4, 1, 1] = value
        got = run(bad, jnp.asarray(sizes))
        rows = np.array([i for i in range(M) if i != 100 and not 170 <= i < 190])
        np.testing.assert_array_equal(got["out"][rows], clean["out"][rows])
        assert not np.isfinite(got["out"][100]).any()
        assert not np.isfinite(got["out"][170:190]).all()
        rows = np.array([i for i in range(M) if not 170 <= i < 190])
        np.testing.assert_array_equal(got["lhs"][rows], clean["lhs"][rows])
        groups = np.array([0, 1, 3, 4])
        np.testing.assert_array_equal(got["rhs"][groups], clean["rhs"][groups])
        assert not np.isfinite(got["rhs"][2]).all()


@pytest.mark.slow
def test_a_planted_error_is_seen(monkeypatch):
    """A tile that begins one row too late."""
    tiles = gpu._tiles
    late = lambda found: found._replace(first=found.first + 1)
    monkeypatch.setattr(gpu, "_tiles", lambda *args: late(tiles(*args)))
    arrays = cast(draw(), jnp.float32)
    out = on_gpu(arrays["lhs"], arrays["rhs"], jnp.asarray(SIZES["unequal"]))
    assert rel_rms(np.nan_to_num(out), truth(arrays, SIZES["unequal"])["out"]) > 1e-2
