"""What an attention layer learns of its normalizer, and what stands between the op and the gate:
against formulas in float64 numpy.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from tiny_run import plain, random_batch, replace, run_steps

from gatedjax.config import GatedAttentionConfig, ModelConfig
from gatedjax.errors import InputError
from gatedjax.layers.added_losses import ADDED_LOSSES, has_added_losses, reluformer_loss
from gatedjax.layers.after_sdpa import AfterSDPA
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.block import Block
from gatedjax.layers.gate import split_gate
from gatedjax.layers.gaussian import distances_as_channels
from gatedjax.layers.normalizer import numbers_of
from gatedjax.layers.taylor import kronecker_power, taylor_attention
from gatedjax.layers.token_info import TokenInfo, arranged, empty_history
from gatedjax.training.run import prepare
from gatedjax.training.state import init_state
from gatedjax.training.step import train_step
from kernels_pallas.ops import attention

B, T, M, H, HK, D = 2, 9, 16, 4, 2, 4
SMALL = dict(num_heads=H, num_kv_heads=HK, head_dim=D, rope_fraction=0.0)
X = np.random.default_rng(0).normal(size=(B, T, M)).astype(np.float32)
INFO = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)))


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def init(config):
    module = GatedAttention(config, 1e-6, 0.3, jnp.float32)
    params = nn.meta.unbox(module.init(jax.random.key(0), X, INFO)["params"])
    moved = lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape)
    return module, jax.tree.map(moved, params)


def causal(s, fill=-np.inf):
    return np.where(np.tril(np.ones(s.shape[-2:], bool)), s, fill)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def relu_weights(s):
    n = np.arange(1, s.shape[-1] + 1)[:, None]
    return causal(np.maximum(s, 0) / np.sqrt(n / 2), 0.0)


def centered(s):
    n = np.arange(1, s.shape[-1] + 1)[:, None]
    return softmax(causal(s)), causal(np.ones_like(s), 0.0) / n


def by_head(x):
    return np.asarray(x, np.float64)[:, None, None]


def layer_by_formula(c, params):
    """The layer in float64: no rotation, no QK-norm, no gate."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    q, k, v = (np.tensordot(X, p[n]["kernel"], 1) for n in ("query", "key", "value"))
    k, v = (np.repeat(y, H // HK, axis=2) for y in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, k)
    if c.similarity == "gaussian":
        difference = q[:, :, None] - k[:, None]
        s = np.moveaxis(-(difference**2).sum(-1) / 2, -1, 1)
    s = s * D**-0.5
    if c.normalizer == "softmax":
        w = softmax(causal(s))
    if c.normalizer == "exp_mean":
        n = np.arange(1, T + 1)[:, None]
        w = causal(np.exp(np.minimum(s, c.exp_cap)), 0.0) / n
    if c.normalizer == "reluformer":
        w = relu_weights(s) / np.exp(by_head(p["log_gamma"]))
    if c.normalizer == "centered_softmax":
        attended, mean = centered(s)
        w = by_head(p["softmax_weight"]) * attended - by_head(p["center_weight"]) * mean
    o = np.einsum("bhts,bshd->bthd", w, v)
    after = p.get("after_sdpa", {})
    if c.value_skip:
        o = o + after["value_skip"][:, None] * v
    if c.after_sdpa == "silu":
        o = o / (1 + np.exp(-o))
    if c.after_sdpa == "layer_norm":
        o = o - o.mean(-1, keepdims=True)
    if c.after_sdpa in ("rms_norm", "layer_norm"):
        o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-6) * after["norm"]["scale"]
    if c.after_sdpa == "layer_norm":
        o = o + after["norm"]["bias"]
    return np.tensordot(o, p["out"]["kernel"], 2)


LAYERS = {
    "reluformer": dict(normalizer="reluformer"),
    "shaped": dict(normalizer="centered_softmax", value_skip=True),
    "exp, silu": dict(normalizer="exp_mean", exp_cap=0.5, after_sdpa="silu"),
    "layer norm": dict(after_sdpa="layer_norm"),
    "gaussian, norm": dict(similarity="gaussian", after_sdpa="rms_norm"),
}


@pytest.mark.parametrize("name", [name if name == "shaped" else slow(name) for name in LAYERS])
def test_layer_equals_its_formula(name):
    config = GatedAttentionConfig(**SMALL, qk_norm=False, gate_position="none", **LAYERS[name])
    module, params = init(config)
    y = module.apply({"params": params}, X, INFO)
    assert rel_rms(y, layer_by_formula(config, params)) < 1e-5


def test_learned_numbers_of_the_op():
    """alpha = 1 + sigmoid(a); the others as they are, in the order of the op."""
    a = jnp.asarray([-1.0, 0.0, 2.0])
    c = GatedAttentionConfig(normalizer="learned_entmax", num_heads=3)
    assert rel_rms(numbers_of({"entmax_logits": a}, c), 1 + 1 / (1 + np.exp(-a))[None]) < 1e-6
    c = GatedAttentionConfig(normalizer="normalized_pooling", num_heads=3)
    found = numbers_of({"pooling_bias": a, "pooling_gain": 2 * a}, c)
    assert np.array_equal(found, np.stack([2 * a, a]))
    assert numbers_of({}, GatedAttentionConfig()) is None


def test_channels_give_distances():
    """In float32, and in bfloat16 to the bits of float32 products."""
    q, k = normal(1, 5, H, D), normal(1, 5, HK, D, seed=2)
    for dtype in (jnp.float32, jnp.bfloat16):
        a, b = (jnp.asarray(x, dtype) for x in (q, k))
        q_with, k_with = distances_as_channels(a, b, 0.3)
        wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
        product = np.einsum("bthd,bshd->bhts", wide(q_with), np.repeat(wide(k_with), 2, axis=2))
        difference = wide(a)[:, :, None] - np.repeat(wide(b), 2, axis=2)[:, None]
        assert rel_rms(0.3 * product, np.moveaxis(-0.15 * (difference**2).sum(-1), -1, 1)) < 1e-6


def test_a_gate_comes_after_what_changes_the_output():
    logits = jnp.ones((B, T, H, D))
    changed = GatedAttentionConfig(**SMALL, after_sdpa="silu")
    assert split_gate(logits, changed, logits).in_op is None
    assert split_gate(logits, GatedAttentionConfig(**SMALL), logits).after is None


def test_a_skip_adds_the_values_of_the_head():
    o, v = normal(B, T, H, D), normal(B, T, HK, D, seed=2)
    config = GatedAttentionConfig(**SMALL, value_skip=True)
    alpha = np.asarray([1.0, -2.0, 0.5, 0.0])
    o, v, alpha = (np.asarray(x, np.float32) for x in (o, v, alpha))
    y = AfterSDPA(config, 1e-6).apply({"params": {"value_skip": alpha}}, o, v)
    assert rel_rms(y, o + alpha[:, None] * np.repeat(v, 2, axis=2)) < 1e-6


def loss_by_formula(s):
    w = relu_weights(s)
    total = w.sum(-1)
    entropy = -np.sum(w * np.log(np.where(w > 0, w, 1)), -1)
    n = np.arange(1, s.shape[-1] + 1)
    loss = np.abs(np.log(np.maximum(total, 1e-6))) + np.maximum(entropy - 0.7 * np.log(n), 0)
    return loss.mean(1)


def test_reluformer_loss():
    """Its formula, and its gradient against differences."""
    q, k = 2 * normal(B, T, H, D), normal(B, T, HK, D, seed=2)
    seen = jnp.broadcast_to(jnp.arange(1, T + 1), (B, T))

    def formula(q):
        return loss_by_formula(0.5 * np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2)))

    with jax.enable_x64(True):

        def loss(q):
            return reluformer_loss(q, jnp.asarray(k), None, seen, window=None, scale=0.5)

        @jax.jit
        def both(q, cotangent):
            y, pull = jax.vjp(loss, q)
            return y, pull(cotangent)[0]

        cotangent = normal(B, T, seed=3)
        actual, dq = both(jnp.asarray(q), jnp.asarray(cotangent))
        direction, step = normal(*q.shape, seed=4), 1e-6
        difference = formula(q + step * direction) - formula(q - step * direction)
    assert rel_rms(actual, formula(q)) < 1e-12
    expected = np.sum(cotangent * difference) / (2 * step)
    assert abs(np.sum(dq * direction) - expected) < 1e-5 * abs(expected)


@pytest.mark.slow
def test_the_layer_sows_the_loss():
    """A mean over tokens, times its weight; nothing without a weight, nothing in `init`."""
    values = dict(normalizer="reluformer", qk_norm=False, gate_position="none")
    config = GatedAttentionConfig(**SMALL, **values, reluformer_loss=0.1)
    module, params = init(config)
    assert ADDED_LOSSES not in params
    ids = jnp.asarray([[1] * T, [1] * 5 + [0] * (T - 5)])
    info = TokenInfo(INFO.positions, ids)
    _, sown = module.apply({"params": params}, X, info, mutable=[ADDED_LOSSES])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    q, k = (np.tensordot(X, p[n]["kernel"], 1) for n in ("query", "key"))
    q = q / np.exp(p["log_gamma"])[:, None]
    s = D**-0.5 * np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2))
    of_tokens = loss_by_formula(s)[np.asarray(ids) != 0]
    (found,) = jax.tree.leaves(sown)
    assert abs(float(found) - 0.1 * of_tokens.mean()) < 1e-5


def with_reluformer(**changes):
    options = dict(normalizer="reluformer", reluformer_loss=0.5)
    return plain(
        **{f"model__mixers__attention__{name}": value for name, value in options.items()},
        **changes,
    )


@pytest.mark.slow
def test_the_step_adds_the_loss():
    """Traced only: it is a metric of its own, where there is one."""
    for config in (with_reluformer(), plain()):
        run = prepare(config)
        state = jax.eval_shape(partial(init_state, config, run.tx), jax.random.key(0))
        step = partial(train_step, config, run.tx)
        _, metrics = jax.eval_shape(step, state, random_batch())
        assert ("added_loss" in metrics) == has_added_losses(config.model)
    assert has_added_losses(with_reluformer().model)


@pytest.mark.slow
def test_parts_of_the_loss_add_up():
    """Of micro-batches with unequal numbers of tokens: the same loss and the same gradient."""
    batches = lambda i: random_batch(i, rows=16)
    config = with_reluformer(train__batch_size=16)
    _, _, whole = run_steps(config, 2, batches)
    in_parts = replace(config, train__accumulation_steps=2)
    _, _, parts = run_steps(in_parts, 2, batches)
    for x, y in zip(whole, parts):
        assert x["added_loss"] > 0
        assert x["added_loss"] == pytest.approx(y["added_loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


def test_a_residual_weight_keeps_the_squares():
    block = Block(ModelConfig(vocab_size=8, residual_weight=0.6), None)
    assert np.allclose(block._sum(np.ones(3), 2 * np.ones(3)), 0.6 + 0.8 * 2)


def test_kronecker_powers_multiply():
    q, k = normal(5, 3), normal(5, 3, seed=2)
    product = np.sum(kronecker_power(jnp.asarray(q), 4) * kronecker_power(jnp.asarray(k), 4), -1)
    assert rel_rms(product, np.sum(q * k, -1) ** 4) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("order, error", [(2, 1e-1), (12, 1e-6)])
def test_taylor_orders_converge_to_exp(order, error):
    """The recurrent view: linear scans of Kronecker powers."""
    q, k, v = (0.9 * normal(1, 6, 2, 2, seed=i).astype(np.float32) for i in range(3))
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    expected = attention(q, k, v, normalizer="exp", segment_ids=ids, implementation="reference")
    actual = taylor_attention(q, k, v, order, segment_ids=ids)
    assert rel_rms(actual, expected) < error


DECODED = {
    "learned": dict(normalizer="learned_entmax", value_skip=True, after_sdpa="rms_norm"),
    "gaussian": dict(similarity="gaussian", normalizer="exp_mean", window=4),
    "reluformer": dict(normalizer="reluformer", window=4),
    "shaped": dict(normalizer="centered_softmax", value_skip=True),
    "pooling": dict(normalizer="normalized_pooling", after_sdpa="silu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODED)
def test_decoding_equals_the_row(name):
    """A piece of five tokens, then single ones."""
    module, params = init(GatedAttentionConfig(**SMALL, **DECODED[name]))
    expected = module.apply({"params": params}, X, INFO)
    cache, before, got = module.init_cache(B, T), empty_history(B), []
    for piece in (X[:, :5], *(X[:, t : t + 1] for t in range(5, T))):
        tokens = jnp.zeros(piece.shape[:2], jnp.int32)
        info, before, _ = arranged(tokens, None, None, before)
        y, cache = module.apply({"params": params}, piece, info, cache, method="with_cache")
        got.append(y)
    assert rel_rms(jnp.concatenate(got, axis=1), expected) < 1e-5


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(reluformer_loss=0.1), "reluformer_loss: got 0.1, expected 0 with normalizer"),
        (
            dict(normalizer="reluformer", alibi="fixed"),
            "alibi: got 'fixed', expected none of its kind with normalizer 'reluformer'",
        ),
        (dict(normalizer="exp", sinks=True), "sinks: got True, expected false with normalizer"),
        (dict(exp_cap=0.0), "exp_cap: got 0.0, expected above 0"),
        (dict(normalizer="sink"), "normalizer: got 'sink', expected one of softmax"),
        (dict(normalizer="qr"), "normalizer: got 'qr', expected softmax or the like with causal"),
        (
            dict(normalizer="sinkhorn", causal=False, window=3),
            "window: got 3, expected none with normalizer 'sinkhorn'",
        ),
        (dict(prefix=2, alibi="fixed"), "alibi: got 'fixed', expected none with a prefix"),
        (dict(prefix=2, normalizer="exp"), "prefix: got 2, expected 0 unless the normalizer is"),
        (dict(block_gate=3), "block_gate: got 3, expected an even number"),
        (dict(block_gate_top=3), "block_gate_top: got 3, expected 0 without a block_gate"),
        (dict(block_gate=8, window=4), "window: got 4, expected none with a block_gate"),
    ],
)
def test_bad_combinations_are_named(values, message):
    with pytest.raises(InputError) as error:
        GatedAttentionConfig(**SMALL, **values)
    assert message in str(error.value) and "\n" not in str(error.value)
