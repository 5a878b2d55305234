"""GatedLinearAttention against its recurrence, written out in float64 numpy, one token after the
other.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from random_parameters import random_parameters

from gatedjax.aot.hlo import collectives
from gatedjax.config import GatedLinearAttentionConfig, MeshConfig
from gatedjax.layers.conv import causal_conv
from gatedjax.layers.linear_attention import GatedLinearAttention, logsigmoid_decay
from gatedjax.layers.token_info import TokenInfo
from gatedjax.sharding import RULES, make_mesh

B, T, M = 2, 12, 16
X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32))
BASE = dict(num_heads=4, num_kv_heads=4, key_dim=4, value_dim=8)
VARIANTS = {
    "GLA": {},
    "GLA with convolution, grouped": dict(conv_width=4, num_kv_heads=2, conv_bias=True),
    "scalar": dict(decay="scalar"),
    "Mamba-2's decay": dict(decay="scalar", decay_form="softplus", conv_width=4),
    "RetNet": dict(decay="constant", rope_fraction=1.0),
    "linear attention": dict(
        decay="none", feature_map="elu_plus_one", normalize=True, output_gate="none"
    ),
    "sigmoid gate, silu": dict(output_gate="sigmoid", feature_map="silu"),
}


def make(config):
    module = GatedLinearAttention(config, 1e-5, 0.4, jnp.float32)
    info = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)))
    return module, random_parameters(module, X, info)


def call(module, params, x=X, cache=None, start=0, segment_ids=None):
    positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
    return jitted(module)({"params": params}, x, TokenInfo(positions, segment_ids), cache)


@functools.cache
def jitted(module):
    return jax.jit(functools.partial(module.apply, method="with_cache"))


def expected(c: GatedLinearAttentionConfig, params, x) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    silu = lambda y: y * sigmoid(y)
    project = lambda name: np.tensordot(x, p[name]["kernel"], 1)
    q, k, v = project("query"), project("key"), project("value")
    if c.conv_width:
        flat = np.concatenate([y.reshape(B, T, -1) for y in (q, k, v)], -1)
        w = p["conv"]
        padded = np.pad(flat, ((0, 0), (len(w) - 1, 0), (0, 0)))
        mixed = sum(padded[:, i : i + T] * w[i] for i in range(len(w)))
        mixed = silu(mixed + p["conv_bias"] if c.conv_bias else mixed)
        nq, nk = q[0, 0].size, k[0, 0].size
        q, k, v = (
            mixed[..., :nq].reshape(q.shape),
            mixed[..., nq : nq + nk].reshape(k.shape),
            mixed[..., nq + nk :].reshape(v.shape),
        )
    phi = {
        "identity": lambda y: y,
        "silu": silu,
        "elu_plus_one": lambda y: np.where(y > 0, y + 1, np.exp(y)),
    }
    q, k = phi[c.feature_map](q), phi[c.feature_map](k)
    if c.rotary_dim:
        half = c.rotary_dim // 2
        angle = np.arange(T)[:, None, None] * c.rope_base ** (-np.arange(half) / half)
        turn = lambda y: np.concatenate(
            [
                y[..., :half] * np.cos(angle) - y[..., half:] * np.sin(angle),
                y[..., half:] * np.cos(angle) + y[..., :half] * np.sin(angle),
            ],
            -1,
        )
        q, k = turn(q), turn(k)
    if c.decay == "none":
        g = np.zeros((B, T, c.num_heads, 1))
    elif c.decay == "constant":
        g = np.broadcast_to(
            np.log(1 - 2.0 ** (-5 - np.arange(c.num_heads)))[:, None], (B, T, c.num_heads, 1)
        )
    elif c.decay_form == "softplus":
        dt = np.log1p(np.exp(project("dt") + p["dt_bias"]))
        g, v = (-np.exp(p["a_log"]) * dt)[..., None], v * dt[..., None]
    else:
        logits = np.tensordot(project("decay_down"), p["decay_up"]["kernel"], 1) + p["decay_bias"]
        g = (-np.log1p(np.exp(-logits)) / 16).reshape(B, T, c.num_heads, -1)
    k, v = (np.repeat(y, c.num_heads // c.kv_heads, 2) for y in (k, v))
    state, sum_k = (
        np.zeros((B, c.num_heads, c.key_dim, c.value_dim)),
        np.zeros((B, c.num_heads, c.key_dim)),
    )
    out = []
    for t in range(T):
        a = np.exp(g[:, t])
        state = a[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        sum_k = a * sum_k + k[:, t]
        o = np.einsum("bhk,bhkv->bhv", q[:, t], state)
        denominator = np.einsum("bhk,bhk->bh", q[:, t], sum_k)[..., None]
        out.append(o / denominator if c.normalize else o * c.key_dim**-0.5)
    o = np.stack(out, 1)
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    if c.output_gate != "none":
        o = o * {"swish": silu, "sigmoid": sigmoid}[c.output_gate](project("output_gate"))
    return np.tensordot(o, p["out"]["kernel"], 2)


# With a convolution and groups it is tested too.
@pytest.mark.parametrize("name", [slow(n) if n == "GLA" else n for n in VARIANTS])
def test_equals_the_recurrence_and_decodes_like_it(name):
    config = GatedLinearAttentionConfig(**BASE | VARIANTS[name])
    module, params = make(config)
    full, _ = call(module, params)
    assert rel_rms(full, expected(config, params, X)) < 1e-5
    prompt = 5
    y, cache = call(module, params, X[:, :prompt], module.init_cache(B, T))
    assert rel_rms(y, full[:, :prompt]) < 1e-5
    for t in range(prompt, T):
        y, cache = call(module, params, X[:, t : t + 1], cache, start=t)
        assert rel_rms(y[:, 0], full[:, t]) < 1e-5


@pytest.mark.parametrize(
    "name", [slow("GLA with convolution, grouped"), "RetNet", slow("linear attention")]
)
def test_devices_along_context_exchange_states_not_tokens(name):
    """Values and gradients as on one device, packed rows included; no device gathers a sequence."""
    module, params = make(GatedLinearAttentionConfig(**BASE | VARIANTS[name]))
    length = 1024
    x = np.random.default_rng(3).normal(size=(B, length, M)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(length), (B, length))
    info = TokenInfo(positions, jnp.asarray(np.arange(length) // 300 + np.arange(B)[:, None]))

    def loss(params, x):
        return (module.apply({"params": params}, x, info) ** 2).sum()

    single = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    mesh = make_mesh(MeshConfig(context=8))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        x = jax.device_put(x, NamedSharding(mesh, P(None, "context")))
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
        sharded = compiled(params, x)
    for one, many in zip(jax.tree.leaves(single), jax.tree.leaves(sharded)):
        assert rel_rms(many, one) < 1e-5
    moved = {c.kind: c.bytes for c in collectives(compiled.as_text())}
    smallest = B * length * BASE["key_dim"] * 2 * 4  # float32 keys of two heads
    assert (
        moved["all-gather"] > 0 and moved["all-gather"] + moved.get("all-to-all", 0) < smallest
    ), moved


def test_gate_starts_where_the_paper_starts():
    """logsigmoid of logits near 0, over 16: every channel keeps about 0.958 a step."""
    module = GatedLinearAttention(GatedLinearAttentionConfig(**BASE), 1e-5, 0.02, jnp.float32)
    info = TokenInfo(jnp.zeros((B, T), jnp.int32))
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), X, info)["params"])
    logits = (
        jnp.tensordot(X @ params["decay_down"]["kernel"], params["decay_up"]["kernel"], 1)
        + params["decay_bias"]
    )
    np.testing.assert_allclose(np.exp(logsigmoid_decay(logits, 16.0)), 0.958, atol=2e-3)


def test_convolution_stays_inside_a_segment():
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
    x = jnp.asarray(X[:1, :, :3])
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    packed, _ = causal_conv(x, kernel, segments)
    first, _ = causal_conv(x[:, :5], kernel)
    second, _ = causal_conv(x[:, 5:], kernel)
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), rtol=1e-6)
