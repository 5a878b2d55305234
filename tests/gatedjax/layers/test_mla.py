"""Multi-head latent attention against its expanded formula in float64 numpy; decoding in the
absorbed form against the expanded one.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow

from gatedjax.config import MeshConfig, MLAConfig
from gatedjax.errors import InputError
from gatedjax.layers import MLA
from gatedjax.layers.token_info import TokenInfo, arranged, empty_history
from gatedjax.sharding import RULES, make_mesh

B, T, M = 2, 9, 12
X = np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32)
BASE = dict(num_heads=3, kv_rank=8, nope_dim=4, rope_dim=6, value_dim=5)
VARIANTS = {
    # Latent queries, pairs of neighbors, YaRN with its correction of the scale; a sigmoid a head.
    "deepseek, ling's gate": dict(
        q_rank=7,
        yarn_factor=8.0,
        yarn_original_length=64,
        yarn_mscale=0.7,
        yarn_mscale_all=0.9,
        gate_position="sdpa",
        gate_granularity="headwise",
    ),
    "kimi, no positions": dict(rope="none"),
    "all else": dict(
        rope="halves",
        window=4,
        sinks=True,
        logits_soft_cap=1.5,
        attention_scale=0.6,
        gate_position="sdpa",
        gate_activation="softplus",
        gate_shared=True,
        latent_norm_eps=0.01,
    ),
    "no shared channels": dict(rope_dim=0),
}


@functools.cache
def made(name):
    module = MLA(MLAConfig(**BASE | VARIANTS[name]), 0.5, 0.4, jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), X[:, :2])["params"]
    return module, jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def frequencies(c):
    """Of pairs, by YaRN's formulas."""
    pairs = np.arange(c.rope_dim // 2)
    plain = c.rope_base ** (-2 * pairs / max(c.rope_dim, 1))
    if c.yarn_factor == 1:
        return plain
    turns = lambda n: (
        c.rope_dim * np.log(c.yarn_original_length / (2 * np.pi * n)) / (2 * np.log(c.rope_base))
    )
    low, high = max(np.floor(turns(32)), 0), min(np.ceil(turns(1)), c.rope_dim - 1)
    kept = 1 - np.clip((pairs - low) / (high - low), 0, 1)
    return plain * kept + plain / c.yarn_factor * (1 - kept)


def rotated(c, y):
    """y [B, T, heads, rope_dim] as complex numbers times e^(i angle)."""
    if c.rope == "none" or not c.rope_dim:
        return y
    mscale = lambda m: 0.1 * m * np.log(c.yarn_factor) + 1
    angle = np.arange(y.shape[1])[:, None, None] * frequencies(c)
    turn = np.exp(1j * angle) * mscale(c.yarn_mscale) / mscale(c.yarn_mscale_all)
    half = c.rope_dim // 2
    if c.rope == "halves":
        z = (y[..., :half] + 1j * y[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)
    z = (y[..., 0::2] + 1j * y[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(y.shape)


def expected(c: MLAConfig, params, x):
    p, x = float64(params), np.asarray(x, np.float64)
    times = lambda y, name: np.tensordot(y, p[name]["kernel"], 1)
    norm = lambda y, name: (
        y / np.sqrt((y**2).mean(-1, keepdims=True) + c.latent_norm_eps) * p[name]["scale"]
    )
    n, rank = c.nope_dim, c.kv_rank
    if c.q_rank:
        q = times(norm(times(x, "query_down"), "query_norm"), "query_up")
    else:
        q = times(x, "query")
    down = times(x, "kv_down")
    up = times(norm(down[..., :rank], "kv_norm"), "kv_up")
    shared = np.repeat(rotated(c, down[..., None, rank:]), c.num_heads, 2)
    q = np.concatenate([q[..., :n], rotated(c, q[..., n:])], -1)
    k = np.concatenate([up[..., :n], shared], -1)
    scale = c.attention_scale or (n + c.rope_dim) ** -0.5
    scale *= (0.1 * c.yarn_mscale_all * np.log(c.yarn_factor) + 1) ** 2
    s = scale * np.einsum("bthd,bshd->bhts", q, k)
    if c.logits_soft_cap:
        s = c.logits_soft_cap * np.tanh(s / c.logits_soft_cap)
    i, j = np.arange(x.shape[1])[:, None], np.arange(x.shape[1])[None]
    e = np.exp(s) * ((j <= i) & (j > i - (c.window or len(i))))
    sink = np.exp(p["sink_logits"])[:, None, None] if c.sinks else 0
    o = np.einsum("bhts,bshd->bthd", e / (e.sum(-1, keepdims=True) + sink), up[..., n:])
    if c.gate_position == "sdpa":
        logits = np.tensordot(x, p["gate"]["projection"]["kernel"], 1)
        if c.gate_shared:
            logits = logits.mean(2, keepdims=True)
        o = o * {"sigmoid": sigmoid, "softplus": lambda y: np.log1p(np.exp(y))}[c.gate_activation](
            logits
        )
    return np.tensordot(o, p["out"]["kernel"], 2)


def decoded(module, params, x, ends):
    """The outputs of pieces that end there, after each other, against a cache."""
    cache, outputs, first = module.init_cache(B, T), [], 0
    before = empty_history(B)
    for end in ends:
        piece = x[:, first:end]
        info, before, _ = arranged(jnp.zeros(piece.shape[:2], jnp.int32), before=before)
        y, cache = module.apply({"params": params}, piece, info, cache, method="with_cache")
        outputs.append(y)
        first = end
    return jnp.concatenate(outputs, 1), cache


def check(name, outputs):
    """Values and the gradients of every parameter and the input, along one direction each.

    outputs: the layer's, of (module, params, x).
    """
    module, params = made(name)
    weight = np.random.default_rng(2).normal(size=X.shape)
    given = {"params": params, "x": jnp.asarray(X)}

    def loss(given):
        y = outputs(module, given["params"], given["x"])
        return jnp.sum(y * weight), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(given)
    assert rel_rms(y, expected(module.config, params, X)) < 1e-5

    def formula(given):
        return (expected(module.config, given["params"], given["x"]) * weight).sum()

    check_gradients(formula, given, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_formula_and_its_gradients_equal_differences(name):
    check(name, lambda module, params, x: module.apply({"params": params}, x))


@pytest.mark.parametrize(
    "name, ends",
    [("deepseek, ling's gate", (T - 1, T)), *(slow(name, (4, 5, T)) for name in VARIANTS)],
)
def test_decoding_equals_the_formula_and_its_gradients_equal_differences(name, ends):
    """A prompt, a token by itself (absorbed), a further piece."""
    caches = []

    def outputs(module, params, x):
        y, cache = decoded(module, params, x, ends)
        caches.extend(jax.tree.leaves(cache))
        return y

    check(name, outputs)
    c = made(name)[0].config
    slots = min(c.window or T, T)
    assert [a.shape for a in caches] == [(B, slots, c.kv_rank + c.rope_dim)], "latents alone"


@pytest.mark.slow
def test_packed_documents_equal_separate_ones():
    for name in VARIANTS:
        module, params = made(name)
        starts = [0, 4, T]
        positions = np.concatenate([np.arange(4), np.arange(T - 4)])
        info = TokenInfo(
            jnp.broadcast_to(positions, (B, T)), jnp.asarray([[1] * 4 + [2] * (T - 4)] * B)
        )
        y = module.apply({"params": params}, X, info)
        for first, end in itertools.pairwise(starts):
            alone = expected(module.config, params, X[:, first:end])
            assert rel_rms(y[:, first:end], alone) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(tensor=2, context=4), dict(tensor=4, data=2)])
def test_eight_devices_equal_one(mesh):
    """Values and gradients of packed rows, and of a prompt and a decoded token."""
    config = MLAConfig(**BASE | VARIANTS["deepseek, ling's gate"] | dict(num_heads=4))
    module = MLA(config, 0.5, 0.4, jnp.float32)
    x = np.random.default_rng(3).normal(size=(2, 64, M)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(64), (2, 64))
    ids = jnp.asarray(np.arange(64) // 25 + np.arange(2)[:, None] + 1)
    params = jax.jit(module.init)(jax.random.key(0), x[:, :2])["params"]

    def loss(params, x):
        y = module.apply({"params": params}, x, TokenInfo(positions, ids))
        return (y**2).sum(), y

    def run(x):
        packed = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
        return packed, jax.jit(lambda x: decoded(module, params, x, (8, T)))(x[:, :T])

    single = run(x)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))), nn.logical_axis_rules(RULES):
        many = run(x)
    for one, other in zip(jax.tree.leaves(single), jax.tree.leaves(many)):
        assert rel_rms(other, one) < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_are_those_of_the_matrices_and_of_mixing(name):
    c = MLAConfig(**BASE | VARIANTS[name])
    params = jax.eval_shape(MLA(c).init, jax.random.key(0), X)["params"]
    matrices = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
    seen = min(c.window or 10, 10)
    mixing = 2 * c.num_heads * (c.nope_dim + c.rope_dim + c.value_dim) * seen
    assert MLA(c).forward_flops_per_token(M, 20) == 2 * matrices + mixing


BAD = {
    "rope_dim: got 3": dict(rope_dim=3),
    "sinks: got True": dict(sinks=True, normalizer="softpick"),
    "latent_norm_eps: got 0.0": dict(latent_norm_eps=0.0),
    "rope: got 'neox'": dict(rope="neox"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(InputError) as error:
        MLAConfig(**BAD[message])
    assert str(error.value).startswith(message)
