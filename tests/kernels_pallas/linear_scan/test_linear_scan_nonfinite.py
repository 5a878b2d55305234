"""linear_scan with NaN and Inf: they reach the tokens that see them, and no other.

The recurrence, token by token, is the oracle of what sees what. What does not is to the bit what
it is without them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from scan_cases import fast_jit

from kernels_pallas.common.finite import any_nonfinite
from kernels_pallas.ops import linear_scan, linear_scan_sharded, linear_scan_step

T, H, K, V = 40, 2, 4, 3
SEGMENTS = np.repeat(np.arange(4), [17, 3, 13, 7])[None]
# A token inside the first segment, the last of one, and the first of the next.
PLACES = (3, 19, 20)


def numbers(rank, seed=0, bonus=False, normalize=False):
    r = np.random.default_rng(seed)

    def normal(*shape):
        return r.normal(size=shape).astype(np.float32)

    x = {"q": normal(1, T, H, K), "k": normal(1, T, 1, K), "v": normal(1, T, H, V)}
    if normalize:
        x["q"], x["k"] = np.abs(x["q"]), np.abs(x["k"])
    if rank:
        x["log_decay"] = -0.2 * np.abs(normal(*{3: (1, T, H), 4: (1, T, H, K)}[rank]))
    if bonus:
        x["bonus"] = normal(H, K)
    x["initial_state"] = normal(1, H, K, V + normalize)
    return x | {"do": normal(1, T, H, V), "dstate": normal(1, H, K, V + normalize)}


@partial(fast_jit, static_argnames=("segments", "implementation", "options"))
def run(x, segments, implementation, options=()):
    """Every output and gradient, by name."""
    cotangents = x["do"], x["dstate"]
    x = {name: value for name, value in x.items() if name not in ("do", "dstate")}

    def scan(x):
        return linear_scan(
            **x,
            segment_ids=SEGMENTS if segments else None,
            return_final_state=True,
            implementation=implementation,
            interpret=implementation == "tpu",
            chunk_size=None if implementation == "reference" else 16,
            **dict(options),
        )

    (o, state), vjp = jax.vjp(scan, x)
    (gradients,) = vjp(cotangents)
    return {"o": o, "final_state": state} | {f"d{name}": g for name, g in gradients.items()}


def spoiled(x, name, place, value=np.nan):
    x = {key: array.copy() for key, array in x.items()}
    if name == "overflow":  # finite, but their product is not
        x["k"][0, place], x["v"][0, place] = 1e20, 1e20
    elif name in ("initial_state", "dstate", "bonus"):
        x[name][(0,) * x[name].ndim] = value
    else:
        x[name][(0, place, 0, 0)[: x[name].ndim]] = value
    return x


def check(got, want, clean, clean_want, exact):
    """The same rows are finite as in the recurrence; those that it leaves as they were are so."""
    for name in got:
        arrays = [np.asarray(x[name]) for x in (got, want, clean, clean_want)]
        if arrays[0].ndim == 4 and name not in ("final_state", "dinitial_state"):
            arrays = [a.reshape(T, -1) for a in arrays]  # of a row, all heads together
        elif name == "dlog_decay":
            arrays = [a.reshape(T, -1) for a in arrays]
        else:
            arrays = [a.reshape(1, -1) for a in arrays]
        ours, theirs, before, theirs_before = arrays
        np.testing.assert_array_equal(
            np.isfinite(ours).all(1), np.isfinite(theirs).all(1), err_msg=name
        )
        same = (theirs == theirs_before).all(1)
        if exact:
            np.testing.assert_array_equal(ours[same], before[same], err_msg=name)
        else:
            np.testing.assert_allclose(ours[same], before[same], 1e-5, 1e-6, err_msg=name)


CASES = {
    "vector": (4, True, ()),
    "scalar": (3, True, ()),
    "no decay": (0, True, ()),
    "one segment": (4, False, ()),
    "exclusive": (3, True, (("inclusive", False),)),
    "reverse": (3, True, (("reverse", True),)),
    "normalize": (4, True, (("normalize", True),)),
}


@pytest.mark.parametrize("name", [n if n == "vector" else slow(n) for n in CASES])
def test_xla(name):
    rank, segments, options = CASES[name]
    x = numbers(rank, bonus=name == "exclusive", normalize=name == "normalize")
    reference = partial(run, segments=segments, implementation="reference", options=options)
    ours = partial(run, segments=segments, implementation="xla", options=options)
    clean, clean_want = ours(x), reference(x)
    for spoiled_name in x:
        for place in PLACES if x[spoiled_name].shape[1] == T else (0,):
            y = spoiled(x, spoiled_name, place)
            # Sums of logs in a chunk are rounded with those of other tokens in them.
            exact = spoiled_name != "log_decay"
            check(ours(y), reference(y), clean, clean_want, exact)


TPU_CASES = [slow("vector"), "scalar", slow("no decay"), slow("exclusive"), slow("reverse")]


@pytest.mark.parametrize("name", TPU_CASES)
def test_tpu(name):
    rank, segments, options = CASES[name]
    x = numbers(rank, bonus=name == "exclusive")
    reference = partial(run, segments=segments, implementation="reference", options=options)
    ours = partial(run, segments=segments, implementation="tpu", options=options)
    clean, clean_want = ours(x), reference(x)
    for i, spoiled_name in enumerate(x):
        y = spoiled(x, spoiled_name, PLACES[i % len(PLACES)])
        # The same operations; interpreted, XLA may contract a product and a sum differently.
        check(ours(y), reference(y), clean, clean_want, exact=False)


def test_tpu_computes_only_spoiled_rows_again():
    """Each row and group of heads at its own place; rows without NaN keep their bits."""
    r = np.random.default_rng(0)
    shapes = {"q": K, "k": K, "v": V, "do": V}
    x = {name: r.normal(size=(3, T, 2, d)).astype(np.float32) for name, d in shapes.items()}
    x["log_decay"] = -0.2 * np.abs(r.normal(size=(3, T, 2))).astype(np.float32)
    x["initial_state"], x["dstate"] = r.normal(size=(2, 3, 2, K, V)).astype(np.float32)
    y = {name: array.copy() for name, array in x.items()}
    y["v"][1, 18, 1, 0] = np.nan
    y["do"][2, 3, 0, 0] = np.inf
    ours = partial(run, segments=False, implementation="tpu")
    clean, got = ours(x), ours(y)
    want = run(y, False, "reference")
    for name in got:
        np.testing.assert_array_equal(got[name][0], clean[name][0], err_msg=name)
        # Of a token that sees NaN all channels are, which the recurrence has in some only.
        is_finite = np.isfinite(got[name])
        np.testing.assert_allclose(
            np.asarray(got[name])[is_finite],
            np.asarray(want[name])[is_finite],
            1e-4,
            1e-4,
            err_msg=name,
        )
    unseen = np.ones((3, T, 2, V), bool)
    unseen[1, 18:, 1, 0] = False
    np.testing.assert_array_equal(np.isfinite(got["o"]), unseen)
    # A cotangent goes back to the tokens before it, a value forth: each in its own head.
    for name in ("dq", "dk", "dv"):
        assert np.isfinite(got[name][2, 4:]).all() and np.isfinite(got[name][2, :, 1]).all(), name
        assert np.isfinite(got[name][1, :18, 1]).all() or name == "dk", name
        assert np.isfinite(got[name][1, :, 0]).all(), name


@pytest.mark.parametrize("implementation", ["xla", slow("tpu")])
@pytest.mark.parametrize("rank", [0, 3, 4])
def test_an_overflow_ends_with_its_segment(rank, implementation):
    """Finite inputs whose state overflows: later segments, and earlier tokens, do not see it."""
    if implementation == "tpu" and rank == 0:
        pytest.skip("as a scalar decay of 1")
    x = numbers(rank)
    clean = run(x, True, implementation)
    got = run(spoiled(x, "overflow", 3), True, implementation)
    names = [name for name in got if name not in ("final_state", "dinitial_state")]
    for name in names:
        np.testing.assert_allclose(
            np.asarray(got[name])[:, 17:], np.asarray(clean[name])[:, 17:], 1e-5, 1e-6, err_msg=name
        )
    np.testing.assert_allclose(got["o"][:, :3], clean["o"][:, :3], 1e-5)
    assert not np.isfinite(got["o"][:, 3:17]).all()


def test_vmap_keeps_one_flag():
    """A batched flag would turn the careful branch into one that is always computed."""
    jaxpr = jax.make_jaxpr(jax.vmap(any_nonfinite))(jnp.ones((3, 2)))
    assert jaxpr.out_avals[0].shape == (3,)
    x = numbers(3)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), x, spoiled(x, "v", 3))
    got = jax.vmap(lambda x: linear_scan(x["q"], x["k"], x["v"], segment_ids=SEGMENTS))(both)
    assert np.isfinite(got[0]).all()
    np.testing.assert_array_equal(got[1][:, 17:], got[0][:, 17:])


@pytest.mark.parametrize("rank", [slow(0), slow(3), 4])
def test_sharded(rank):
    """Tokens over two devices: a state with NaN or Inf of one goes to those that see it."""
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    x = numbers(rank)
    floats = {name: x[name] for name in ("q", "k", "v", "log_decay") if name in x}
    P = jax.P

    @jax.jit
    def values_and_gradients(floats, do):
        specs = P(None, "t")

        @partial(jax.shard_map, mesh=mesh, in_specs=(specs, specs), out_specs=specs)
        def scan(floats, segment_ids):
            return linear_scan_sharded(
                **floats, segment_ids=segment_ids, axis_name="t", implementation="xla"
            )

        o, vjp = jax.vjp(lambda floats: scan(floats, jnp.asarray(SEGMENTS)), floats)
        return {"o": o} | vjp(do)[0]

    clean = values_and_gradients(floats, x["do"])
    for name, place in (("v", 3), ("k", 18), ("q", 22), ("do", 21), ("overflow", 18)):
        y = spoiled(x, name, place)
        got = values_and_gradients({n: y[n] for n in floats}, y["do"])
        first, end = (0, 17) if place < 17 else (17, 20) if place < 20 else (20, 33)
        for n in got:
            for rows in (slice(0, first), slice(end, T)):
                np.testing.assert_allclose(
                    np.asarray(got[n])[:, rows], np.asarray(clean[n])[:, rows], 1e-5, 1e-6
                )
        assert not all(np.isfinite(g).all() for g in got.values())


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_step(implementation):
    """A row of the batch is a sequence of its own."""
    r = np.random.default_rng(0)
    q, k = r.normal(size=(2, 2, H, K)).astype(np.float32)
    v = r.normal(size=(2, H, V)).astype(np.float32)
    state = r.normal(size=(2, H, K, V)).astype(np.float32)
    step = partial(
        linear_scan_step, implementation=implementation, interpret=implementation == "tpu"
    )
    clean = step(q, k, v, state)
    v[0, 0, 0] = np.nan
    for got, want in zip(step(q, k, v, state), clean):
        np.testing.assert_array_equal(got[1], want[1])
        assert not np.isfinite(got[0]).all()
