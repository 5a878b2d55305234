"""delta_scan against its recurrence in float64: values, gradients, resets, NaN, bad input."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import (
    BF16,
    BF16_CORRELATED,
    CASES,
    SEGMENTS,
    case_of,
    compare,
    fast_jit,
    make,
    outputs_and_gradients,
    weights_for,
)
from helpers import rel_rms, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.delta_scan import reference, tile
from kernels_pallas.delta_scan.inputs import DeltaStepInputs, DeltaStepOptions
from kernels_pallas.ops import (
    delta_product_scan,
    delta_scan,
    delta_scan_step,
    rwkv7_scan,
    rwkv7_scan_step,
)

# What each has, a case beside it has together with documents or with more groups.
SLOW_CASES = ("DeltaNet", "Gated DeltaNet", "Gated DeltaNet, segments, grouped", "KDA")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_CASES else name for name in CASES])
def test_equals_the_recurrence(name):
    inputs, options = case_of(name)
    compare(inputs, **options)


def test_recurrence_equals_numpy():
    """The reference itself, written a second time with loops over tokens and heads."""
    x = make(B=1, T=9, H=4, Hq=2, Hk=1, rank=4)
    want = np.zeros((9, 4, 5))
    for h in range(4):
        S = x["initial_state"][0, h]
        for t in range(9):
            k = x["k"][0, t, 0]
            S = np.exp(x["log_decay"][0, t, h])[:, None] * S
            S = S + np.outer(k, x["beta"][0, t, h] * (x["v"][0, t, h] - k @ S))
            want[t, h] = 0.3 * x["q"][0, t, h // 2] @ S
    with jax.enable_x64(True):
        o = delta_scan(**jax.tree.map(jnp.asarray, x), scale=0.3, implementation="reference")
    assert rel_rms(o[0], want) < 1e-14


@pytest.mark.parametrize("rank", [slow(0), 3, slow(4)])
@pytest.mark.parametrize("cosine, tolerance", [(0.0, BF16), (0.9, BF16_CORRELATED)])
def test_bfloat16(rank, cosine, tolerance):
    inputs = make(T=64, K=16, V=16, rank=rank, cosine=cosine)
    compare(inputs, dtype=jnp.bfloat16, tolerance=tolerance, chunk_size=16)


@pytest.mark.parametrize("C", [1, 4, 64, slow(128)])
@pytest.mark.parametrize("cosine, beta", [(0.0, 1.0), (0.9, 1.0), (1.0, 2.0)])
def test_inverse_of_correlated_keys(C, cosine, beta):
    """Equal keys with beta 2: powers of the scores reach 1e18, the inverse stays below 2."""
    x = make(B=1, T=C, H=1, K=128, cosine=cosine, rank=0)
    keys = x["k"][0, :, 0]
    scores = np.tril(beta * keys @ keys.T, -1)
    want = np.linalg.inv(np.eye(C) + scores)
    got = tile.inverse(jnp.asarray(scores, jnp.float32), "highest")
    assert rel_rms(got, want) < 2e-6
    assert np.abs(want).max() <= 2.0 + 1e-12


def test_equal_keys_and_beta_two():
    """The hardest legal call: float32 rounds the truth itself, so the bar is wider."""
    compare(make(rank=0, cosine=1.0, beta=2.0), tolerance=2e-5)


@pytest.mark.parametrize("T", [1, slow(2), slow(63), 65, slow(64), slow(1000)])
def test_lengths(T):
    compare(make(B=1, T=T, rank=3), chunk_size=None)


@pytest.mark.slow
def test_chunk_size_does_not_matter():
    inputs, options = case_of("KDA, mixture of decays")
    results = [compare(inputs, **options, chunk_size=C) for C in (1, 4, 64)]
    for name in results[0]:
        assert rel_rms(results[1][name], results[0][name]) < 2e-6
        assert rel_rms(results[2][name], results[0][name]) < 2e-6


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    H = draw(st.sampled_from([1, 2, 4]))
    divisors = [d for d in (1, 2, 4) if H % d == 0]
    T = draw(st.integers(1, 33))
    inputs = make(
        draw(st.integers(0, 99)),
        B=draw(st.integers(1, 2)),
        T=T,
        H=H,
        Hq=draw(st.sampled_from(divisors)),
        Hk=draw(st.sampled_from(divisors)),
        K=draw(st.integers(1, 9)),
        V=draw(st.integers(1, 9)),
        rank=draw(st.sampled_from([0, 3, 4])),
        decay=draw(st.sampled_from(["gla", "mixture"])),
        rule=draw(st.sampled_from(["beta", "channels", "comba"])),
    )
    B = inputs["q"].shape[0]
    ids = np.array([draw(st.lists(st.integers(0, 2), min_size=T, max_size=T)) for _ in range(B)])
    # One channel makes a query's read a sum that may cancel.
    compare(inputs, segment_ids=ids, chunk_size=draw(st.sampled_from([2, 16])), tolerance=2e-5)


def test_packed_equals_separate():
    inputs, _ = case_of("KDA")
    together = delta_scan(**_float32(inputs), segment_ids=SEGMENTS, chunk_size=8)
    for row, ids in enumerate(SEGMENTS):
        # The first document starts from the initial state; the others from an empty one.
        starts = [0, *(1 + np.flatnonzero(np.diff(ids))), len(ids)]
        for first, end in itertools.pairwise(starts):
            own = {n: x[row : row + 1, first:end] for n, x in inputs.items()}
            own["initial_state"] = inputs["initial_state"][row : row + 1] * (first == 0)
            alone = delta_scan(**_float32(own), chunk_size=8)
            assert rel_rms(together[row : row + 1, first:end], alone) < 2e-6


def test_prefill_and_decoding():
    """A prompt, then one token at a time, equals all tokens at once."""
    inputs, _ = case_of("Gated DeltaNet-2", T=12)
    x = _float32(inputs)
    want, want_state = delta_scan(**x, return_final_state=True, chunk_size=4)
    initial_state = x.pop("initial_state")
    prompt = jax.tree.map(lambda y: y[:, :7], x)
    o, state = delta_scan(**prompt, initial_state=initial_state, return_final_state=True)
    assert rel_rms(o, want[:, :7]) < 2e-6
    for implementation in ("xla", "reference"):
        running = state
        for t in range(7, 12):
            token = {n: y[:, t] for n, y in x.items()}
            o, running = delta_scan_step(**token, state=running, implementation=implementation)
            assert rel_rms(o, want[:, t]) < 2e-6
        assert rel_rms(running, want_state) < 2e-6


# --- what stays where it is


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "log_decay", "initial_state", "do"])
def test_non_finite_numbers_reach_only_what_sees_them(name, value):
    """Exactly where the recurrence has a non-finite number, values and gradients alike."""
    inputs = make(B=1, rank=3)
    weights = weights_for(inputs)
    token = (0, 20, 1)
    if name == "do":
        weights[0][(*token, 2)] = value
    elif name == "initial_state":
        inputs[name][0, 1, 2, 3] = value
    else:
        inputs[name][(*token, 2) if inputs[name].ndim == 4 else token] = value
    arrays = _float32(inputs), SEGMENTS[:1], tuple(map(jnp.float32, weights))
    got = outputs_and_gradients(*arrays, chunk_size=8, implementation="xla")
    want = outputs_and_gradients(*arrays, implementation="reference")
    bad = 0
    for key in want:
        finite = np.isfinite(want[key])
        assert (np.isfinite(got[key]) == finite).all(), key
        assert rel_rms(np.where(finite, got[key], 0), np.where(finite, want[key], 0)) < 2e-6
        bad += (~finite).sum()
    assert bad > 0
    # The third document of the row never sees the second one.
    assert np.isfinite(got["o"][0, 16:17] if name != "do" else got["v"][0, :2]).all()


def test_overflow_stays_in_its_document():
    """A state of infinity, from finite inputs, is gone with the next document."""
    inputs = make(B=1, rank=0)
    inputs["v"][0, 3] = 1e38
    inputs["beta"][0, 3] = 2.0
    inputs["k"][0, 3] = 1e3
    x = _float32(inputs)
    o = delta_scan(**x, segment_ids=SEGMENTS[:1], chunk_size=64)
    assert not np.isfinite(o[0, 3]).all()
    assert np.isfinite(o[0, :3]).all()
    assert np.isfinite(o[0, 16:]).all()


# --- where it runs


def test_under_vmap_remat_and_grad_of_grad():
    x = _float32(make(B=1, T=12, rank=3))

    def loss(x):
        return (delta_scan(**x, chunk_size=4, implementation="xla") ** 2).sum()

    def by_recurrence(x):
        return (delta_scan(**x, implementation="reference") ** 2).sum()

    many = jax.tree.map(lambda y: jnp.stack([y, 2 * y]), x)
    got = fast_jit(jax.vmap(jax.checkpoint(loss)))(many)
    want = fast_jit(jax.vmap(by_recurrence))(many)
    assert rel_rms(got, want) < 2e-6

    def norm_of_gradient(loss, x):
        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(x)))

    got = fast_jit(jax.grad(partial(norm_of_gradient, loss)))(x)
    want = fast_jit(jax.grad(partial(norm_of_gradient, by_recurrence)))(x)
    assert max(rel_rms(got[n], want[n]) for n in want) < 2e-5


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def temporaries(T):
        x = jax.eval_shape(lambda: _float32(make(B=1, T=T, H=1, K=8, V=8)))
        grad = jax.grad(lambda x: delta_scan(**x, implementation="xla").sum())
        return jax.jit(grad).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 5 * temporaries(512)


def test_token_by_token_keeps_few_states():
    """What every program sets aside for numbers that are not finite, used or not."""
    B, T, H, K, V = 1, 64, 1, 4, 4
    tokens = jax.eval_shape(lambda: _float32(make(B=B, T=T, H=H, K=K, V=V)))
    state = tokens.pop("initial_state")
    options = DeltaStepOptions(scale=1.0, l2_norm=False)
    arrays = [tokens.get(name) for name in DeltaStepInputs._fields[:7]]

    def largest_kept(recurrence, *block):
        def pullback(arrays, state):
            _, vjp = jax.vjp(
                lambda *x: recurrence(x[0], None, x[1], options, *block), arrays, state
            )
            return vjp

        return max(kept.size for kept in jax.tree.leaves(jax.eval_shape(pullback, arrays, state)))

    assert largest_kept(reference.recurrence) == T * B * H * K * V
    # The inputs, and a state before each block of 16 tokens.
    assert largest_kept(reference.recurrence_in_blocks, 16) == T * B * H * max(K, V)


# --- rules of several steps a token


def test_rwkv7():
    r = np.random.default_rng(0)
    B, T, H, K, V = 1, 11, 2, 4, 3
    q, k = r.normal(size=(2, B, T, H, K))
    v = r.normal(size=(B, T, H, V))
    removal = r.normal(size=(B, T, H, K))
    removal /= np.linalg.norm(removal, axis=-1, keepdims=True)
    rate = r.random((B, T, H, K))
    log_decay = -np.exp(-0.5) * r.random((B, T, H, K))
    ids = np.array([[0] * 6 + [1] * 5])
    want = np.zeros((B, T, H, V))
    for h in range(H):
        S = np.zeros((K, V))
        for t in range(T):
            if t and ids[0, t] != ids[0, t - 1]:
                S = np.zeros((K, V))
            kappa = removal[0, t, h]
            S = (np.diag(np.exp(log_decay[0, t, h])) - np.outer(kappa * rate[0, t, h], kappa)) @ S
            S = S + np.outer(k[0, t, h], v[0, t, h])
            want[0, t, h] = q[0, t, h] @ S
    arrays = [jnp.float32(x) for x in (q, k, v, log_decay, removal, rate)]
    o = rwkv7_scan(*arrays, segment_ids=ids, chunk_size=4)
    assert rel_rms(o, want) < 2e-6
    step = jax.jit(rwkv7_scan_step)
    state = jnp.zeros((B, H, K, V))
    for t in range(6):
        q_t, k_t, v_t, *gates = (x[:, t] for x in arrays)
        o_t, state = step(q_t, k_t, v_t, state, *gates)
        assert rel_rms(o_t, want[:, t]) < 2e-6
    with pytest.raises(ValueError, match="rwkv7_scan_step: rate: got shape"):
        rwkv7_scan_step(q_t, k_t, v_t, state, *gates[:2], gates[2][..., :1])


@pytest.mark.parametrize("gated", [False, True])
def test_delta_product(gated):
    r = np.random.default_rng(0)
    B, T, n, H, K, V = 1, 7, 3, 2, 4, 3
    q = r.normal(size=(B, T, H, K))
    k = r.normal(size=(B, T, n, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = r.normal(size=(B, T, n, H, V))
    beta = 2 * r.random((B, T, n, H))
    log_decay = -r.random((B, T, H)) if gated else None
    want = np.zeros((B, T, H, V))
    for h in range(H):
        S = np.zeros((K, V))
        for t in range(T):
            S = S * np.exp(log_decay[0, t, h]) if gated else S
            for i in range(n):
                key = k[0, t, i, h]
                S = S + beta[0, t, i, h] * np.outer(key, v[0, t, i, h] - key @ S)
            want[0, t, h] = K**-0.5 * q[0, t, h] @ S
    arrays = [jnp.float32(x) for x in (q, k, v, beta)]
    decay = None if log_decay is None else jnp.float32(log_decay)
    o, state = delta_product_scan(*arrays, decay, return_final_state=True, chunk_size=4)
    assert state.shape == (B, H, K, V)
    assert rel_rms(o, want) < 2e-6


# --- bad input

BAD = {
    "beta: got None": dict(beta=None),
    "beta: got shape (2, 40, 2) with erase and write": dict(
        erase=jnp.zeros((2, 40, 2, 8)), write=jnp.zeros((2, 40, 2, 5))
    ),
    "k: got shape": dict(k=jnp.zeros((2, 40, 3, 8))),
    "q: got dtype int32": dict(q=jnp.zeros((2, 40, 2, 8), jnp.int32)),
    "log_decay: got shape (2,)": dict(log_decay=jnp.zeros(2)),
    "erase: got shape": dict(erase=jnp.zeros((2, 40, 2, 7))),
    "initial_state: got shape": dict(initial_state=jnp.zeros((2, 2, 8, 4))),
    "segment_ids: got": dict(segment_ids=jnp.zeros((2, 40))),
    "chunk_size: got 24": dict(chunk_size=24),
    "interpret: got True": dict(interpret=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = _float32(make()) | BAD[message]
    with pytest.raises(ValueError, match="delta_scan: ") as error:
        delta_scan(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def _float32(inputs):
    return {n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()}
