"""linear_scan: values and gradients against the float64 recurrence; packing, decoding,
transformations, refusals.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scan_cases import (
    BF16,
    CASES,
    DECAYS,
    F32,
    MAKE_KEYS,
    OPTIONS,
    SEGMENTS,
    compare,
    fast_jit,
    make,
    total,
)

from kernels_pallas.linear_scan import tile
from kernels_pallas.ops import linear_scan, linear_scan_step


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_any_decay(rank, decay):
    compare(make(rank=rank, decay=decay), chunk_size=16)


@pytest.mark.parametrize("T", [1, slow(2), slow(63), slow(64), 65, slow(200)])
def test_any_length(T):
    compare(make(T=T, decay="mixture"), chunk_size=None if T < 3 else 4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rank", [3, 4])
def test_exclusive_with_bonus_and_segments(rank, decay):
    x = make(rank=rank, decay=decay, bonus=True)
    compare(x, segment_ids=SEGMENTS, inclusive=False)


SLOW_CASES = ("segments", "undecayed, exclusive", "scalar, normalize, reverse")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_CASES else name for name in CASES])
def test_options(name):
    case = dict(CASES[name])
    segment_ids = SEGMENTS if case.pop("segments", False) else None
    x = make(decay="mixture", **{n: case[n] for n in MAKE_KEYS if n in case})
    compare(x, segment_ids=segment_ids, **{n: case[n] for n in OPTIONS if n in case})


@pytest.mark.parametrize("rank", [slow(3), 4])
@pytest.mark.parametrize("decay", ["gla", "heavy tail"])
def test_bfloat16(rank, decay):
    compare(make(rank=rank, decay=decay), dtype=jnp.bfloat16, tolerance=BF16)


@pytest.mark.parametrize("rank", [3, 4])
def test_minus_infinity_is_a_decay_of_zero(rank):
    x = make(rank=rank, decay="mixture")
    infinite = x | {"log_decay": np.where(x["log_decay"] < -1000, -np.inf, x["log_decay"])}
    for a, b in zip(
        jax.tree.leaves(compare(infinite, chunk_size=16)),
        jax.tree.leaves(compare(x, chunk_size=16)),
    ):
        np.testing.assert_array_equal(a, b)


# --- what the tests above would miss: are they able to fail?


def flip_gradient(x):
    return 2 * jax.lax.stop_gradient(x) - x


PLANTED = {
    "state not read": lambda scores, reads, writes, total: (scores, 0 * reads, writes, total),
    "state not decayed": lambda scores, reads, writes, total: (
        scores,
        reads,
        writes,
        jnp.ones_like(total),
    ),
    "state gate gradient lost": lambda scores, reads, writes, total: (
        scores,
        reads,
        writes,
        jax.lax.stop_gradient(total),
    ),
    "reads 1e-5 too large": lambda scores, reads, writes, total: (
        scores,
        reads * (1 + 1e-5),
        writes,
        total,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [*PLANTED, "gate gradient flipped", "gate gradient of the read lost"]
)
@pytest.mark.parametrize("rank", [slow(3), 4])
def test_planted_errors_are_found(rank, error, monkeypatch):
    name = {3: "scalar_decay", 4: "vector_decay"}[rank]
    right = getattr(tile, name)

    def wrong(q, k, log_decay, log_read, precision):
        if error == "gate gradient flipped":
            log_decay, log_read = flip_gradient(log_decay), flip_gradient(log_read)
        if error == "gate gradient of the read lost":
            log_read = jax.lax.stop_gradient(log_read)
        return PLANTED.get(error, lambda *x: x)(*right(q, k, log_decay, log_read, precision))

    monkeypatch.setattr(tile, name, wrong)
    with pytest.raises(
        AssertionError, match=r"'o': |non-finite"
    ):  # an error of some size, not a crash
        compare(make(T=12, rank=rank), chunk_size=2, trace=error)


# --- the result does not depend on how the work is cut


@pytest.mark.parametrize("rank", [slow(0), slow(3), 4])
def test_chunk_size_does_not_matter(rank):
    x = {n: jnp.float32(a) for n, a in make(T=20, rank=rank).items()}
    run = fast_jit(partial(linear_scan, return_final_state=True), static_argnames="chunk_size")
    want = run(**x)
    for chunk_size in (1, 4, 128):
        for a, b in zip(run(**x, chunk_size=chunk_size), want):
            assert rel_rms(a, b) <= F32, chunk_size


@pytest.mark.parametrize("inclusive", [slow(True), False])
def test_packed_documents_equal_separate_ones(inclusive):
    x = make(T=40, bonus=not inclusive)
    x = {n: jnp.float32(a) for n, a in x.items()}
    state = x.pop("initial_state")
    lengths = (1, 16, 23)
    segment_ids = np.repeat([3, 1, 2], lengths)[None].repeat(2, 0)
    run = fast_jit(partial(linear_scan, inclusive=inclusive, return_final_state=True, chunk_size=4))
    packed, final = run(**x, initial_state=state, segment_ids=segment_ids)
    start = 0
    for length in lengths:
        part = {n: a if n == "bonus" else a[:, start : start + length] for n, a in x.items()}
        alone, alone_final = run(**part, initial_state=state)
        assert rel_rms(packed[:, start : start + length], alone) <= 1e-5
        state, start = jnp.zeros_like(state), start + length
    assert rel_rms(final, alone_final) <= 1e-5


def test_no_gradient_crosses_a_segment_boundary():
    x = {n: jnp.float32(a) for n, a in make(T=40, bonus=True).items()}
    segments = jnp.asarray(SEGMENTS)

    def last_segment(x):
        o = linear_scan(**x, inclusive=False, segment_ids=segments, chunk_size=4)
        return (o[:, 30:] ** 2).sum()

    gradients = fast_jit(jax.grad(last_segment))(x)
    for name in ("q", "k", "v", "log_decay"):
        assert not np.any(gradients[name][1, :30]) and np.any(gradients[name][1, 31:])
    assert not np.any(gradients["initial_state"])


# --- decoding


@pytest.mark.parametrize("implementation", ["xla", "reference", "tpu"])
@pytest.mark.parametrize(
    "options",
    [
        dict(rank=0),
        dict(rank=1, Hk=1),
        dict(rank=3, normalize=True),
        dict(rank=4, Hv=1, bonus=True, inclusive=False),
    ],
    ids=str,
)
def test_decoding_step_by_step_equals_the_scan(options, implementation):
    options = dict(options)
    static = {n: options[n] for n in ("normalize", "inclusive") if n in options}
    options.pop("inclusive", None)
    x = {n: jnp.float32(a) for n, a in make(T=12, **options).items()}
    want, want_state = fast_jit(partial(linear_scan, **static, return_final_state=True))(**x)
    state = x.pop("initial_state")
    step = fast_jit(
        partial(
            linear_scan_step,
            **static,
            implementation=implementation,
            interpret=implementation == "tpu",
        )
    )
    for t in range(12):
        token = {n: a[:, t] if a.ndim > 2 else a for n, a in x.items()}
        o, state = step(**token, state=state)
        assert rel_rms(o, want[:, t]) <= 1e-5
    assert rel_rms(state, want_state) <= F32
    assert o.dtype == jnp.float32 and state.dtype == jnp.float32


# --- transformations


def test_vmap():
    pairs = [
        {n: jnp.float32(a) for n, a in make(seed, T=20, bonus=True).items()} for seed in (1, 2)
    ]
    both = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
    gradient = fast_jit(jax.grad(partial(total, inclusive=False, chunk_size=4)))
    for got, want in zip(
        jax.tree.leaves(jax.vmap(gradient)(both)),
        jax.tree.leaves(both | jax.tree.map(lambda *a: jnp.stack(a), *map(gradient, pairs))),
    ):
        assert rel_rms(got, want) <= F32


def test_checkpoint_with_and_without_a_names_policy():
    x = {n: jnp.float32(a) for n, a in make(T=12).items()}
    loss = partial(total, chunk_size=2)
    want = fast_jit(jax.grad(loss))(x)
    for policy in (None, jax.checkpoint_policies.save_only_these_names("linear_scan_states")):
        got = fast_jit(jax.grad(jax.checkpoint(loss, policy=policy)))(x)
        assert (
            max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= F32
        )


def test_the_states_are_the_residual_with_a_name():
    x = {n: jnp.float32(a) for n, a in make(T=40).items()}
    jaxpr = str(jax.make_jaxpr(jax.grad(partial(total, chunk_size=8)))(x))
    assert "linear_scan_states" in jaxpr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [slow(0), 1, slow(4)])
def test_shard_map_with_varying_axes_checked(rank):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = {n: jnp.float32(a) for n, a in make(B=8, T=10, rank=rank, bonus=True).items()}
    # What belongs to a layer, not to a row of the batch, is replicated: its gradient is the sum
    # over the devices.
    specs = {n: P() if n == "bonus" or (n == "log_decay" and rank == 1) else P("data") for n in x}
    segment_ids = jnp.asarray(np.repeat(np.arange(5), 2)[None].repeat(8, 0))

    def loss(x, segment_ids):
        return (linear_scan(**x, inclusive=False, segment_ids=segment_ids, chunk_size=2) ** 2).sum()

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def sharded(x, segment_ids):
        return jax.value_and_grad(lambda x: jax.lax.psum(loss(x, segment_ids), "data"))(x)

    got, want = (
        fast_jit(sharded)(x, segment_ids),
        fast_jit(jax.value_and_grad(loss))(x, segment_ids),
    )
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= F32


def test_jit_on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = {n: jnp.float32(a) for n, a in make(B=4, T=12).items()}
    gradient = fast_jit(jax.value_and_grad(partial(total, chunk_size=2)))
    specs = {n: P("data", "model") if n == "initial_state" else P("data", None, "model") for n in x}
    placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in x.items()}
    got, want = gradient(placed), gradient(x)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= F32


@settings(max_examples=3, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = lambda *values: data.draw(st.sampled_from(values))
    B, T, K, V = draw(1, 3), data.draw(st.integers(1, 20)), draw(1, 5), draw(1, 2)
    H = draw(1, 2, 6)
    Hk, Hv = (
        data.draw(st.sampled_from([h for h in range(1, H + 1) if H % h == 0])) for _ in range(2)
    )
    x = make(B=B, T=T, H=H, Hk=Hk, Hv=Hv, K=K, V=V, rank=draw(0, 1, 3, 4), decay=draw(*DECAYS))
    segment_ids = np.sort(np.random.default_rng(T).integers(0, 3, size=(B, T)), axis=1)
    compare(
        x,
        segment_ids=draw(None, segment_ids),
        reverse=draw(False, True),
        chunk_size=draw(2, 4),
        tolerance=1e-5,
    )


# --- refusals


WRONG = {
    "q": dict(q=(2, 4, 2)),
    "k": dict(k=(2, 4, 2, 5)),
    "k ": dict(k=(2, 4, 3, 4)),
    "v": dict(v=(2, 5, 2, 3)),
    "q ": dict(q=(2, 0, 2, 4), k=(2, 0, 2, 4), v=(2, 0, 2, 3)),
    "log_decay": dict(log_decay=(2, 4, 4)),
    "bonus": dict(bonus=(4, 2)),
    "initial_state": dict(initial_state=(2, 2, 3, 4)),
    "segment_ids": dict(segment_ids=(2, 5)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_named(name):
    shapes = {"q": (2, 4, 2, 4), "k": (2, 4, 2, 4), "v": (2, 4, 2, 3)} | WRONG[name]
    arrays = {
        n: jnp.zeros(s, jnp.int32 if n == "segment_ids" else jnp.float32) for n, s in shapes.items()
    }
    name = name.strip()
    with pytest.raises(ValueError, match=rf"{name}: got shape .*expected") as error:
        linear_scan(**arrays, inclusive=False)
    assert str(shapes[name]) in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bonus=jnp.ones((2, 4))), "bonus: .*inclusive=True"),
        (dict(chunk_size=48), "chunk_size: got 48"),
        (dict(interpret=True), "interpret: got True"),
        (dict(implementation="cuda"), "implementation: got 'cuda'"),
        (dict(segment_ids=jnp.zeros((2, 4))), "segment_ids: got dtype float32"),
        (dict(log_decay=jnp.zeros(2, jnp.int32)), "log_decay: got dtype int32"),
    ],
)
def test_wrong_options_are_named(options, message):
    q, v = jnp.zeros((2, 4, 2, 4)), jnp.zeros((2, 4, 2, 3))
    with pytest.raises(ValueError, match=message):
        linear_scan(q, q, v, **options)


def test_a_decoding_state_of_the_wrong_shape_is_named():
    q, v = jnp.zeros((2, 2, 4)), jnp.zeros((2, 2, 3))
    with pytest.raises(
        ValueError, match=r"state: got shape \(2, 2, 4, 3\), expected \(2, 2, 4, 4\)"
    ):
        linear_scan_step(q, q, v, jnp.zeros((2, 2, 4, 3)), normalize=True)
