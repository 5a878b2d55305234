"""The TPU kernels of `grouped_matmul`, in interpret mode: values and gradients against float64, any
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_grouped_matmul import (
    SIZES,
    G,
    K,
    M,
    N,
    assert_close,
    cast,
    draw,
    truth,
    value_and_gradients,
)

from kernels_pallas import dispatch
from kernels_pallas.grouped_matmul.tpu import (
    op as tpu,
)
from kernels_pallas.grouped_matmul.tpu import (
    outer as tpu_outer,
)
from kernels_pallas.grouped_matmul.tpu import (
    per_row as tpu_per_row,
)
from kernels_pallas.grouped_matmul.tpu import (
    rows as tpu_rows,
)
from kernels_pallas.grouped_matmul.tpu import (
    tiles as tpu_tiles,
)
from kernels_pallas.grouped_matmul.tpu import (
    tuning as tpu_tuning,
)
from kernels_pallas.ops import grouped_matmul

on_tpu = functools.partial(grouped_matmul, implementation="tpu", interpret=True)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Many small tiles, so that small arrays go every way through the kernels."""
    row = tpu_tuning.Tuning(
        cores=2, tile=64, part=16, outer_part=32, step=128, outer_step=(128, 128), vmem=2**26
    )
    monkeypatch.setattr(tpu_tuning, "tuned", lambda: row)


@functools.cache
def jitted():
    return jax.jit(functools.partial(value_and_gradients, f=on_tpu))


def check(arrays, sizes, tolerance=1e-6):
    actual = jitted()(arrays, jnp.asarray(sizes, jnp.int32))
    assert_close(actual, truth(arrays, sizes), tolerance)
    beyond = sum(sizes)
    assert not np.any(actual["out"][beyond:]) and not np.any(actual["lhs"][beyond:])
    assert not np.any(actual["rhs"][np.asarray(sizes) == 0])


@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients(name):
    """One compiled function for all group sizes: they are values of the run."""
    check(cast(draw(), jnp.float32), SIZES[name])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, M), min_size=G - 1, max_size=G - 1), st.integers(0, M))
def test_any_group_sizes(cuts, total):
    check(cast(draw(seed=total), jnp.float32), np.diff(np.minimum(np.sort([0, *cuts, M]), total)))


@pytest.mark.slow
def test_bfloat16_in_several_blocks():
    """Blocks of columns and of matmuls; results are rounded once."""
    rng = np.random.default_rng(0)
    arrays = cast(
        {"lhs": rng.normal(size=(100, 200)), "rhs": rng.normal(size=(3, 200, 300))}, jnp.bfloat16
    )
    sizes = [37, 0, 60]
    expected = dict(zip(("out", "lhs", "rhs"), wide_truth(arrays, sizes)))
    actual = jitted()(arrays, jnp.asarray(sizes))
    assert all(x.dtype == jnp.bfloat16 for x in actual.values())
    assert_close(actual, expected, 2e-3)


@pytest.mark.slow
def test_cores_that_share_columns():
    """An odd number of blocks of K, an even one of N: the gradient of the matrices by columns."""
    rng = np.random.default_rng(0)
    arrays = cast(
        {"lhs": rng.normal(size=(100, 100)), "rhs": rng.normal(size=(3, 100, 200))}, jnp.bfloat16
    )
    sizes = [37, 0, 60]
    options = tpu.OuterOptions("drhs", True)
    cotangent = np.random.default_rng(9).normal(size=(100, 200))
    inputs = tpu.OuterInputs([arrays["lhs"]], jnp.asarray(cotangent, jnp.bfloat16), sizes)
    found = tpu.outer_by_group(options, inputs._replace(group_sizes=jnp.asarray(sizes)))
    assert rel_rms(found, wide_truth(arrays, sizes)[2]) < 2e-3


def test_schedules_of_outer(monkeypatch):
    """Two cores share whatever they divide, and no width is cut into many small steps."""
    monkeypatch.setattr(tpu_tuning, "tuned", lambda: tpu_tuning.TUNED["TPU v5"])

    def schedule(K: int, N: int) -> tpu_outer.Schedule:
        rows = lambda width: jax.ShapeDtypeStruct((32768, width), jnp.bfloat16)
        return tpu_tuning.outer_schedule(tpu_outer.OuterInputs([rows(K)], rows(N), None))

    even = schedule(1536, 2048)
    assert (even.columns_first, even.inner) == (False, 768)
    odd = schedule(1408, 2048)
    assert (odd.columns_first, odd.columns, odd.step) == (True, 1024, (1408, 1024))
    assert schedule(2048, 1408).step == (1024, 1408)
    assert not schedule(1408, 1408).columns_first  # one core does all


def wide_truth(arrays, sizes):
    lhs, rhs = (np.asarray(arrays[name], np.float64) for name in ("lhs", "rhs"))
    cotangent = np.random.default_rng(9).normal(size=(len(lhs), rhs.shape[2]))
    cotangent = np.asarray(jnp.asarray(cotangent, jnp.bfloat16), np.float64)
    group = np.repeat(np.arange(len(sizes) + 1), [*sizes, len(lhs) - sum(sizes)])
    one_hot = (group[:, None] == np.arange(len(sizes))).astype(float)
    return (
        np.einsum("mg,mk,gkn->mn", one_hot, lhs, rhs, optimize=True),
        np.einsum("mg,mn,gkn->mk", one_hot, cotangent, rhs, optimize=True),
        np.einsum("mg,mk,mn->gkn", one_hot, lhs, cotangent, optimize=True),
    )


def test_float16_and_one_row():
    arrays = cast(draw(1), jnp.float16)
    out = jax.jit(on_tpu)(arrays["lhs"], arrays["rhs"], np.asarray([0, 0, 1, 0, 0]))
    assert out.dtype == jnp.float16
    assert rel_rms(out, truth(arrays, [0, 0, 1, 0, 0])["out"]) < 1e-3


def test_vmap():
    """Over rows, matrices and group sizes together."""
    batch = [
        (draw(40, seed=i), sizes) for i, sizes in enumerate(([20, 0, 15, 1, 4], [1, 1, 1, 1, 1]))
    ]
    stacked = jax.tree.map(
        lambda *x: jnp.asarray(np.stack(x), jnp.float32), *(arrays for arrays, _ in batch)
    )
    run = jax.jit(jax.vmap(functools.partial(value_and_gradients, f=on_tpu)))
    actual = run(stacked, jnp.asarray([sizes for _, sizes in batch], jnp.int32))
    for i, (arrays, sizes) in enumerate(batch):
        assert_close({name: x[i] for name, x in actual.items()}, truth(arrays, sizes), 1e-6)


def test_shard_map():
    """Every device sorts its own rows; the matrices are the same everywhere, so their gradient is
    summed.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sizes = np.asarray([[5, 0, 3, 9, 2], [1, 1, 17, 1, 4]])
    rng, own = np.random.default_rng(0), [draw(24, seed=i) for i in range(2)]
    arrays = {"lhs": np.concatenate([a["lhs"] for a in own]), "rhs": rng.normal(size=(G, K, N))}
    mapped = jax.shard_map(
        lambda lhs, rhs, sizes: on_tpu(lhs, rhs, sizes[0]),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
        check_vma=True,
    )
    actual = jax.jit(functools.partial(value_and_gradients, f=mapped))(
        cast(arrays, jnp.float32), sizes
    )
    group = np.concatenate([np.repeat(np.arange(G + 1), [*s, 24 - sum(s)]) for s in sizes])
    one_hot = jnp.asarray(group[:, None] == np.arange(G), jnp.float32)
    dense = lambda lhs, rhs, _: jnp.einsum("mg,mk,gkn->mn", one_hot, lhs, rhs, precision="highest")
    expected = value_and_gradients(cast(arrays, jnp.float32), sizes, f=dense)
    assert_close(actual, expected, 1e-6)


def test_jit_on_a_mesh():
    """The op cuts sorted rows over the devices by itself: a group may lie on several, its gradient
    is summed.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    arrays, sizes = draw(96), [50, 0, 3, 30, 4]
    specs = {"lhs": P("data"), "rhs": P()}
    placed = {
        n: jax.device_put(x, NamedSharding(mesh, specs[n]))
        for n, x in cast(arrays, jnp.float32).items()
    }
    with jax.set_mesh(mesh):
        actual = jax.jit(functools.partial(value_and_gradients, f=on_tpu))(
            placed, jnp.asarray(sizes)
        )
    assert_close(actual, truth(arrays, sizes), 1e-6)


SHARING = [
    33,
    1,
    0,
    15,
    5,
]  # groups share registers; the fourth one's rows in its first and last fit into one


def kernels(sizes, interpret):
    """(out, drhs) of the two kernels alone, rows 80."""
    arrays = cast(draw(80), jnp.float32)
    dout = jnp.asarray(np.random.default_rng(9).normal(size=(80, N)), jnp.bfloat16).astype(
        jnp.float32
    )
    sizes = jnp.asarray(sizes, jnp.int32)
    options = tpu.RowsOptions("forward", interpret, (jnp.dtype(jnp.float32),))
    (out,), _ = jax.jit(functools.partial(tpu.rows_times_groups, options))(
        tpu.RowsInputs([arrays["lhs"]], [arrays["rhs"]], sizes)
    )
    drhs = jax.jit(functools.partial(tpu.outer_by_group, tpu.OuterOptions("drhs", interpret)))(
        tpu.OuterInputs([arrays["lhs"]], dout, sizes)
    )
    return {"out": out, "rhs": drhs}, {
        n: x for n, x in truth(arrays, sizes.tolist()).items() if n != "lhs"
    }


@pytest.mark.slow
def test_no_races():
    """With DMAs as late as they may be, memory that begins as NaN, and reads beyond an array
    refused.
    """
    strict = pltpu.InterpretParams(
        detect_races=True,
        dma_execution_mode="on_wait",
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    assert_close(*kernels(SHARING, strict), 1e-6)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


PLANTED = {
    "rows shared with the next group are lost": (
        tpu_rows,
        "_join_boundary",
        lambda *args: None,
        "out",
    ),
    "neighbors' rows are summed over": (tpu_outer, "_zero_neighbors", lambda *args: None, "rhs"),
    "last rows are left out, folded nowhere": (
        tpu_outer,
        "_fold_last_rows",
        lambda refs, tile: tpu_tiles.align_down(tile.used_rows(64)),
        "rhs",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_seen(error, monkeypatch):
    """Without the care for rows that share a register with another group, results are wrong, and
    the tests see it.
    """
    module, name, wrong, spoilt = PLANTED[error]
    monkeypatch.setattr(module, name, wrong)
    actual, expected = kernels(SHARING, True)
    errors = {n: rel_rms(np.nan_to_num(actual[n], nan=9.0), expected[n]) for n in expected}
    assert errors[spoilt] > 1e-2 and all(e < 1e-6 for n, e in errors.items() if n != spoilt), errors


def per_row(low, high):
    """(the numbers of 48 rows from row 112 on, row sums of their squares): of 300 rows, over the
    end of a line.
    """
    numbers, values = (
        jnp.arange(300.0),
        np.random.default_rng(0).normal(size=(48, 256)).astype(np.float32),
    )
    values[: low - 112] = values[high - 112 :] = np.nan  # a neighbor's rows may hold anything

    def kernel(lines, values, column, sums):
        column[...] = tpu_per_row.column(lines, 112, 48)
        sums[...] = jnp.ones(sums.shape)
        tpu_per_row.add_sums(sums, 112, values[...] ** 2, low, high)

    lines = tpu_per_row.in_lines(numbers)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((48, 1), lines.shape)]
    column, sums = pl.pallas_call(kernel, out_shape=shapes, interpret=True)(lines, values)
    return column[:, 0], sums.reshape(-1), values


def test_one_number_for_each_row():
    column, sums, values = per_row(115, 150)
    np.testing.assert_array_equal(column, np.arange(112, 160))
    expected = np.ones(384)
    expected[115:150] += np.sum(values[3:38].astype(np.float64) ** 2, axis=1)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


def test_sizes_of_a_tile():
    """Fine where groups end, coarse where a tile is nearly full; the last is the tile."""
    assert tpu_tuning._row_counts(512, 32) == (*range(32, 321, 32), 384, 448, 512)
    assert tpu_tuning._row_counts(64, 32) == (32, 64) and tpu_tuning._row_counts(
        32, 32
    ) == tpu_tuning._row_counts(32, 64) == (32,)


def test_what_ran_and_what_is_refused():
    arguments = jnp.zeros((4, 128), jnp.float32), jnp.zeros((2, 128, 128)), jnp.asarray([1, 3])
    jax.eval_shape(on_tpu, *arguments)
    assert dispatch.last_choice("grouped_matmul").implementation == "tpu"
    wide = (
        jax.ShapeDtypeStruct((4, 2**17), jnp.float32),
        jax.ShapeDtypeStruct((2, 2**17, 8), jnp.float32),
    )
    with pytest.raises(NotImplementedError, match="takes rows of up to"):
        jax.eval_shape(on_tpu, *wide, jax.ShapeDtypeStruct((2,), jnp.int32))
