"""Lizard, RAD-RWKV6 and RAD-RWKV7 against the papers' formulas in float64 numpy, token by token:
values, gradients, decoding, documents; and what they refuse.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import (
    GatedAttentionConfig,
    LizardConfig,
    RADRWKV6Config,
    RADRWKV7Config,
)
from gatedjax.errors import InputError
from gatedjax.layers import MIXERS
from gatedjax.layers.converted import exponential_log_decay, hedgehog
from gatedjax.layers.token_info import TokenInfo
from gatedjax.layers.tree import flatten_dict

B, T, M, H, HK, D = 2, 9, 12, 4, 2, 6
RNG = np.random.default_rng(3)
X = RNG.normal(size=(B, T, M)).astype(np.float32)
WEIGHT = RNG.normal(size=(B, T, M))
SIZES = {"num_heads": H, "num_kv_heads": HK, "head_dim": D, "rope_base": 50.0}
CONFIGS = {
    "lizard": LizardConfig(**SIZES, window=3, meta_logits=2, feature_dim=5),
    "rad_rwkv6": RADRWKV6Config(**SIZES, decay_rank=3),
    "rad_rwkv7": RADRWKV7Config(**SIZES, decay_rank=3, rate_rank=2),
}
KINDS = list(CONFIGS)


@functools.cache
def made(kind):
    """The module and parameters of which none is zero."""
    module = MIXERS[kind](CONFIGS[kind], init_std=0.3)
    params = module.init(jax.random.key(0), X[:, :2])["params"]

    def moved(p):
        return p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape)

    return module, jax.tree.map(moved, params)


def info_of(start, length, segment_ids=None):
    positions = jnp.broadcast_to(start + jnp.arange(length), (B, length))
    return TokenInfo(positions, segment_ids)


# --- the formulas


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, p):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * p["scale"]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotated(x):
    """RoPE on halves: channel i with i + D / 2."""
    angles = np.arange(x.shape[1])[:, None] * 50.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def projected(x, p):
    return np.einsum("btm,mhd->bthd", x, p["kernel"])


def low_rank(x, p, name, activation):
    low = activation(x @ p[f"{name}_down"]["kernel"])
    return np.einsum("btr,rhd->bthd", low, p[f"{name}_up"]["kernel"]) + p[f"{name}_bias"]


def of_heads(x):
    return np.repeat(x, H // HK, axis=2)


def lizard(q, k, v, x, p):
    def features(y, w):
        logits = np.einsum("bthd,hdf->bthf", y, w)
        return np.concatenate([softmax(logits), softmax(-logits)], axis=-1)

    phi_q = features(q, p["query_features"])
    phi_k = of_heads(features(k, p["key_features"]))
    q, k, v = rotated(q), of_heads(rotated(k)), of_heads(v)
    decay = sigmoid(x @ p["decay"]["kernel"] + p["decay_bias"])[..., 0]
    meta = np.exp(p["meta_logits"]).sum(axis=0)
    o = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            state = np.zeros((phi_q.shape[-1], D))
            total = np.zeros(phi_q.shape[-1])
            for t in range(T):
                state = decay[b, t] * state + np.outer(phi_k[b, t, h], v[b, t, h])
                total = decay[b, t] * total + phi_k[b, t, h]
                gated = phi_q[b, t, h] @ state / (phi_q[b, t, h] @ total)
                seen = slice(max(0, t - 2), t + 1)
                e = np.exp(k[b, seen, h] @ q[b, t, h] / np.sqrt(D))
                anchor = e @ v[b, seen, h] / (e.sum() + meta[h])
                o[b, t, h] = gated + p["anchor_weight"] * anchor
    return o


def rad_rwkv6(q, k, v, x, p):
    q, k, v = rotated(q), of_heads(rotated(k)), of_heads(v)
    w = np.exp(np.maximum(-np.exp(low_rank(x, p, "decay", np.tanh)), -5.0))
    o = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            state = np.zeros((D, D))
            for t in range(T):
                written = k[b, t, h] * (1 - w[b, t, h]) / np.sqrt(D)
                state = w[b, t, h][:, None] * state + np.outer(written, v[b, t, h])
                o[b, t, h] = q[b, t, h] @ state
    return o


def rad_rwkv7(q, k, v, x, p):
    q, k, v = rotated(q), of_heads(rotated(k)), of_heads(v)
    w = np.exp(-np.exp(-0.5) * sigmoid(low_rank(x, p, "decay", np.tanh)))
    a = sigmoid(low_rank(x, p, "rate", lambda y: y))
    kappa = k / np.linalg.norm(k, axis=-1, keepdims=True)
    k = k * (1 - w + a)
    o = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            state = np.zeros((D, D))
            for t in range(T):
                found = kappa[b, t, h] @ state
                removed = np.outer(kappa[b, t, h] * a[b, t, h], found)
                state = w[b, t, h][:, None] * state - removed + np.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = q[b, t, h] @ state / np.sqrt(D)
    return o


RULES = {"lizard": lizard, "rad_rwkv6": rad_rwkv6, "rad_rwkv7": rad_rwkv7}


def expected(kind, p, x):
    q = normed(projected(x, p["query"]), p["query_norm"])
    k = normed(projected(x, p["key"]), p["key_norm"])
    v = projected(x, p["value"])
    o = RULES[kind](q, k, v, x, p)
    o = o * sigmoid(projected(x, p["gate"]["projection"]))
    return np.einsum("bthd,hdm->btm", o, p["out"]["kernel"])


def float64(tree):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), tree)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind):
    module, params = made(kind)
    x64 = np.asarray(X, np.float64)

    def loss(params, x):
        y = module.apply({"params": params}, x)
        return jnp.sum(y * WEIGHT.astype(np.float32)), y

    gradient, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, X)
    p64 = float64(params)
    assert rel_rms(y, expected(kind, p64, x64)) < 2e-6
    # Along one direction in every parameter by itself, and in the input.
    leaves, structure = jax.tree.flatten((p64, x64))
    gradients = jax.tree.leaves(gradient)
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape)
        sums = []
        for sign in (1.0, -1.0):
            there = [*leaves[:i], leaf + sign * 1e-5 * direction, *leaves[i + 1 :]]
            p, x = jax.tree.unflatten(structure, there)
            sums.append(np.sum(expected(kind, p, x) * WEIGHT))
        slope = (sums[0] - sums[1]) / 2e-5
        found = np.sum(np.asarray(gradients[i], np.float64) * direction)
        size = np.linalg.norm(np.asarray(gradients[i], np.float64)) * np.linalg.norm(direction)
        assert abs(found - slope) < 2e-5 * size + 1e-6, (kind, i, found, slope)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_and_documents(kind):
    """A prompt, a piece, padding, single tokens: what whole rows give."""
    module, params = made(kind)
    ids = jnp.asarray([[1] * T, [1] * 4 + [2] * 5])
    positions = jnp.asarray([np.arange(T), [0, 1, 2, 3, 0, 1, 2, 3, 4]])
    apply = jax.jit(module.apply)
    whole = apply({"params": params}, X, TokenInfo(positions, ids))
    alone = apply({"params": params}, X[1:, 4:])
    assert rel_rms(whole[1:, 4:], alone) < 1e-5

    @jax.jit
    def step(x, info, cache):
        return module.apply({"params": params}, x, info, cache, method="with_cache")

    y = apply({"params": params}, X)
    cache = module.init_cache(B, T)
    outputs = []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        o, cache = step(X[:, start:end], info_of(start, end - start), cache)
        outputs.append(o)
    assert rel_rms(np.concatenate(outputs, axis=1), y) < 1e-5


def test_a_new_kind_has_the_parameters_of_attention():
    """Weights of gated attention are taken by their names."""

    def shapes(config):
        init = MIXERS[config.kind](config).init
        params = jax.eval_shape(init, jax.random.key(0), X[:, :2])["params"]
        return {path: x.shape for path, x in flatten_dict(params).items()}

    attention = shapes(GatedAttentionConfig(**SIZES))
    for config in CONFIGS.values():
        assert attention.items() < shapes(config).items()


def test_features_and_decays():
    """The parts of the formulas that are functions of their own, in float64."""
    x = RNG.normal(size=(1, 2, H, D))
    w = RNG.normal(size=(H, D, 5))
    phi = np.asarray(hedgehog(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)))
    logits = np.einsum("bthd,hdf->bthf", x, w)
    right = np.concatenate([softmax(logits), softmax(-logits)], axis=-1)
    assert rel_rms(phi, right) < 1e-6
    np.testing.assert_allclose(phi.sum(axis=-1), 2.0, rtol=1e-6)
    logits = np.array([-30.0, -3.0, 0.0, 1.0, 5.0, 300.0])
    right = np.maximum(-np.exp(logits), -5.0)
    np.testing.assert_allclose(exponential_log_decay(jnp.asarray(logits)), right, rtol=1e-6)
    # No gradient where the bound holds, however large the logit.
    slopes = jax.vmap(jax.grad(exponential_log_decay))(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(slopes[:4], right[:4], rtol=1e-6)
    np.testing.assert_array_equal(slopes[4:], 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalizer", "softpick"),
        ("sinks", True),
        ("gate_position", "value"),
        ("selective_rope", "low_rank"),
        ("causal", False),
        ("shares_weights", True),
    ],
)
def test_what_has_no_place_is_refused(key, value):
    with pytest.raises(InputError, match=f"{key}: got"):
        LizardConfig(**SIZES, **{key: value})
