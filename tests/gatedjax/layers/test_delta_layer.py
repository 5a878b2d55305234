"""DeltaAttention against its recurrence in float64 numpy, one token after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from random_parameters import random_parameters

from gatedjax.config import DeltaAttentionConfig
from gatedjax.errors import InputError
from gatedjax.layers.delta import DeltaAttention
from gatedjax.layers.token_info import TokenInfo

B, T, M = 2, 9, 16
X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32))
BASE = dict(num_heads=4, key_dim=4, value_dim=6, chunk_size=4)
VARIANTS = {
    "DeltaNet": dict(decay="none", output_gate="none"),
    "Gated DeltaNet, grouped": dict(num_key_heads=2, conv_bias=True, norm_eps=1e-2),
    "negative eigenvalues, no convolution": dict(negative_eigenvalues=True, conv_width=0),
    "KDA": dict(decay="vector", decay_rank=3, output_gate="sigmoid", output_gate_rank=3),
    "safe gate": dict(decay="vector", decay_form="bounded", output_gate="sigmoid"),
    "Gated DeltaNet-2": dict(decay="vector", erase_and_write="channels", num_key_heads=2),
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
        nq = q[0, 0].size
        q, k, v = (
            mixed[..., :nq].reshape(q.shape),
            mixed[..., nq : 2 * nq].reshape(k.shape),
            mixed[..., 2 * nq :].reshape(v.shape),
        )
    group = c.num_heads // c.key_heads
    q, k = (np.repeat(y, group, 2) for y in (q, k))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    largest = 2 if c.negative_eigenvalues else 1
    if c.erase_and_write == "heads":
        erase = write = largest * sigmoid(project("beta"))[..., None]
    else:
        erase, write = sigmoid(project("erase")), sigmoid(project("write"))
    g = np.zeros((*x.shape[:2], c.num_heads, 1))
    if c.decay == "scalar":
        g = -np.exp(p["a_log"]) * np.logaddexp(0, project("decay") + p["dt_bias"])
        g = g[..., None]
    if c.decay == "vector":
        f = project_low("decay", c.decay_rank) + p["dt_bias"]
        rate = np.exp(p["a_log"])[:, None]
        g = -rate * np.logaddexp(0, f) if c.decay_form == "softplus" else -5 * sigmoid(rate * f)
    o = np.zeros((*x.shape[:2], c.num_heads, c.value_dim))
    for b in range(x.shape[0]):
        for h in range(c.num_heads):
            S = np.zeros((c.key_dim, c.value_dim))
            for t in range(x.shape[1]):
                S = np.exp(g[b, t, h])[:, None] * S
                change = write[b, t, h] * v[b, t, h] - (erase[b, t, h] * k[b, t, h]) @ S
                S = S + np.outer(k[b, t, h], change)
                o[b, t, h] = c.key_dim**-0.5 * q[b, t, h] @ S
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
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(InputError) as error:
        DeltaAttentionConfig(**BAD[message])
    assert str(error.value).startswith(message)
