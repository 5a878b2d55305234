"""linear_scan cut along T over devices equals linear_scan on one: values, final state,
gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scan_cases import F32, MAKE_KEYS, fast_jit, make

from kernels_pallas.linear_scan import sharded
from kernels_pallas.ops import linear_scan

# A segment over all of device 1, one that begins with device 2, one that begins inside device 3; a
# row without any.
SEGMENTS = np.array([[0] * 8 + [1] * 2 + [0] * 14 + [2] * 8 + [1] * 3 + [3] * 5, [7] * 40])
CASES = {
    "vector, exclusive, segments": dict(bonus=True, inclusive=False, segments=True),
    "vector, reverse, segments": dict(reverse=True, segments=True),
    "scalar, normalize": dict(rank=3, normalize=True),
    "scalar, exclusive, reverse, segments": dict(
        rank=3, inclusive=False, reverse=True, segments=True
    ),
    "constant, grouped": dict(rank=1, H=4, Hk=2, Hv=1),
    "no decay, segments": dict(rank=0, segments=True),
}
IN_TIME = ("q", "k", "v", "log_decay")


def weighted(scan, x, segment_ids, weights, **options):
    """A random weighting of o and of the final state, and both."""
    o, state = scan(**x, segment_ids=segment_ids, return_final_state=True, **options)
    return (o * weights[0]).sum(), (state * weights[1]).sum(), (o, state)


def on_one(x, segment_ids, weights, **options):
    def loss(x):
        of_o, of_state, out = weighted(linear_scan, x, segment_ids, weights, **options)
        return of_o + of_state, out

    return jax.value_and_grad(loss, has_aux=True)(x)


def on_many(x, segment_ids, weights, **options):
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    time = P(None, "context")
    specs = {n: time if n in IN_TIME and a.ndim > 2 else P() for n, a in x.items()}

    @jax.shard_map(
        mesh=mesh, in_specs=(specs, time, (time, P())), out_specs=(P(), (time, P())), check_vma=True
    )
    def loss(x, segment_ids, weights):
        scan = partial(sharded.linear_scan_sharded, axis_name="context", chunk_size=4)
        of_o, of_state, out = weighted(scan, x, segment_ids, weights, **options)
        return jax.lax.psum(of_o, "context") + of_state, out

    return jax.value_and_grad(lambda x: loss(x, segment_ids, weights), has_aux=True)(x)


def compare(name: str) -> None:
    case = dict(CASES[name])
    segment_ids = jnp.asarray(SEGMENTS) if case.pop("segments", False) else None
    x = {
        n: jnp.float32(a)
        for n, a in make(decay="gla", **{n: case[n] for n in MAKE_KEYS if n in case}).items()
    }
    options = {n: case[n] for n in ("inclusive", "reverse", "normalize") if n in case}
    r = np.random.default_rng(0)
    B, T, H, V = *x["q"].shape[:3], x["v"].shape[-1]
    weights = (
        jnp.float32(r.normal(size=(B, T, H, V))),
        jnp.float32(r.normal(size=x["initial_state"].shape)),
    )
    got, want = (
        fast_jit(partial(f, **options))(x, segment_ids, weights) for f in (on_many, on_one)
    )
    (_, got_out), (_, want_out) = got[0], want[0]
    errors = {n: rel_rms(got[1][n], want[1][n]) for n in x}
    errors |= {n: rel_rms(a, b) for n, a, b in zip(("o", "final state"), got_out, want_out)}
    assert max(errors.values()) <= F32, errors


SLOW_CASES = ("vector, reverse, segments", "constant, grouped")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_CASES else name for name in CASES])
def test_four_devices_equal_one(name):
    compare(name)


def test_a_state_that_is_not_passed_on_is_found(monkeypatch):
    right = sharded._exchange_states
    monkeypatch.setattr(sharded, "_exchange_states", lambda *a: (0 * right(*a)[0], right(*a)[1]))
    with pytest.raises(AssertionError, match="e-"):
        compare("vector, reverse, segments")
