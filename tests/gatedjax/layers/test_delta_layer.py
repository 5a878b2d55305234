"""DeltaAttention against its recurrence in float64 numpy, one token after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from random_parameters import random_parameters
from recurrent_gradients import assert_equals_differences

from gatedjax.config import DeltaAttentionConfig
from gatedjax.errors import InputError
from gatedjax.layers.delta import DeltaAttention
from gatedjax.layers.token_info import TokenInfo

B, T, M = 2, 9, 16
X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32))
KEY, ORDER = jax.random.key(0), np.arange(T)
BASE = dict(num_heads=4, key_dim=4, value_dim=6, chunk_size=4)
VARIANTS = {
    "DeltaNet": dict(decay="none", output_gate="none"),
    "Gated DeltaNet, grouped": dict(num_key_heads=2, conv_bias=True, norm_eps=1e-2),
    "negative eigenvalues, no convolution": dict(negative_eigenvalues=True, conv_width=0),
    "KDA": dict(decay="vector", decay_rank=3, output_gate="sigmoid", output_gate_rank=3),
    "safe gate": dict(decay="vector", decay_form="bounded", output_gate="sigmoid"),
    "Gated DeltaNet-2": dict(decay="vector", erase_and_write="channels", num_key_heads=2),
}
# Tested with their gradients.
OTHER_VARIANTS = {
    "DeltaProduct": dict(decay="none", num_householder=3, negative_eigenvalues=True, conv_width=2),
    "Gated DeltaProduct, grouped": dict(num_householder=2, num_key_heads=2, conv_bias=True),
    "Comba, grouped": dict(
        state_feedback=True,
        output_feedback=0.02,
        num_key_heads=2,
        output_gate="sigmoid",
    ),
    "output feedback alone": dict(output_feedback=1.0, decay="none", conv_width=0),
}


def make(config):
    module = DeltaAttention(config, 1e-5, 0.4, jnp.float32)
    return module, random_parameters(module, X)


@functools.cache
def jitted(module):
    return jax.jit(functools.partial(module.apply, method="with_cache"))


def call(module, params, x=X, cache=None, start=0, segment_ids=None):
    positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
    return jitted(module)({"params": params}, x, TokenInfo(positions, segment_ids), cache)


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def silu(y):
    return y * sigmoid(y)


def expected(c: DeltaAttentionConfig, params, x) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)

    def project(name, y=x):
        return np.tensordot(y, p[name]["kernel"], 1)

    def project_low(name, rank):
        return project(name) if rank is None else project(f"{name}_up", project(f"{name}_down"))

    q, k, v = project("query"), project("key"), project("value")
    if c.conv_width:
        flat = np.concatenate([y.reshape(*y.shape[:2], -1) for y in (q, k, v)], -1)
        w = p["conv"]
        padded = np.pad(flat, ((0, 0), (len(w) - 1, 0), (0, 0)))
        mixed = sum(padded[:, i : i + x.shape[1]] * w[i] for i in range(len(w)))
        mixed = silu(mixed + p["conv_bias"] if c.conv_bias else mixed)
        nq, nk = q[0, 0].size, k[0, 0].size
        q, k, v = (
            mixed[..., :nq].reshape(q.shape),
            mixed[..., nq : nq + nk].reshape(k.shape),
            mixed[..., nq + nk :].reshape(v.shape),
        )
    group = c.num_heads // c.key_heads
    b = sigmoid(p["state_feedback"]) if c.state_feedback else np.ones(c.key_heads)
    if c.output_feedback is not None:
        q = q - (p["output_feedback"] * b)[:, None] * k
    # Keys and values of a token's steps: [B, T, heads, n, channels].
    n = c.num_householder
    k, v = (y.reshape(*y.shape[:3], n, -1) for y in (k, v))
    q, k = (np.repeat(y, group, 2) for y in (q, k))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    largest = 2 if c.negative_eigenvalues else 1
    if c.erase_and_write == "heads":
        write = largest * sigmoid(project("beta")).reshape(*x.shape[:2], c.num_heads, n, 1)
        erase = np.repeat(b, group)[:, None, None] * write
    else:
        erase, write = (sigmoid(project(name))[..., None, :] for name in ("erase", "write"))
    g = np.zeros((*x.shape[:2], c.num_heads, 1))
    if c.decay == "scalar":
        g = -np.exp(p["a_log"]) * np.logaddexp(0, project("decay") + p["dt_bias"])
        g = g[..., None]
    if c.decay == "vector":
        f = project_low("decay", c.decay_rank) + p["dt_bias"]
        rate = np.exp(p["a_log"])[:, None]
        g = -rate * np.logaddexp(0, f) if c.decay_form == "softplus" else -5 * sigmoid(rate * f)
    o = np.zeros((*x.shape[:2], c.num_heads, c.value_dim))
    for i in range(x.shape[0]):
        for h in range(c.num_heads):
            S = np.zeros((c.key_dim, c.value_dim))
            for t in range(x.shape[1]):
                # With feedback, what is found before the decay is erased.
                before, S = S, np.exp(g[i, t, h])[:, None] * S
                for j in range(n):
                    read = before if c.state_feedback else S
                    change = write[i, t, h, j] * v[i, t, h, j]
                    change = change - (erase[i, t, h, j] * k[i, t, h, j]) @ read
                    S = S + np.outer(k[i, t, h, j], change)
                o[i, t, h] = c.key_dim**-0.5 * q[i, t, h] @ S
    eps = c.norm_eps or 1e-5
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + eps) * p["norm"]["scale"]
    if c.output_gate != "none":
        z = project_low("output_gate", c.output_gate_rank)
        o = o * (silu(z) if c.output_gate == "swish" else sigmoid(z))
    return np.tensordot(o, p["out"]["kernel"], 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_recurrence(name):
    config = DeltaAttentionConfig(**BASE | VARIANTS[name])
    module, params = make(config)
    y, _ = call(module, params)
    assert rel_rms(y, expected(config, params, X)) < 1e-5


def slow_but_one(name):
    return pytest.param(name, marks=() if name == "Comba, grouped" else pytest.mark.slow)


@pytest.mark.parametrize("name", [slow_but_one(name) for name in OTHER_VARIANTS])
def test_steps_and_feedback_equal_the_recurrence_in_documents_with_gradients(name):
    """Two documents in a row; gradients along one direction of every parameter and of the input."""
    config = DeltaAttentionConfig(**BASE | OTHER_VARIANTS[name])
    module, params = make(config)
    weight = np.random.default_rng(2).normal(size=X.shape)
    given = {"params": params, "x": X}
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    info = TokenInfo(positions, jnp.asarray([[1] * 4 + [2] * 5] * B))

    def loss(given):
        y = module.apply({"params": given["params"]}, given["x"], info)
        return jnp.sum(y * weight), y

    def by_hand(given):
        parts = [expected(config, given["params"], given["x"][:, i]) for i in np.split(ORDER, [4])]
        return np.concatenate(parts, 1)

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(given)
    assert rel_rms(y, by_hand(given)) < 1e-5
    assert_equals_differences(lambda at: (by_hand(at) * weight).sum(), given, gradient)


def test_a_token_of_several_steps():
    config = DeltaAttentionConfig(**BASE | OTHER_VARIANTS["Gated DeltaProduct, grouped"])
    module, params = make(config)
    info = TokenInfo(jnp.zeros((B, 1), jnp.int32), None)
    token, cache = X[:, :1], module.init_cache(B, T)
    y, _ = module.apply({"params": params}, token, info, cache, method="with_cache")
    assert rel_rms(y, expected(config, params, token)) < 1e-5


@pytest.mark.slow
def test_state_feedback_takes_any_decay():
    """Where nothing is left of the state after its decay, what it held is still erased."""
    config = DeltaAttentionConfig(**BASE | OTHER_VARIANTS["Comba, grouped"])
    module, params = make(config)
    for log_rate in (3.0, 8.0):
        changed = params | {"a_log": jnp.full_like(params["a_log"], log_rate)}
        y, _ = call(module, changed)
        assert rel_rms(y, expected(config, changed, X)) < 1e-5
        gradient = jax.jit(jax.grad(lambda p: module.apply({"params": p}, X).sum()))(changed)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_costs_of_several_steps():
    """Parameters and FLOPs of projections are those of n keys, values and betas."""
    one = DeltaAttentionConfig(**BASE)
    two = DeltaAttentionConfig(**BASE, num_householder=2)
    sizes = [
        sum(y.size for y in jax.tree.leaves(jax.eval_shape(DeltaAttention(c).init, KEY, X)))
        for c in (one, two)
    ]
    keys, values, heads = 4 * 4, 4 * 6, 4
    assert sizes[1] - sizes[0] == M * (keys + values + heads) + 4 * (keys + values)
    flops = [DeltaAttention(c).forward_flops_per_token(M, T) for c in (one, two)]
    # One more step of the rule, which nothing reads.
    assert flops[1] - flops[0] == 2 * M * (keys + values + heads) + 4 * keys * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_VARIANTS)
def test_steps_and_feedback_decode_as_they_train(name):
    config = DeltaAttentionConfig(**BASE | OTHER_VARIANTS[name])
    module, params = make(config)
    whole = expected(config, params, X)
    y, cache = call(module, params, X[:, :6], module.init_cache(B, T))
    assert rel_rms(y, whole[:, :6]) < 1e-5
    for t in range(6, T):
        y, cache = call(module, params, X[:, t : t + 1], cache, t)
        assert rel_rms(y, whole[:, t : t + 1]) < 1e-5


def test_documents_and_decoding_equal_each_alone():
    config = DeltaAttentionConfig(**BASE | VARIANTS["Gated DeltaNet-2"])
    module, params = make(config)
    packed, _ = call(module, params, segment_ids=jnp.asarray([[1] * 4 + [2] * 5] * B))
    alone, _ = call(module, params, X[:, 4:])
    assert rel_rms(packed[:, 4:], alone) < 1e-5
    whole, _ = call(module, params)
    y, cache = call(module, params, X[:, :6], module.init_cache(B, T))
    assert rel_rms(y, whole[:, :6]) < 1e-5
    for t in range(6, T):
        y, cache = call(module, params, X[:, t : t + 1], cache, t)
        assert rel_rms(y, whole[:, t : t + 1]) < 1e-5


def test_published_starts():
    """A_log and step sizes as the published codes draw them; a safe gate starts from A_log = 0."""
    config = DeltaAttentionConfig(num_heads=64, key_dim=4, value_dim=4)
    params = jax.jit(DeltaAttention(config).init)(jax.random.key(0), X[:, :2])["params"]
    rate, dt = np.exp(params["a_log"]), np.logaddexp(0, params["dt_bias"])
    assert 1 <= rate.min() < 4 and 12 < rate.max() <= 16
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
    config = DeltaAttentionConfig(num_heads=2, decay="vector", decay_form="bounded")
    params = jax.jit(DeltaAttention(config).init)(jax.random.key(0), X[:, :2])["params"]
    assert (params["a_log"] == 0).all()


BAD = {
    "num_key_heads: got 3": dict(num_heads=4, num_key_heads=3),
    "decay_form: got 'bounded'": dict(decay_form="bounded"),
    "decay_rank: got 4": dict(decay_rank=4),
    "output_gate_rank: got 4": dict(output_gate="none", output_gate_rank=4),
    "num_householder: got 2": dict(num_householder=2, state_feedback=True),
    "state_feedback: got True": dict(erase_and_write="channels", state_feedback=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(InputError) as error:
        DeltaAttentionConfig(**BAD[message])
    assert str(error.value).startswith(message)
