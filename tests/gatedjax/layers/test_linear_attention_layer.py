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
from gatedjax.config import FrozenDict, GatedLinearAttentionConfig, MeshConfig, ModelConfig
from gatedjax.layers.conv import causal_conv
from gatedjax.layers.linear_attention import (
    GatedLinearAttention,
    forget_gate,
    logsigmoid_decay,
    rising_floors,
)
from gatedjax.layers.token_info import TokenInfo
from gatedjax.model import LanguageModel
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
    "HGRN2": dict(
        decay_form="forget_gate",
        feature_map="silu",
        output_gate="none",
        norm_heads="all",
        norm_eps=1e-4,
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
    is_hgrn2 = c.decay_form == "forget_gate"
    q, k, v = project("query"), project("forget" if is_hgrn2 else "key"), project("value")
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
    logits = k
    q, k = phi[c.feature_map](q), 1 - sigmoid(k) if is_hgrn2 else phi[c.feature_map](k)
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
    elif is_hgrn2:
        g = np.log(sigmoid(logits))
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
    axes = (-2, -1) if c.norm_heads == "all" else -1
    eps = c.norm_eps or 1e-5
    o = o / np.sqrt(np.mean(o**2, axes, keepdims=True) + eps) * p["norm"]["scale"]
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


def test_a_forget_gate_has_a_floor():
    """Values and gradients by float64 formulas: with a floor, without, and of large logits."""
    rng = np.random.default_rng(4)
    logits = np.concatenate([rng.normal(size=(6, 4)), np.full((1, 4), 40.0), np.full((1, 4), -40)])
    floor = np.asarray([0.0, 1e-3, 0.4, 0.9])
    z = logits[None, :, None]
    gate = 1 / (1 + np.exp(-z))
    f = floor + (1 - floor) * gate
    given = (jnp.asarray(z, jnp.float32), jnp.asarray(floor[None], jnp.float32))
    decay, back_decay = jax.vjp(lambda *x: forget_gate(*x)[0], *given)
    keys, back_keys = jax.vjp(lambda *x: forget_gate(*x)[1], *given)
    np.testing.assert_allclose(decay, np.log(f), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(keys, (1 - floor) / (1 + np.exp(z)), rtol=1e-5)
    by_logits, by_floor = back_decay(jnp.ones_like(decay))
    slope = (1 - floor) * gate / (1 + np.exp(z))
    np.testing.assert_allclose(by_logits, slope / f, rtol=1e-4, atol=1e-7)
    # The first layer's floor is 0 whatever is learned: nothing flows there.
    expected_by_floor = np.where(floor > 0, (1 - gate) / f, 0).sum((0, 1, 2))
    np.testing.assert_allclose(by_floor[0], expected_by_floor, rtol=1e-4)
    by_logits, by_floor = back_keys(jnp.ones_like(keys))
    np.testing.assert_allclose(by_logits, -slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(by_floor[0], -(1 / (1 + np.exp(z))).sum((0, 1, 2)), rtol=1e-4)


def test_floors_rise_from_zero():
    logits = np.random.default_rng(5).normal(size=(3, 2, 4))
    weights = np.exp(logits) / np.exp(logits).sum(0)
    floors = rising_floors(jnp.asarray(logits, jnp.float32))
    right = np.stack([0 * weights[0], weights[1], weights[1] + weights[2]])
    np.testing.assert_allclose(floors, right, rtol=1e-5, atol=1e-7)
    assert (np.asarray(floors[0]) == 0).all()


@pytest.mark.slow
def test_floors_are_learned_by_the_model():
    """In a loop over layers and without one: the same logits, and the same gradient of floors."""
    mixer = GatedLinearAttentionConfig(
        num_heads=2,
        key_dim=4,
        value_dim=4,
        decay_form="forget_gate",
        decay_floor="by_depth",
    )
    tokens = np.random.default_rng(6).integers(0, 8, (2, 9))

    def gradient(scan_layers: bool):
        config = ModelConfig(
            vocab_size=8,
            width=8,
            num_layers=3,
            mixers=FrozenDict(hgrn2=mixer),
            pattern=("hgrn2",),
            scan_layers=scan_layers,
            dtype="float32",
        )
        model = LanguageModel(config)
        params = model.init(jax.random.key(0), tokens)["params"]
        floors = jax.random.normal(jax.random.key(1), params["decay_floors"].shape)
        assert floors.shape == (3, 2, 4)

        def loss(floors):
            hidden, _, _ = model.apply({"params": params | {"decay_floors": floors}}, tokens)
            return jnp.sum(jnp.sin(hidden))

        return loss, floors, jax.jit(jax.value_and_grad(loss))(floors)

    loss, floors, (value, slopes) = gradient(True)
    _, _, (same_value, same_slopes) = gradient(False)
    assert rel_rms(same_slopes, slopes) < 1e-4
    np.testing.assert_allclose(same_value, value, rtol=1e-5)
    direction = np.random.default_rng(7).normal(size=floors.shape).astype(np.float32)
    step = 1e-2 * direction
    difference = (jax.jit(loss)(floors + step) - jax.jit(loss)(floors - step)) / 2e-2
    np.testing.assert_allclose(difference, np.sum(slopes * direction), rtol=1e-2)


@pytest.mark.parametrize(
    "message, values",
    {
        "decay_form: got 'forget_gate'": dict(decay_form="forget_gate", conv_width=4),
        "decay_form: got 'forget_gate', expected": dict(decay_form="forget_gate", decay="scalar"),
        "decay_floor: got 'by_depth', expected 'none'": dict(decay_floor="by_depth"),
    }.items(),
)
def test_bad_forget_gates_are_named(message, values):
    with pytest.raises(ValueError, match=message):
        GatedLinearAttentionConfig(**values)


def test_convolution_stays_inside_a_segment():
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
    x = jnp.asarray(X[:1, :, :3])
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    packed, _ = causal_conv(x, kernel, segments)
    first, _ = causal_conv(x[:, :5], kernel)
    second, _ = causal_conv(x[:, 5:], kernel)
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), rtol=1e-6)
