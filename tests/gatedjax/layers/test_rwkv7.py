"""RWKV-7's two layers against the paper's formulas in float64 numpy, one token after the other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    ModelConfig,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.errors import InputError
from gatedjax.layers import RWKV7, GatedAttention, RWKV7ChannelMix
from gatedjax.layers.depth import Depth
from gatedjax.layers.norm import rms_norm
from gatedjax.layers.token_info import TokenInfo
from gatedjax.model import LanguageModel

B, T, M = 2, 9, 16
RNG = np.random.default_rng(1)
X = RNG.normal(size=(B, T, M)).astype(np.float32)
FIRST = RNG.normal(size=(B, T, M)).astype(np.float32)
CONFIG = RWKV7Config(
    num_heads=4,
    head_dim=4,
    decay_rank=3,
    rate_rank=2,
    value_rank=2,
    output_gate_rank=3,
    chunk_size=4,
)
LATER = Depth(index=2, first_values=jnp.asarray(FIRST), first=1, num_layers=4)


def perturbed(params):
    return jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


@functools.cache
def made():
    module = RWKV7(CONFIG)
    return module, perturbed(module.init(jax.random.key(0), X[:, :2])["params"])


@functools.cache
def jitted(module, method):
    return jax.jit(functools.partial(module.apply, method=method))


def call(x=X, cache=None, start=0, segment_ids=None, depth=None):
    module, params = made()
    positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
    info = TokenInfo(positions, segment_ids, depth=depth)
    return jitted(module, "with_values")({"params": params}, x, info, cache)


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def expected(params, x, first_values=None):
    """Equations of section 4 and appendix: (y, the values of the first layer)."""
    p, x = float64(params), np.asarray(x, np.float64)
    H, N = CONFIG.num_heads, CONFIG.head_dim
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)

    def lerp(name):
        return x + (before - x) * p[f"{name}_shift"]

    def project(name, y):
        return np.tensordot(y, p[name]["kernel"], 1)

    def low_rank(name, y, activation=lambda y: y):
        return project(f"{name}_up", activation(project(f"{name}_down", y)))

    r = project("receptance", lerp("receptance"))
    k = project("key", lerp("key"))
    own = project("value", lerp("value"))
    first = own if first_values is None else np.reshape(first_values, own.shape)
    v = own + (first - own) * sigmoid(low_rank("value_gate", lerp("value")) + p["value_bias"])
    d = low_rank("decay", lerp("decay"), np.tanh) + p["decay_bias"]
    w = np.exp(-np.exp(-0.5) * sigmoid(d))
    a = sigmoid(low_rank("rate", lerp("rate")) + p["rate_bias"])
    g = low_rank("output_gate", lerp("output_gate"), sigmoid)
    kappa = k * p["removal_scale"]
    kappa = kappa / np.sqrt((kappa**2).sum(-1, keepdims=True))
    k = k * (1 + (a - 1) * p["rate_weight"])
    o = np.zeros_like(v)
    for b in range(x.shape[0]):
        for h in range(H):
            # As in the paper: rows are value channels, and the state is read from the right.
            S = np.zeros((N, N))
            for t in range(x.shape[1]):
                at = (b, t, h)
                transition = np.diag(w[at]) - np.outer(kappa[at], a[at] * kappa[at])
                S = S @ transition + np.outer(v[at], k[at])
                o[at] = S @ r[at]
    mean = o.mean(-1, keepdims=True)
    variance = ((o - mean) ** 2).mean(-1, keepdims=True)
    o = (o - mean) / np.sqrt(variance + 64e-5) * p["norm_scale"] + p["norm_bias"]
    o = o + (r * k * p["bonus"]).sum(-1, keepdims=True) * v
    y = np.tensordot(o * g, p["out"]["kernel"], 2)
    return y, first.reshape(x.shape)


def test_equals_the_paper():
    _, params = made()
    y, _, values = call()
    by_hand, first = expected(params, X)
    assert rel_rms(y, by_hand) < 1e-5 and rel_rms(values, first) < 1e-5
    y, _, values = call(depth=LATER)
    by_hand, _ = expected(params, X, FIRST)
    assert rel_rms(y, by_hand) < 1e-5 and rel_rms(values, FIRST) == 0


def test_gradients_equal_differences_of_the_paper():
    """Of every parameter, the input and the first layer's values: along one direction each."""
    module, params = made()
    weight = np.random.default_rng(2).normal(size=X.shape)
    given = {"params": params, "x": jnp.asarray(X), "first": jnp.asarray(FIRST)}

    @jax.jit
    def gradient(given):
        def loss(given):
            depth = Depth(index=1, first_values=given["first"])
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
            info = TokenInfo(positions, depth=depth)
            y, _ = module.apply({"params": given["params"]}, given["x"], info, method="with_cache")
            return jnp.sum(y * weight)

        return jax.grad(loss)(given)

    leaves, tree = jax.tree.flatten(float64(given))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(given)]
    for i, found in enumerate(jax.tree.leaves(gradient(given))):
        direction = np.random.default_rng(i).normal(size=leaves[i].shape)

        def moved(step, i=i, direction=direction):
            changed = [*leaves]
            changed[i] = leaves[i] + step * direction
            at = jax.tree.unflatten(tree, changed)
            y, _ = expected(at["params"], at["x"], at["first"])
            return (y * weight).sum()

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        size = np.sqrt((np.asarray(found, np.float64) ** 2).sum() * direction.size)
        error = abs((np.asarray(found, np.float64) * direction).sum() - slope)
        assert error < 2e-5 * size + 1e-6, names[i]


def test_documents_and_decoding_equal_each_alone():
    ids = jnp.asarray([[1] * 4 + [2] * 5] * B)
    packed, *_ = call(segment_ids=ids)
    alone, *_ = call(X[:, 4:])
    assert rel_rms(packed[:, 4:], alone) < 1e-5
    whole, *_ = call()
    module, _ = made()
    y, cache, _ = call(X[:, :6], module.init_cache(B, T))
    assert rel_rms(y, whole[:, :6]) < 1e-5
    for t in range(6, T):
        y, cache, _ = call(X[:, t : t + 1], cache, t)
        assert rel_rms(y, whole[:, t : t + 1]) < 1e-5


def channel_mix(params, x):
    p, x = float64(params), np.asarray(x, np.float64)
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
    k = (x + (before - x) * p["shift"]) @ p["up"]["kernel"]
    return np.maximum(k, 0) ** 2 @ p["down"]["kernel"]


def test_channel_mixing_equals_the_paper_packed_and_decoded():
    module = RWKV7ChannelMix(RWKV7ChannelMixConfig(hidden=24))
    params = perturbed(module.init(jax.random.key(0), X[:, :2])["params"])
    run = lambda x, ids, cache: jitted(module, "with_cache")(
        {"params": params}, x, TokenInfo(jnp.zeros(x.shape[:2], jnp.int32), ids), cache
    )
    whole, _ = run(X, None, None)
    assert rel_rms(whole, channel_mix(params, X)) < 1e-5
    packed, _ = run(X, jnp.asarray([[1] * 4 + [2] * 5] * B), None)
    assert rel_rms(packed[:, 4:], channel_mix(params, X[:, 4:])) < 1e-5
    y, cache = run(X[:, :6], None, module.init_cache(B, M))
    parts = [y]
    for t in range(6, T):
        y, cache = run(X[:, t : t + 1], None, cache)
        parts.append(y)
    assert rel_rms(np.concatenate(parts, 1), whole) < 1e-5


def test_a_model_hands_on_the_values_of_its_first_such_layer():
    """Layers of a scanned model, called one by one: attention, RWKV-7, attention, RWKV-7."""
    config = ModelConfig(
        vocab_size=32,
        width=M,
        num_layers=4,
        mixers=FrozenDict(
            attention=GatedAttentionConfig(num_heads=2, head_dim=8),
            rwkv=CONFIG,
        ),
        pattern=("attention", "rwkv"),
        ffns=FrozenDict(mix=RWKV7ChannelMixConfig(hidden=24)),
        ffn_pattern=("mix",),
        dtype="float32",
    )
    tokens = np.random.default_rng(3).integers(0, 32, (B, T))
    model = LanguageModel(config)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    starts = variables["params"]["periods"]["layer_1"]["mixer"]
    # The depth that the starts depend on is that of the model: layers 1 and 3 of 4.
    np.testing.assert_allclose(starts["norm_scale"][:, 0, 0], [0.5**0.7, 1.0], rtol=1e-6)
    place = np.arange(M) / M
    mean = 1 - place ** (0.7 * np.array([[0.75], [0.25]]))
    np.testing.assert_allclose(starts["key_shift"], mean, atol=1e-6)

    params = nn.meta.unbox(perturbed(variables["params"]))
    hidden, *_ = jax.jit(model.apply)({"params": params}, tokens)
    x = params["embedding"][tokens]
    first = jnp.zeros_like(x)
    for layer in range(4):
        period, index = divmod(layer, 2)
        block = jax.tree.map(lambda p, i=period: p[i], params["periods"][f"layer_{index}"])
        normed = rms_norm(x, block["mixer_norm"]["scale"], config.norm_eps)
        depth = Depth(index=layer, first_values=first, first=1, num_layers=4)
        info = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)), depth=depth)
        mixer, _ = config.layer(layer)
        if mixer is CONFIG:
            arguments = ({"params": block["mixer"]}, normed, info, None)
            y, _, first = jitted(RWKV7(CONFIG), "with_values")(*arguments)
        else:
            y = GatedAttention(mixer).apply({"params": block["mixer"]}, normed, info)
        x = x + y
        normed = rms_norm(x, block["ffn_norm"]["scale"], config.norm_eps)
        x = x + channel_mix(block["ffn"], normed).astype(np.float32)
    assert rel_rms(hidden, rms_norm(x, params["final_norm"]["scale"], config.norm_eps)) < 2e-5


def test_published_starts():
    config = RWKV7Config(num_heads=2, head_dim=8)
    params = RWKV7(config).init(jax.random.key(0), X[:, :2])["params"]
    n, C = np.arange(16), 16
    linear = (n / (C - 1) - 0.5).reshape(2, 8)
    ramp = (n % 8 - 3.5) / 3.5
    zigzag = (ramp * abs(ramp)).reshape(2, 8)
    # Of the first layer: a decay bias that rises linearly.
    values = {
        "decay_bias": -6 + 6 * (linear + 0.5) + 0.5 + 2.5 * zigzag,
        "rate_bias": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "value_bias": 0.73 - 0.4 * linear,
        "removal_scale": 0.71 - 0.1 * linear,
        "rate_weight": np.full((2, 8), 1.02),
        "bonus": np.full((2, 8), -0.04),
        "receptance_shift": 1 - (n / C) ** 0.2,
        "decay_shift": 1 - (n / C) ** 0.9,
    }
    for name, value in values.items():
        np.testing.assert_allclose(params[name], value, atol=1e-6, err_msg=name)
    key = params["key"]["kernel"].reshape(16, 16)
    np.testing.assert_allclose(key @ key.T, 0.01 * np.eye(16), atol=1e-6)
    for name in ("out", "decay_down", "rate_down", "value_gate_down", "output_gate_down"):
        assert (params[name]["kernel"] == 0).all(), name


def test_bad_widths_are_named():
    with pytest.raises(InputError, match="num_heads: got 4, expected num_heads x head_dim = 24"):
        RWKV7(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2, 24)))
    with pytest.raises(InputError, match=r"mixers.r.num_heads: got 4, expected .* = width = 24"):
        ModelConfig(width=24, mixers=FrozenDict(r=CONFIG), pattern=("r",))
