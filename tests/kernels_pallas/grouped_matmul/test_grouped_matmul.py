"""`grouped_matmul` and the permutation around it: values and gradients against float64, and the
work really done.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.grouped_matmul import xla
from kernels_pallas.ops import grouped_matmul, permute_rows, sort_by_group

M, K, N, G = 200, 12, 20, 5
SIZES = {
    "unequal": [90, 3, 60, 17, 30],
    "empty ones": [0, 150, 0, 50, 0],
    "single rows": [1, 1, 196, 1, 1],
    "fewer than M": [20, 0, 33, 7, 15],
    "all in the last": [0, 0, 0, 0, 200],
    "none": [0, 0, 0, 0, 0],
}


def draw(rows=M, seed=0):
    rng = np.random.default_rng(seed)
    return {"lhs": rng.normal(size=(rows, K)), "rhs": rng.normal(size=(G, K, N))}


def cast(arrays, dtype):
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def value_and_gradients(arrays, group_sizes, f=grouped_matmul, **options):
    """{"out": out, "lhs": dlhs, "rhs": drhs}, for a fixed cotangent that bfloat16 can hold."""

    def loss(arrays, group_sizes):
        out = f(arrays["lhs"], arrays["rhs"], group_sizes, **options)
        cotangent = jnp.asarray(np.random.default_rng(9).normal(size=out.shape), jnp.bfloat16)
        return jnp.sum(
            out * cotangent.astype(out.dtype), dtype=jnp.promote_types(jnp.float32, out.dtype)
        ), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(
        arrays, jnp.asarray(group_sizes, jnp.int32)
    )
    return {"out": out, **gradients}


def truth(arrays, group_sizes):
    """One matmul a group, in numpy and float64."""
    lhs, rhs = (np.asarray(arrays[name], np.float64) for name in ("lhs", "rhs"))
    cotangent = np.asarray(
        jnp.asarray(np.random.default_rng(9).normal(size=(len(lhs), N)), jnp.bfloat16), np.float64
    )
    out, dlhs, drhs = np.zeros((len(lhs), N)), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for g, size in enumerate(group_sizes):
        rows = slice(start, start + size)
        out[rows], dlhs[rows], drhs[g] = (
            lhs[rows] @ rhs[g],
            cotangent[rows] @ rhs[g].T,
            lhs[rows].T @ cotangent[rows],
        )
        start += size
    return {"out": out, "lhs": dlhs, "rhs": drhs}


def assert_close(actual, expected, tolerance):
    errors = {name: rel_rms(actual[name], expected[name]) for name in expected}
    assert all(error < tolerance for error in errors.values()), errors


jitted = {
    x: jax.jit(lambda a, s, x=x: value_and_gradients(a, s, implementation=x))
    for x in ("xla", "reference")
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("implementation", jitted)
def test_values_and_gradients(name, implementation):
    """One compiled function for all group sizes: they are values of the run."""
    arrays, sizes = draw(), SIZES[name]
    actual = jitted[implementation](cast(arrays, jnp.float32), jnp.asarray(sizes, jnp.int32))
    assert_close(actual, truth(arrays, sizes), 1e-6)
    beyond = sum(sizes)
    assert not np.any(actual["out"][beyond:]) and not np.any(actual["lhs"][beyond:])
    assert not np.any(actual["rhs"][np.asarray(sizes) == 0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, M), min_size=G - 1, max_size=G - 1), st.integers(0, M))
def test_any_group_sizes(cuts, total):
    sizes = np.diff(np.minimum(np.sort([0, *cuts, M]), total))
    arrays = draw(seed=total)
    assert_close(
        jitted["xla"](cast(arrays, jnp.float32), jnp.asarray(sizes, jnp.int32)),
        truth(arrays, sizes),
        1e-6,
    )


@pytest.mark.parametrize(
    "rows, block", [(200, 8), (200, 64), (200, 256), (1, None), (3, None), (7, 8)]
)
def test_result_does_not_depend_on_tiles(rows, block, monkeypatch):
    if block:
        monkeypatch.setattr(xla, "block_rows", lambda M, G: block)
    arrays, sizes = draw(rows), np.random.default_rng(rows).multinomial(rows, np.ones(G) / G)
    assert_close(
        jax.jit(value_and_gradients)(cast(arrays, jnp.float32), sizes), truth(arrays, sizes), 1e-6
    )


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_bfloat16(preferred):
    """Sums are float32: the error is the rounding of the result, none if it is asked for in
    float32.
    """
    arrays = cast(draw(), jnp.bfloat16)
    run = jax.jit(lambda a, s: value_and_gradients(a, s, preferred_element_type=preferred))
    actual = run(arrays, jnp.asarray(SIZES["unequal"]))
    assert actual["out"].dtype == (preferred or jnp.bfloat16)
    assert actual["lhs"].dtype == actual["rhs"].dtype == jnp.bfloat16
    expected = truth(arrays, SIZES["unequal"])
    assert_close(actual, expected, 2.5e-3)
    if preferred:
        assert rel_rms(actual["out"], expected["out"]) < 1e-6


def test_work_does_not_grow_with_groups(monkeypatch):
    """Counts the rows that are multiplied while it runs: M, and less than a tile of padding a
    group, three times.
    """
    multiplied = []
    matmul = xla._matmul

    def counted(subscripts, x, y):
        jax.debug.callback(lambda: multiplied.append(x.shape[0]))
        return matmul(subscripts, x, y)

    monkeypatch.setattr(xla, "_matmul", counted)
    monkeypatch.setattr(xla, "block_rows", lambda M, G: 16)
    run = jax.jit(lambda a, s: value_and_gradients(a, s))
    for sizes in SIZES.values():
        multiplied.clear()
        jax.block_until_ready(run(cast(draw(), jnp.float32), jnp.asarray(sizes, jnp.int32)))
        jax.effects_barrier()
        assert sum(multiplied) == 3 * 16 * sum(-(-size // 16) for size in sizes)
        assert sum(multiplied) < 3 * (M + G * 16)


def test_vmap():
    """Over rows, matrices and group sizes together."""
    batch = [
        (draw(seed=i), SIZES[name])
        for i, name in enumerate(("unequal", "fewer than M", "single rows"))
    ]
    stacked = jax.tree.map(
        lambda *x: jnp.asarray(np.stack(x), jnp.float32), *(arrays for arrays, _ in batch)
    )
    actual = jax.jit(jax.vmap(value_and_gradients))(
        stacked, jnp.asarray([sizes for _, sizes in batch], jnp.int32)
    )
    for i, (arrays, sizes) in enumerate(batch):
        assert_close({name: x[i] for name, x in actual.items()}, truth(arrays, sizes), 1e-6)


def test_shard_map():
    """Every device sorts its own rows; the matrices are the same everywhere, so their gradient is
    summed.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays = draw(8 * 24)
    sizes = np.random.default_rng(0).multinomial(
        20, np.ones(G) / G, size=8
    )  # 20 of 24 rows on each device

    def on_device(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes[0])

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
        check_vma=True,
    )
    run = jax.jit(lambda a, s: value_and_gradients(a, s, f=mapped))
    # The truth of the whole: a mask of rows and groups.
    row_groups = np.concatenate([np.repeat(np.arange(G + 1), [*s, 4]) for s in sizes])
    one_hot = jnp.asarray(row_groups[:, None] == np.arange(G), jnp.float32)
    dense = lambda lhs, rhs, _: jnp.einsum("mg,mk,gkn->mn", one_hot, lhs, rhs)
    arrays = cast(arrays, jnp.float32)
    assert_close(
        run(arrays, sizes),
        jax.jit(lambda a, s: value_and_gradients(a, s, f=dense))(arrays, sizes),
        1e-6,
    )


def test_jit_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays, sizes = cast(draw(), jnp.float32), SIZES["unequal"]
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, spec))
        for (name, x), spec in zip(arrays.items(), (P("data"), P()))
    }
    with jax.set_mesh(mesh):
        assert_close(
            jax.jit(value_and_gradients)(placed, jnp.asarray(sizes)), truth(draw(), sizes), 1e-6
        )


def test_sort_by_group():
    ids = jnp.asarray([2, 0, 4, 2, 1, 0, 4, 2])  # 4: no group
    order, inverse, group_sizes = sort_by_group(ids, 4)
    np.testing.assert_array_equal(order, [1, 5, 4, 0, 3, 7, 2, 6])
    np.testing.assert_array_equal(order[inverse], np.arange(8))
    np.testing.assert_array_equal(group_sizes, [2, 1, 3, 0])


@pytest.mark.parametrize("copies, first", [(1, False), (3, False), (3, True)])
def test_permute_rows(copies, first):
    """Values and gradient against repeat and take; the gradient has no scatter."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(10, 4)), jnp.float32)
    order, inverse, _ = sort_by_group(jnp.asarray(rng.integers(0, 5, 10 * copies)), 5)
    cotangent = jnp.asarray(rng.normal(size=(10 * copies, 4)), jnp.float32)
    copied = lambda x: jnp.tile(x, (copies, 1)) if first else jnp.repeat(x, copies, axis=0)
    naive = lambda x: copied(x)[order]
    ours = lambda x: permute_rows(x, order, inverse, copies_first=first)
    np.testing.assert_array_equal(ours(x), naive(x))
    np.testing.assert_array_equal(
        jax.jit(lambda: ours(np.asarray(x)))(), naive(x)
    )  # numpy is welcome
    gradient = jax.grad(lambda x, f: jnp.sum(f(x) * cotangent), argnums=0)
    assert rel_rms(gradient(x, ours), gradient(x, naive)) < 1e-6
    assert "scatter" in str(jax.make_jaxpr(lambda x: gradient(x, naive))(x))
    assert "scatter" not in str(jax.make_jaxpr(lambda x: gradient(x, ours))(x))
    np.testing.assert_array_equal(permute_rows(ours(x), inverse, order), copied(x))


def test_what_ran_is_reported():
    grouped_matmul(jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.asarray([1, 3]))
    assert dispatch.last_choice("grouped_matmul").implementation == "xla"


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_what_a_kernel_does_not_cover_is_refused(implementation):
    with jax.enable_x64(True):
        arguments = (
            jnp.zeros((4, 3), jnp.float64),
            jnp.zeros((2, 3, 5), jnp.float64),
            jnp.asarray([1, 3]),
        )
        with pytest.raises(
            NotImplementedError,
            match=f"grouped_matmul: implementation='{implementation}' .*float64",
        ):
            grouped_matmul(*arguments, implementation=implementation)


BAD = {
    "lhs: got shape (4,), expected [M, K]": dict(lhs=jnp.zeros(4)),
    "rhs: got shape (2, 4, 5), expected [G, 3, N]": dict(rhs=jnp.zeros((2, 4, 5))),
    "group_sizes: got shape (3,), expected (2,)": dict(group_sizes=jnp.asarray([1, 2, 1])),
    "group_sizes: got dtype float32": dict(group_sizes=jnp.ones(2)),
    "lhs: got dtype int32": dict(lhs=jnp.zeros((4, 3), int)),
    "rhs: got dtype bfloat16, expected float32": dict(rhs=jnp.zeros((2, 3, 5), jnp.bfloat16)),
    "preferred_element_type: got int32": dict(preferred_element_type=jnp.int32),
    "implementation: got 'fast'": dict(implementation="fast"),
    "interpret: got True": dict(interpret=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = dict(lhs=jnp.zeros((4, 3)), rhs=jnp.zeros((2, 3, 5)), group_sizes=jnp.asarray([1, 3]))
    with pytest.raises(ValueError) as error:
        grouped_matmul(**(good | BAD[message]))
    assert f"grouped_matmul: {message}" in str(error.value)


def test_bad_permutation_is_named():
    order = jnp.arange(6)
    with pytest.raises(ValueError, match="permute_rows: order: got shape"):
        permute_rows(jnp.zeros((4, 2)), order, order)
    with pytest.raises(ValueError, match="permute_rows: inverse: got shape"):
        permute_rows(jnp.zeros((3, 2)), order, order[:3])
    with pytest.raises(ValueError, match="sort_by_group: ids: got shape"):
        sort_by_group(jnp.zeros((2, 2), int), 3)


def test_second_derivatives_in_a_scan():
    """jax put the arguments among the residuals in each other's places (see `kept`)."""
    x, matrices, sizes = jnp.ones((1, 6, 3)), jnp.ones((1, 2, 3, 4)), jnp.array([4, 2])

    def length(arrays):
        def body(total, one):
            return total + jnp.sum(jnp.sin(grouped_matmul(*one, sizes))), None

        return jax.lax.scan(body, 0.0, arrays)[0]

    def of_gradient(arrays):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(length)(arrays)))

    shapes = jax.eval_shape(jax.grad(of_gradient), (x, matrices))
    assert [s.shape for s in shapes] == [x.shape, matrices.shape]
