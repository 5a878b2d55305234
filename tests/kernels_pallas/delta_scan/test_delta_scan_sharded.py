"""delta_scan cut along T over devices equals delta_scan on one: values, final state, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import F32, case_of, fast_jit, weights_for
from helpers import rel_rms, slow
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.ops import delta_scan, delta_scan_sharded

# A document over all of device 1, one that begins with device 2, one that begins inside device 3; a
# row without any.
SEGMENTS = np.array([[0] * 8 + [1] * 2 + [0] * 14 + [2] * 8 + [1] * 3 + [3] * 5, [7] * 40])
NAMES = ["Gated DeltaNet-2", slow("KDA, segments"), slow("Gated DeltaNet")]
NAMES += [slow("DeltaNet, segments"), slow("KDA, mixture of decays"), slow("grouped keys")]


def on_one(x, segment_ids, weights):
    def loss(x):
        o, state = delta_scan(**x, segment_ids=segment_ids, return_final_state=True)
        return (o * weights[0]).sum() + (state * weights[1]).sum(), (o, state)

    return jax.value_and_grad(loss, has_aux=True)(x)


def on_many(x, segment_ids, weights):
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    time = P(None, "context")
    specs = {n: P() if n == "initial_state" else time for n in x}

    @jax.shard_map(
        mesh=mesh, in_specs=(specs, time, (time, P())), out_specs=(P(), (time, P())), check_vma=True
    )
    def loss(x, segment_ids, weights):
        scan = partial(delta_scan_sharded, axis_name="context", chunk_size=4)
        o, state = scan(**x, segment_ids=segment_ids, return_final_state=True)
        of_o = jax.lax.psum((o * weights[0]).sum(), "context")
        return of_o + (state * weights[1]).sum(), (o, state)

    return jax.value_and_grad(lambda x: loss(x, segment_ids, weights), has_aux=True)(x)


@pytest.mark.parametrize("name", NAMES)
def test_many_devices_equal_one(name):
    inputs, options = case_of(name)
    segment_ids = jnp.asarray(SEGMENTS) if "segment_ids" in options else None
    x = {n: jnp.float32(a) for n, a in inputs.items()}
    weights = tuple(map(jnp.float32, weights_for(inputs)))
    if segment_ids is None:
        segment_ids = jnp.zeros((2, 40), jnp.int32)
    got = fast_jit(on_many)(x, segment_ids, weights)
    want = fast_jit(on_one)(x, segment_ids, weights)
    errors = jax.tree.map(rel_rms, got, want)
    assert max(jax.tree.leaves(errors)) < 3 * F32, errors


def test_a_document_of_nan_stays_on_its_devices():
    inputs, _ = case_of("Gated DeltaNet-2")
    x = {n: jnp.float32(a) for n, a in inputs.items()}
    x["v"] = x["v"].at[0, 9].set(jnp.nan)
    weights = tuple(map(jnp.float32, weights_for(inputs)))
    got = fast_jit(on_many)(x, jnp.asarray(SEGMENTS), weights)
    want = fast_jit(on_one)(x, jnp.asarray(SEGMENTS), weights)
    (_, (o, state)), gradients = got
    (_, (want_o, want_state)), _ = want
    assert (np.isnan(o) == np.isnan(want_o)).all()
    assert (
        np.isfinite(o[0, 10:]).all() and np.isfinite(state).all() and np.isfinite(want_state).all()
    )
    assert np.isfinite(gradients["v"][0, 10:]).all() and np.isfinite(gradients["v"][1]).all()
