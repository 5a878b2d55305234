"""RWKV-6's and RWKV-5's layers against the paper's formulas in float64 numpy, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from random_parameters import random_parameters
from recurrent_gradients import assert_equals_differences

from gatedjax.config import FrozenDict, ModelConfig, RWKV6ChannelMixConfig, RWKV6Config
from gatedjax.errors import InputError
from gatedjax.layers import RWKV6, RWKV6ChannelMix
from gatedjax.layers.depth import Depth
from gatedjax.layers.token_info import TokenInfo
from gatedjax.model import LanguageModel, init_caches

B, T, M = 2, 9, 16
X = np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32)
CONFIG = RWKV6Config(
    num_heads=4,
    key_dim=3,
    value_dim=4,
    shift_rank=3,
    decay_rank=2,
    norm_eps=1e-2,
    chunk_size=4,
)
# RWKV-5: nothing low-rank, every token has the same shifts and decays.
EAGLE = dataclasses.replace(CONFIG, shift_rank=0, decay_rank=0)
MIX = RWKV6ChannelMixConfig(hidden=24)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
PACKED = jnp.asarray([[1] * 4 + [2] * 5] * B)


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def before(x):
    return np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)


def time_mixing(params, x):
    """Section 4.1 and 4.2 of the paper."""
    p, x = float64(params), np.asarray(x, np.float64)
    delta = before(x) - x
    low = np.tanh((x + delta * p["shift"]) @ p["shift_down"]["kernel"])
    low = low.reshape(B, -1, 5, CONFIG.shift_rank)
    inputs = [x + delta * (p["shift_bias"][i] + low[:, :, i] @ p["shift_up"][i]) for i in range(5)]
    receptance, decay, key, value, gate = inputs
    w = project(p["decay_up"], np.tanh(project(p["decay_down"], decay))) + p["decay_bias"]
    return recurrence(p, receptance, key, value, gate, np.exp(-np.exp(w)))


def eagle_time_mixing(params, x):
    """Section 3.1 and 3.2 of the paper: RWKV-5."""
    p, x = float64(params), np.asarray(x, np.float64)
    inputs = [x + (before(x) - x) * amount for amount in p["shift_bias"]]
    assert len(inputs) == 4
    w = np.exp(-np.exp(p["decay_bias"]))
    return recurrence(p, *inputs, np.broadcast_to(w, (*x.shape[:2], *w.shape)))


def project(parameters, y):
    return np.tensordot(y, parameters["kernel"], 1)


def recurrence(p, receptance, key, value, gate, w):
    """From the mixtures and the decays `w` [B, T, H, K] to the output."""
    r, k, v = (
        project(p["receptance"], receptance),
        project(p["key"], key),
        project(p["value"], value),
    )
    g = project(p["output_gate"], gate)
    o = np.zeros_like(v)
    for b, h in np.ndindex(B, CONFIG.num_heads):
        state = np.zeros((CONFIG.key_dim, CONFIG.value_dim))
        for t in range(v.shape[1]):
            at = (b, t, h)
            written = np.outer(k[at], v[at])
            o[at] = r[at] @ (state + p["bonus"][h][:, None] * written)
            state = w[at][:, None] * state + written
    mean = o.mean(-1, keepdims=True)
    variance = ((o - mean) ** 2).mean(-1, keepdims=True)
    o = (o - mean) / np.sqrt(variance + 1e-2) * p["norm_scale"] + p["norm_bias"]
    return np.tensordot(o * g * sigmoid(g), p["out"]["kernel"], 2)


def channel_mixing(params, x):
    p, x = float64(params), np.asarray(x, np.float64)
    delta = before(x) - x
    hidden = np.maximum((x + delta * p["shift"]) @ p["up"]["kernel"], 0) ** 2
    gate = sigmoid((x + delta * p["gate_shift"]) @ p["gate"]["kernel"])
    return gate * (hidden @ p["down"]["kernel"])


LAYERS = {
    "time mixing": (RWKV6(CONFIG), time_mixing),
    "RWKV-5's time mixing": (RWKV6(EAGLE), eagle_time_mixing),
    "channel mixing": (RWKV6ChannelMix(MIX), channel_mixing),
}


def in_documents(formula, params, x):
    """The rows of `PACKED`, each document alone."""
    return np.concatenate([formula(params, x[:, :4]), formula(params, x[:, 4:])], 1)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_paper_in_documents_with_gradients(name):
    """Of every parameter and the input, along one direction each."""
    module, formula = LAYERS[name]
    given = {"params": random_parameters(module, X), "x": X}
    weight = np.random.default_rng(2).normal(size=X.shape)

    def loss(given):
        y = module.apply({"params": given["params"]}, given["x"], TokenInfo(POSITIONS, PACKED))
        return jnp.sum(y * weight), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(given)
    assert rel_rms(y, in_documents(formula, given["params"], X)) < 1e-5

    def by_hand(at):
        return (in_documents(formula, at["params"], at["x"]) * weight).sum()

    assert_equals_differences(by_hand, given, gradient, bound=5e-5)


@functools.cache
def model():
    """(config, model, parameters, tokens): two layers of both kinds."""
    config = ModelConfig(
        vocab_size=32,
        width=M,
        num_layers=2,
        mixers=FrozenDict(rwkv=CONFIG),
        pattern=("rwkv",),
        ffns=FrozenDict(mix=MIX),
        ffn_pattern=("mix",),
        dtype="float32",
    )
    tokens = np.random.default_rng(3).integers(0, 32, (B, T))
    module = LanguageModel(config)
    return config, module, random_parameters(module, tokens), tokens


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)


@pytest.mark.slow
def test_a_model_equals_the_paper_and_decodes_like_it():
    config, module, params, tokens = model()
    x = np.asarray(params["embedding"], np.float64)[tokens]
    for layer in range(2):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["periods"]["layer_0"])
        x = x + time_mixing(block["mixer"], normed(x, block["mixer_norm"]["scale"]))
        x = x + channel_mixing(block["ffn"], normed(x, block["ffn_norm"]["scale"]))
    x = normed(x, params["final_norm"]["scale"])
    run = jax.jit(lambda tokens, caches: module.apply({"params": params}, tokens, caches=caches))
    hidden, caches, _ = run(tokens[:, :6], init_caches(config, B, T))
    assert rel_rms(hidden, x[:, :6]) < 2e-5
    for t in range(6, T):
        hidden, caches, _ = run(tokens[:, t : t + 1], caches)
        assert rel_rms(hidden, x[:, t : t + 1]) < 2e-5


@pytest.mark.slow
def test_published_starts():
    """Of the second layer of four; matrices have other tests' kind of start."""
    config = RWKV6Config(num_heads=2, key_dim=8, value_dim=8, shift_rank=2, decay_rank=2)
    info = TokenInfo(POSITIONS, depth=Depth(index=1, num_layers=4))
    params = RWKV6(config).init(jax.random.key(0), X, info)["params"]
    n = np.arange(M)
    place = n / M
    shift = 1 - place**0.75
    rows = [1 - place**0.375, shift, shift, shift - 0.1, 1 - place**0.375]
    values = {
        "shift": shift,
        "shift_bias": np.stack(rows),
        "decay_bias": (-6 + 5 * (n / (M - 1)) ** (0.7 + 1.3 / 3)).reshape(2, 8),
        "bonus": ((1 - n / (M - 1)) / 3 + 0.1 * ((n + 1) % 3 - 1)).reshape(2, 8),
        "norm_scale": np.full((2, 8), 0.5**0.7),
    }
    for name, value in values.items():
        np.testing.assert_allclose(params[name], value, atol=1e-6, err_msg=name)
    key = params["key"]["kernel"].reshape(M, M)
    np.testing.assert_allclose(key @ key.T, 0.01 * np.eye(M), atol=1e-6)
    for name in ("out", "shift_down", "decay_down"):
        assert (params[name]["kernel"] == 0).all(), name
    for small in (params["shift_up"], params["decay_up"]["kernel"]):
        assert 0.005 < np.abs(small).max() <= 0.01


def test_bad_widths_are_named_and_costs_are_counted():
    with pytest.raises(InputError, match="num_heads: got 4, expected num_heads x value_dim = 24"):
        RWKV6(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2, 24)))
    with pytest.raises(InputError, match=r"mixers.r.num_heads: got 4, .* x value_dim = width = 24"):
        ModelConfig(width=24, mixers=FrozenDict(r=CONFIG), pattern=("r",))
    for module, _ in LAYERS.values():
        shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
        matrices = sum(p.size for p in jax.tree.leaves(shapes) if p.ndim > 1)
        # Not multiplied with tokens: what tokens and heads have in common.
        small, of_state = 0, 0
        if isinstance(module, RWKV6):
            mixtures = 5 if module.config.decay_rank else 4
            small, of_state = mixtures * M + 2 * 12 + 2 * 16, 4 * 4 * 3 * 4
        flops = module.forward_flops_per_token(M, T)
        assert flops == 2 * (matrices - small) + of_state
