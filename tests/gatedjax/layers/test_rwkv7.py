"""RWKV-7's two layers against the paper's formulas in float64 numpy, one token after the other."""

import functools

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
from gatedjax.layers.token_info import TokenInfo
from gatedjax.model import LanguageModel, init_caches

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
    norm_eps=1e-2,
    chunk_size=4,
)


def perturbed(params):
    return jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


@functools.cache
def made():
    module = RWKV7(CONFIG)
    return module, perturbed(jax.jit(module.init)(jax.random.key(0), X[:, :2])["params"])


@functools.cache
def jitted(module, method):
    return jax.jit(functools.partial(module.apply, method=method))


def call(x=X, cache=None, start=0, segment_ids=None):
    module, params = made()
    positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
    info = TokenInfo(positions, segment_ids)
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
    o = (o - mean) / np.sqrt(variance + 1e-2) * p["norm_scale"] + p["norm_bias"]
    o = o + (r * k * p["bonus"]).sum(-1, keepdims=True) * v
    y = np.tensordot(o * g, p["out"]["kernel"], 2)
    return y, first.reshape(x.shape)


def test_equals_the_paper_in_documents_and_token_by_token():
    module, params = made()
    by_hand, first = expected(params, X)
    y, _, values = call(segment_ids=jnp.asarray([[1] * 4 + [2] * 5] * B))
    assert rel_rms(y[:, :4], by_hand[:, :4]) < 1e-5 and rel_rms(values[:, :4], first[:, :4]) < 1e-5
    assert rel_rms(y[:, 4:], expected(params, X[:, 4:])[0]) < 1e-5
    y, cache, _ = call(X[:, :6], module.init_cache(B, T))
    parts = [y]
    for t in range(6, T):
        y, cache, _ = call(X[:, t : t + 1], cache, t)
        parts.append(y)
    assert rel_rms(np.concatenate(parts, 1), by_hand) < 1e-5


def test_a_later_layer_equals_the_paper_and_its_gradients_equal_differences():
    """Of every parameter, the input and the first layer's values: along one direction each."""
    module, params = made()
    weight = np.random.default_rng(2).normal(size=X.shape)
    given = {"params": params, "x": jnp.asarray(X), "first": jnp.asarray(FIRST)}

    def loss(given):
        depth = Depth(index=2, first_values=given["first"], first=1, num_layers=4)
        info = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)), depth=depth)
        y, _ = module.apply({"params": given["params"]}, given["x"], info, method="with_cache")
        return jnp.sum(y * weight), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(given)
    assert rel_rms(y, expected(params, X, FIRST)[0]) < 1e-5
    leaves, tree = jax.tree.flatten(float64(given))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(given)]
    for i, found in enumerate(jax.tree.leaves(gradient)):
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


def channel_mix(params, x):
    p, x = float64(params), np.asarray(x, np.float64)
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
    k = (x + (before - x) * p["shift"]) @ p["up"]["kernel"]
    return np.maximum(k, 0) ** 2 @ p["down"]["kernel"]


def test_channel_mixing_equals_the_paper_packed_and_decoded():
    module = RWKV7ChannelMix(RWKV7ChannelMixConfig(hidden=24))
    params = perturbed(jax.jit(module.init)(jax.random.key(0), X[:, :2])["params"])
    run = lambda x, ids, cache: jitted(module, "with_cache")(
        {"params": params}, x, TokenInfo(jnp.zeros(x.shape[:2], jnp.int32), ids), cache
    )
    whole = channel_mix(params, X)
    y, _ = run(X, jnp.asarray([[1] * 4 + [2] * 5] * B), None)
    assert rel_rms(y[:, :4], whole[:, :4]) < 1e-5
    assert rel_rms(y[:, 4:], channel_mix(params, X[:, 4:])) < 1e-5
    y, cache = run(X[:, :8], None, module.init_cache(B, M))
    assert rel_rms(y, whole[:, :8]) < 1e-5
    y, _ = run(X[:, 8:], None, cache)
    assert rel_rms(y, whole[:, 8:]) < 1e-5


def model_of(pattern, num_layers):
    """(config, model, parameters, tokens)."""
    config = ModelConfig(
        vocab_size=32,
        width=M,
        num_layers=num_layers,
        mixers=FrozenDict(attention=GatedAttentionConfig(num_heads=2, head_dim=8), rwkv=CONFIG),
        pattern=pattern,
        ffns=FrozenDict(mix=RWKV7ChannelMixConfig(hidden=24)),
        ffn_pattern=("mix",),
        dtype="float32",
    )
    tokens = np.random.default_rng(3).integers(0, 32, (B, T))
    model = LanguageModel(config)
    return config, model, jax.jit(model.init)(jax.random.key(0), tokens)["params"], tokens


def normed(x, scale):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)


def block_of(params, layer, period):
    """The parameters of a layer, and what its mixer sees, given the residual stream."""
    at, index = divmod(layer, period)
    return jax.tree.map(lambda p: p[at], params["periods"][f"layer_{index}"])


def test_a_model_hands_on_the_values_of_its_first_layer():
    _, model, params, tokens = model_of(("rwkv",), 2)
    scale = params["periods"]["layer_0"]["mixer"]["norm_scale"]
    np.testing.assert_allclose(scale[:, 0, 0], [0.5**0.7, 1.0], rtol=1e-6)
    params = perturbed(params)
    hidden, *_ = jax.jit(model.apply)({"params": params}, tokens)
    x = np.asarray(params["embedding"], np.float64)[tokens]
    first = None
    for layer in range(2):
        block = block_of(params, layer, 1)
        y, first = expected(block["mixer"], normed(x, block["mixer_norm"]["scale"]), first)
        x = x + y
        x = x + channel_mix(block["ffn"], normed(x, block["ffn_norm"]["scale"]))
    assert rel_rms(hidden, normed(x, params["final_norm"]["scale"])) < 2e-5


@pytest.mark.slow
def test_the_first_such_layer_need_not_be_the_first_of_the_model():
    """Attention, RWKV-7, attention, RWKV-7; then the same, decoded."""
    config, model, params, tokens = model_of(("attention", "rwkv"), 4)
    starts = params["periods"]["layer_1"]["mixer"]
    # The depth that the starts depend on is that of the model: layers 1 and 3 of 4.
    np.testing.assert_allclose(starts["norm_scale"][:, 0, 0], [0.5**0.7, 1.0], rtol=1e-6)
    mean = 1 - (np.arange(M) / M) ** (0.7 * np.array([[0.75], [0.25]]))
    np.testing.assert_allclose(starts["key_shift"], mean, atol=1e-6)
    params = perturbed(params)
    run = jax.jit(lambda tokens, caches: model.apply({"params": params}, tokens, caches=caches)[:2])
    hidden, _ = run(tokens, None)
    x = np.asarray(params["embedding"], np.float64)[tokens]
    first = None
    for layer in range(4):
        block = block_of(params, layer, 2)
        inputs = normed(x, block["mixer_norm"]["scale"])
        if layer % 2:
            y, first = expected(block["mixer"], inputs, first)
        else:
            attention = GatedAttention(config.mixers["attention"])
            y = attention.apply({"params": block["mixer"]}, jnp.asarray(inputs, jnp.float32))
        x = x + y
        x = x + channel_mix(block["ffn"], normed(x, block["ffn_norm"]["scale"]))
    assert rel_rms(hidden, normed(x, params["final_norm"]["scale"])) < 2e-5
    # The first layer's values are of the token itself: decoding needs no cache of them.
    _, caches = run(tokens[:, :-1], init_caches(config, B, T))
    last, _ = run(tokens[:, -1:], caches)
    assert rel_rms(last, hidden[:, -1:]) < 2e-5


def test_published_starts():
    config = RWKV7Config(num_heads=2, head_dim=8)
    params = jax.jit(RWKV7(config).init)(jax.random.key(0), X[:, :2])["params"]
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
