"""GatedAttention against the formulas of arXiv 2505.06708, written out in float64 numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow
from random_parameters import random_parameters

from gatedjax.config import GatedAttentionConfig
from gatedjax.config.presets import GPT_OSS, LSSAR, QWEN3_NEXT, SWAT
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.kv_cache import append, distances_of_slots, in_time_order
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.rope import (
    NormedRope,
    apply_rope,
    inverse_frequencies,
    llama3_frequencies,
)
from gatedjax.layers.sinks import num_sink_channels, token_sinks_as_channels
from gatedjax.layers.token_info import TokenInfo, arranged, empty_history
from kernels_pallas.dispatch import lowering_for

B, T, M = 2, 12, 16
INFO = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)))
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, M)).astype(np.float32))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


SCORES = {
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "ns_sigmoid": lambda x: 0.5 + 0.5 * sigmoid(x),
    "identity": lambda x: x,
    "softplus": lambda x: np.log1p(np.exp(x)),
}


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reweighted_softplus(s, c):
    a, n = np.log1p(np.exp(s)), np.isfinite(s).sum(-1, keepdims=True)
    w = np.maximum(a / a.sum(-1, keepdims=True) * n - (n > 3), 0) ** c.reweight_power
    return w / np.maximum(w.sum(-1, keepdims=True), 1e-30)


# Weights of masked logits (-inf), without sinks.
WEIGHTS = {
    "softmax": lambda s, c: softmax(s),
    "sigmoid": lambda s, c: sigmoid(s - np.log(c.normalizer_length)),
    "relu_squared": lambda s, c: np.maximum(s, 0) ** 2 / c.normalizer_length,
    "clipped_softmax": lambda s, c: np.clip(
        (1 + c.clip_alpha / c.normalizer_length) * softmax(s) - c.clip_alpha / c.normalizer_length,
        0,
        1,
    ),
    "reweighted_softplus": reweighted_softplus,
}


def init(config, x=X):
    module = GatedAttention(config, 1e-6, 0.3, jnp.float32)
    info = TokenInfo(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    params = random_parameters(module, x, info)
    if config.logit_scale == "learned":
        # As large as it starts: with small logits the clipped weights are all zero.
        params["query_scale"]["logit_scale"] += 9.0
    return module, params


def run(module, params, x=X, info=None, cache=None):
    info = info or TokenInfo(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    return jitted(module)({"params": params}, x, info, cache)


@functools.cache
def jitted(module):
    return jax.jit(functools.partial(module.apply, method="with_cache"))


def head_logits(c, p, x):
    """One logit for every token and head: Quantizable Transformers, section 4.2."""
    if c.gate_input != "head":
        return (np.tensordot(x, p["projection"]["kernel"], 1) + p["bias"])[..., None]
    slices = x.reshape(*x.shape[:2], c.num_heads, -1)
    if c.gate_hidden:
        hidden = np.einsum("bths,hsf->bthf", slices, p["hidden_weights"]) + p["hidden_bias"]
        slices = np.maximum(hidden, 0)
    return (np.einsum("bths,hs->bth", slices, p["weights"]) + p["bias"])[..., None]


def selective_steps(c, p, x):
    """phi of Selective RoPE, by loops over tokens and heads; one document a row."""
    heads, half = c.kv_heads, c.rotary_dim // 2
    slices = x.reshape(*x.shape[:2], heads, -1)
    unit = slices / np.sqrt((slices**2).sum(-1, keepdims=True) + 1e-6)
    flat = unit.reshape(x.shape)
    if c.selective_rope == "low_rank":
        low = flat @ p["down"]["kernel"]
        steps = np.tensordot(low, p["up"]["kernel"], 1)
    else:
        length = np.sqrt((p["weights"] ** 2).sum(1, keepdims=True))
        kernel = p["weights"] / length * p["lengths"][:, None, None]
        steps = np.einsum("bths,hsj->bthj", unit, kernel)
    taps = p["conv"].reshape(-1, heads, half)
    mixed = np.zeros_like(steps)
    for t in range(x.shape[1]):
        for w in range(min(t + 1, len(taps))):
            mixed[:, t] += taps[len(taps) - 1 - w] * steps[:, t - w]
    if c.selective_activation == "silu":
        mixed = mixed * sigmoid(mixed)
    if c.selective_bias:
        mixed = mixed + np.exp(p["bias"])
    if c.selective_gate:
        logits = flat @ p["gate"]["kernel"] + p["gate"]["bias"]
        mixed = mixed * sigmoid(logits)[..., None]
    return mixed


def expected(c: GatedAttentionConfig, params, x) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    rms = lambda y, w: (
        y
        / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6)
        * (1 + w if c.zero_centered_norm else w)
    )

    def gated(position, y):
        if c.gate_position != position:
            return y
        if c.fused_gate:
            logits = fused
        elif c.gate_input == "constant":
            logits = p["gate"]["constant"][None, None]
        elif c.gate_input == "head" or c.gate_start:
            return (
                y
                * sigmoid(head_logits(c, p["gate"], x))
                / (c.gate_start if c.gate_fine_tuning else 1)
            )
        else:
            logits = np.tensordot(x, p["gate"]["projection"]["kernel"], 1)
        if c.gate_shared:
            logits = logits.mean(2, keepdims=True)
        score = SCORES[c.gate_activation](logits)
        return y + score if c.gate_mode == "additive" else y * score

    project = lambda n: np.tensordot(x, p[n]["kernel"], 1) + p[n].get("bias", 0)
    q, k, v = (project(n) for n in ("query", "key", "value"))
    q, fused = q[..., : c.head_dim], q[..., c.head_dim :]
    group = c.num_heads // c.kv_heads
    half = c.rotary_dim // 2
    frequencies = c.rope_base ** (-np.arange(half) / max(half, 1))
    turn = lambda y, angle: np.concatenate(
        [
            y[..., :half] * np.cos(angle) - y[..., half : 2 * half] * np.sin(angle),
            y[..., half : 2 * half] * np.cos(angle) + y[..., :half] * np.sin(angle),
            y[..., 2 * half :],
        ],
        -1,
    )
    if c.selective_rope != "none":
        angle = np.cumsum(selective_steps(c, p["selective_rope"], x), 1) * frequencies
        q, k = turn(q, np.repeat(angle, group, 2)), turn(k, angle)
    if c.qk_norm and c.qk_norm_kind == "l2":
        q, k = (y / np.sqrt(np.sum(y**2, -1, keepdims=True) + 1e-6) for y in (q, k))
    elif c.qk_norm and c.qk_norm_kind == "rms_all_heads":
        flat = lambda y: y.reshape(*y.shape[:2], -1)
        normed = lambda y, n: rms(flat(y), p[n]["scale"].reshape(-1)).reshape(y.shape)
        q, k = normed(q, "query_norm"), normed(k, "key_norm")
    elif c.qk_norm:
        q, k = rms(q, p["query_norm"]["scale"]), rms(k, p["key_norm"]["scale"])
    q, k, v = gated("query", q), gated("key", k), gated("value", v)
    if c.rope_layout == "interleaved":
        # The even channels of those that rotate, then the odd ones: for both, so q k is the same.
        order = [*range(0, 2 * half, 2), *range(1, 2 * half, 2), *range(2 * half, c.head_dim)]
        q, k = q[..., order], k[..., order]
    if c.selective_rope == "none":
        angle = np.arange(T)[:, None, None] * frequencies
        q, k = turn(q, angle), turn(k, angle)
    scale = p.get("query_scale", {})
    log_n = np.log(np.minimum(np.arange(1, x.shape[1] + 1), c.window or T))[:, None]
    temperature = lambda name: np.tanh(np.tensordot(x, scale[name]["kernel"], 1))
    if c.query_scale == "log_length":
        q = q * log_n[..., None]
    if c.query_scale == "scalable_softmax":
        q = q * (scale["length_scale"] * log_n)[..., None]
    if c.query_scale == "selective":
        q = (
            q
            * (temperature("query_temperature") + 1 + sigmoid(scale["length_weight"]) * log_n)[
                ..., None
            ]
        )
        v = v * (temperature("value_temperature") + 1)[..., None]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    times = {
        "inverse_sqrt": c.attention_scale or c.head_dim**-0.5,
        "log_dim": np.log(c.head_dim),
        "learned": scale.get("logit_scale"),
    }
    s = np.einsum("bthd,bshd->bhts", q, k) * np.reshape(times[c.logit_scale], (-1, 1, 1))
    if c.logits_soft_cap:
        s = c.logits_soft_cap * np.tanh(s / c.logits_soft_cap)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    halves = 2.0 ** -np.arange(1, c.num_heads // 2 + 1)
    slopes = {
        "none": 0 * np.arange(c.num_heads),
        "fixed": 2.0 ** (-8 * np.arange(1, c.num_heads + 1) / c.num_heads),
        "balanced": np.concatenate([halves, -halves]),
        "learned": p.get("alibi_slopes"),
    }
    s = s - slopes[c.alibi][:, None, None] * np.abs(i - j)
    s = np.where((j <= i) & (j > i - (c.window or T)), s, -np.inf)
    weights = WEIGHTS[c.normalizer](s, c)
    if c.sinks:
        weights = np.exp(s) / (
            np.exp(s).sum(-1, keepdims=True) + np.exp(p["sink_logits"])[:, None, None]
        )
    if c.token_sinks:
        own = np.moveaxis(np.tensordot(x, p["token_sinks"]["kernel"], 1), 1, 2)[..., None]
        weights = np.exp(s) / (np.exp(s).sum(-1, keepdims=True) + np.exp(own))
    o = gated("sdpa", np.einsum("bhts,bshd->bthd", weights, v))
    y = np.tensordot(o, p["out"]["kernel"], 2) + p["out"].get("bias", 0)
    return gated("output", y)


BASE = dict(num_heads=4, num_kv_heads=2, head_dim=8)
VARIANTS = {
    "G1": {},
    "G1 headwise": dict(gate_granularity="headwise"),
    "G1 shared": dict(gate_shared=True),
    "G1 headwise shared": dict(gate_shared=True, gate_granularity="headwise"),
    "G1 additive silu": dict(gate_mode="additive", gate_activation="silu"),
    "G1 silu": dict(gate_activation="silu"),
    "G1 ns_sigmoid": dict(gate_activation="ns_sigmoid"),
    "G1 additive identity": dict(gate_mode="additive", gate_activation="identity"),
    "G1 constant": dict(gate_input="constant"),
    "G1 constant headwise": dict(gate_input="constant", gate_granularity="headwise"),
    "G2": dict(gate_position="value"),
    "G2 headwise": dict(gate_position="value", gate_granularity="headwise"),
    "G2 shared": dict(gate_position="value", gate_shared=True),
    "G3": dict(gate_position="key"),
    "G3 headwise": dict(gate_position="key", gate_granularity="headwise"),
    "G4": dict(gate_position="query"),
    "G5": dict(gate_position="output"),
    "none": dict(gate_position="none"),
    "no qk-norm, no rope": dict(qk_norm=False, rope_fraction=0.0),
    "partial rope, zero-centered": dict(rope_fraction=0.25, zero_centered_norm=True),
    "window": dict(window=3),
    "sinks, cap": dict(sinks=True, logits_soft_cap=2.0),
    "fused": dict(fused_gate=True),
    "fused headwise silu": dict(
        fused_gate=True, gate_granularity="headwise", gate_activation="silu"
    ),
    "sigmoid, fixed slopes": dict(normalizer="sigmoid", normalizer_length=9, alibi="fixed"),
    "relu^2, learned slopes": dict(normalizer="relu_squared", normalizer_length=9, alibi="learned"),
    "clipped, unit queries and keys": dict(
        normalizer="clipped_softmax",
        normalizer_length=9,
        clip_alpha=1.0,
        qk_norm_kind="l2",
        logit_scale="learned",
    ),
    "scalable softmax, window": dict(query_scale="scalable_softmax", normalizer_length=9, window=5),
    "selective": dict(query_scale="selective"),
    "biases, tokens' sinks, norm over heads, neighbors rotate, scale, softplus": dict(
        bias="all",
        token_sinks=True,
        qk_norm_kind="rms_all_heads",
        zero_centered_norm=True,
        rope_layout="interleaved",
        rope_fraction=0.5,
        attention_scale=0.2,
        gate_activation="softplus",
        window=7,
    ),
    "qkv biases, no norm, slopes": dict(
        bias="qkv", qk_norm=False, token_sinks=True, alibi="learned"
    ),
    "MLPs of heads gate, tokens rotate": dict(
        gate_input="head",
        gate_granularity="headwise",
        gate_hidden=3,
        gate_start=0.25,
        gate_fine_tuning=True,
        selective_rope="low_rank",
        selective_rank=3,
        selective_bias=True,
        selective_gate=True,
        rope_fraction=0.5,
        rope_base=9.0,
    ),
    "slices of heads gate, slices rotate": dict(
        gate_input="head",
        gate_granularity="headwise",
        selective_rope="per_head",
        selective_activation="none",
    ),
    "biased gate of the token": dict(gate_granularity="headwise", gate_start=0.25),
    "qwen3_next": QWEN3_NEXT | BASE,
    "gpt_oss": GPT_OSS | dict(window=3),
    "swat": SWAT | dict(window=4),
    "lssar": LSSAR | dict(reweight_power=3),
}


# Their gradients are checked too.
OF_FAMILIES = (
    "biases, tokens' sinks, norm over heads, neighbors rotate, scale, softplus",
    "qkv biases, no norm, slopes",
    "MLPs of heads gate, tokens rotate",
    "slices of heads gate, slices rotate",
)


@pytest.mark.parametrize("name", [OF_FAMILIES[0], *(slow(name) for name in OF_FAMILIES[1:])])
def test_gradients_equal_differences_of_the_formula(name):
    config = GatedAttentionConfig(**BASE | VARIANTS[name])
    module, params = init(config)
    weight = np.random.default_rng(2).normal(size=X.shape)
    given = {"params": params, "x": X}

    def loss(given):
        y, _ = module.apply({"params": given["params"]}, given["x"], INFO, method="with_cache")
        return jnp.sum(y * weight), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(given)
    assert rel_rms(y, expected(config, params, X)) < 1e-5

    def formula(given):
        return (expected(config, given["params"], given["x"]) * weight).sum()

    check_gradients(formula, given, gradient)


# Pairs of what other variants have one by one.
SLOW_VARIANTS = (
    "G1 headwise shared",
    "G1 silu",
    "G1 constant headwise",
    "G2 headwise",
    "G2 shared",
    "biased gate of the token",
    "slices of heads gate, slices rotate",
)
FORMULAS = [name for name in VARIANTS if name not in OF_FAMILIES[:2]]


@pytest.mark.parametrize("name", [slow(n) if n in SLOW_VARIANTS else n for n in FORMULAS])
def test_equals_the_formula(name):
    config = GatedAttentionConfig(**BASE | VARIANTS[name])
    module, params = init(config)
    y, _ = run(module, params)
    assert rel_rms(y, expected(config, params, X)) < 1e-5


def test_constant_gate_starts_at_one_half():
    config = GatedAttentionConfig(**BASE, gate_input="constant")
    module = GatedAttention(config, 1e-6, 0.3, jnp.float32)
    info = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)))
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), X, info)["params"])
    ungated = GatedAttention(
        GatedAttentionConfig(**BASE, gate_position="none"), 1e-6, 0.3, jnp.float32
    )
    plain = run(ungated, {k: v for k, v in params.items() if k != "gate"})[0]
    assert rel_rms(run(module, params)[0], 0.5 * plain) < 1e-6


DECODED = (
    slow("G1"),
    OF_FAMILIES[0],
    slow("G1 shared"),
    "G1 additive silu",
    "G3 headwise",
    "window",
    "sinks, cap",
    "qwen3_next",
    "swat",
    "lssar",
)


@pytest.mark.parametrize("name", DECODED)
def test_prefill_then_decode_equals_full_forward(name):
    config = GatedAttentionConfig(**BASE | VARIANTS[name])
    module, params = init(config)
    full, _ = run(module, params)
    prompt = 5
    y, cache = run(module, params, X[:, :prompt], cache=module.init_cache(B, T))
    assert rel_rms(y, full[:, :prompt]) < 1e-5
    for t in range(prompt, T):
        y, cache = run(module, params, X[:, t : t + 1], TokenInfo(jnp.full((B, 1), t)), cache)
        assert rel_rms(y[:, 0], full[:, t]) < 1e-5
    if config.window:
        assert cache.k.shape[1] == config.window, "a window's cache must not grow with the text"


def test_a_layer_by_itself_takes_a_prompt_in_pieces():
    """Without a history the row is one document, of which positions say how much came before."""
    config = GatedAttentionConfig(**BASE | VARIANTS["window"])
    module, params = init(config)
    full, _ = run(module, params)
    cache, pieces = module.init_cache(B, T), []
    for first, last in ((0, 5), (5, 9), (9, 10), (10, T)):
        info = TokenInfo(jnp.broadcast_to(jnp.arange(first, last), (B, last - first)))
        y, cache = run(module, params, X[:, first:last], info, cache)
        pieces.append(y)
    assert rel_rms(jnp.concatenate(pieces, 1), full) < 1e-5
    info = TokenInfo(info.positions, jnp.ones((B, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"info.before: got None with segment_ids and a cache"):
        run(module, params, X[:, :2], info, cache)


def test_ring_cache_holds_the_last_tokens():
    """Of rows at different places; what the ring holds of another document is not seen."""
    config = GatedAttentionConfig(**BASE, window=4)
    cache = GatedAttention(config).init_cache(2, 100)
    ids = jnp.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0, 0]])
    tokens = jnp.broadcast_to(jnp.arange(7.0)[None, :, None, None], (2, 7, 2, 8))
    info, after, _ = arranged(ids, None, ids, empty_history(2))
    cache = append(cache, tokens, tokens, info.before, info.segment_ids)
    assert sorted(cache.k[0, :, 0, 0].tolist()) == [3.0, 4.0, 5.0, 6.0]
    assert sorted(cache.k[1, :, 0, 0].tolist()) == [1.0, 2.0, 3.0, 4.0]
    ordered, is_held = in_time_order(cache, after)
    assert ordered.k[:, :, 0, 0].tolist() == [[3.0, 4.0, 5.0, 6.0], [0.0, 2.0, 3.0, 4.0]]
    assert is_held.tolist() == [[True] * 4, [False, True, True, True]]

    new = jnp.broadcast_to(jnp.array([7.0, 5.0])[:, None, None, None], (2, 1, 2, 8))
    cache = append(cache, new, new, after, None)
    distances, valid = distances_of_slots(4, after, None)
    assert valid.all(), "in row 1 the ring's last slot of document 1 was overwritten"
    newest = np.array([[7.0], [5.0]])
    np.testing.assert_array_equal(newest - distances, cache.k[:, :, 0, 0])
    _, valid = distances_of_slots(4, after, jnp.array([[1], [2]]))
    assert valid.sum(axis=1).tolist() == [4, 1], "a document that begins sees itself only"


@pytest.mark.parametrize("dtype, atol", [("float32", 0), ("bfloat16", 0), ("float16", 3e-5)])
def test_sinks_of_tokens_keep_their_bits_in_channels(dtype, atol):
    """Also where XLA would leave out casts there and back."""
    sinks = 10 * X[:, :, :2]
    q, k = jnp.zeros((B, T, 2, 4), dtype), jnp.zeros((B, T, 1, 4), dtype)
    q, k = jax.jit(lambda *x: token_sinks_as_channels(*x, scale=0.37))(q, k, sinks)
    assert q.dtype == k.dtype == dtype and k.shape[-1] == 4 + num_sink_channels(dtype)
    logits = 0.37 * np.sum(np.float64(q) * np.float64(k), -1)
    np.testing.assert_allclose(logits, -np.float64(sinks), rtol=2.0**-22, atol=atol)


def test_rope_scores_depend_on_distance_only():
    frequencies = inverse_frequencies(8, 10_000.0)
    q, k = jnp.asarray(X[:1, :1, None, :8]), jnp.asarray(X[1:, :1, None, :8])
    score = lambda i, j: jnp.sum(
        apply_rope(q, jnp.array([[i]]), frequencies) * apply_rope(k, jnp.array([[j]]), frequencies)
    )
    np.testing.assert_allclose(score(17, 5), score(112, 100), rtol=1e-4)
    assert abs(score(17, 5) - score(17, 6)) > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs, magnitude", [(4, 1.0), (3, 1.25)])
def test_rope_on_a_tpu_is_the_same_to_the_last_bit(pairs, magnitude, interleaved):
    """There it multiplies by a matrix; its gradient is a rotation back."""
    frequencies = inverse_frequencies(2 * pairs, 100.0)
    x, dy = (jnp.asarray(z[:, :, None, :8], jnp.bfloat16) for z in (X, X[::-1]))
    positions = 7 * jnp.arange(2 * T).reshape(2, T)
    rope = lambda x: apply_rope(x, positions, frequencies, magnitude, interleaved)
    y, pull = jax.vjp(rope, x)
    with lowering_for("tpu"):
        y_tpu, pull_tpu = jax.vjp(rope, x)
        assert "dot_general" in str(jax.make_jaxpr(rope)(x))
    np.testing.assert_array_equal(y, y_tpu)
    np.testing.assert_array_equal(pull(dy)[0], pull_tpu(dy)[0])


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_and_rotation_at_once_are_those_two_layers(zero_centered):
    frequencies = inverse_frequencies(6, 100.0)
    x = jnp.asarray(X[:, :, None, :8], jnp.bfloat16)
    positions = 7 * jnp.arange(2 * T).reshape(2, T)
    rest = (positions, frequencies, 1.25, True)
    params = {"params": {"scale": jnp.linspace(-1.0, 1.0, 8)}}
    normed = RMSNorm(1e-2, zero_centered).apply(params, x)
    at_once = NormedRope(1e-2, zero_centered).apply(params, x, *rest)
    np.testing.assert_array_equal(at_once, apply_rope(normed, *rest))


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain = inverse_frequencies(64, 10_000.0)
    scaled = inverse_frequencies(64, 10_000.0, yarn_factor=8.0, yarn_original_length=4096)
    turns = plain * 4096 / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


def test_llama3_slows_pairs_by_their_wavelengths():
    """Its published code, pair by pair."""
    plain = inverse_frequencies(64, 500_000.0)
    expected = []
    for frequency in plain.astype(np.float64):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            expected.append(frequency)
        elif wavelength > 8192 / 1.0:
            expected.append(frequency / 8.0)
        else:
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    found = llama3_frequencies(plain, 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == plain[0] and found[-1] < plain[-1] / 7.9


def test_yarn_that_does_not_truncate_blends_between_fractions_of_pairs():
    """gpt-oss."""
    found = inverse_frequencies(16, 1e4, 8.0, 4096, yarn_truncate=False)
    pair = lambda turns: 16 * np.log(4096 / (2 * np.pi * turns)) / (2 * np.log(1e4))
    slowed = np.clip((np.arange(8) - pair(32)) / (pair(1) - pair(32)), 0, 1)
    plain = 1e4 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(found, plain * (1 - slowed) + plain / 8 * slowed, rtol=1e-6)
