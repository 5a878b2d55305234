"""The whole model: scan over periods, decoding, packing, causality, rematerialization, chunked
loss.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from random_parameters import random_parameters

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    ModelConfig,
    SparseMoEConfig,
)
from gatedjax.layer_stack import remat_policy
from gatedjax.model import LanguageModel, head_weights, init_caches, logits
from gatedjax.training.losses import cross_entropy
from gatedjax.training.training_loss import training_loss
from kernels_pallas.ops import attention, rotary

MODEL = ModelConfig(
    vocab_size=32,
    width=32,
    num_layers=4,
    mixers=FrozenDict(
        gla=GatedLinearAttentionConfig(
            num_heads=2, num_kv_heads=2, key_dim=8, value_dim=16, conv_width=4, chunk_size=16
        ),
        attention=GatedAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    ),
    pattern=("gla", "attention"),
    ffns=FrozenDict(
        mlp=GatedMLPConfig(hidden=48),
        moe=SparseMoEConfig(num_experts=4, hidden=32, shared_hidden=16),
    ),
    ffn_pattern=("mlp", "moe"),
    init_std=0.2,
    dtype="float32",
)
DENSE = dataclasses.replace(MODEL, ffn_pattern=("mlp",), num_layers=2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 40)).astype(np.int32))


def make(config=MODEL):
    return random_parameters(LanguageModel(config), TOKENS, std=0.2)


@pytest.fixture(scope="module")
def params():
    return make()


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens, kwargs):
    return LanguageModel(config).apply({"params": params}, tokens, **kwargs)


def hidden(params, tokens, config=MODEL, **kwargs):
    return apply(config, params, tokens, kwargs)


def test_prefill_then_decode_equals_full_forward(params):
    full, _, _ = hidden(params, TOKENS)
    y, caches, _ = hidden(params, TOKENS[:, :33], caches=init_caches(MODEL, 2, 40))
    assert rel_rms(y, full[:, :33]) < 1e-5
    for t in range(33, 40):
        y, caches, _ = hidden(params, TOKENS[:, t : t + 1], caches=caches)
        assert rel_rms(y[:, 0], full[:, t]) < 1e-5
    assert caches.history.tokens.tolist() == [40, 40]


def test_packed_documents_equal_separate_ones(params):
    # Inside a chunk; and two documents of one length are one program.
    cut = 20
    segments = np.where(np.arange(40) < cut, 1, 2)[None].repeat(2, 0)
    positions = np.where(np.arange(40) < cut, np.arange(40), np.arange(40) - cut)[None].repeat(2, 0)
    packed, _, _ = hidden(params, TOKENS, positions=positions, segment_ids=segments)
    first, _, _ = hidden(params, TOKENS[:, :cut])
    second, _, _ = hidden(params, TOKENS[:, cut:])
    assert rel_rms(packed, jnp.concatenate([first, second], 1)) < 1e-5
    one = np.ones_like(segments)
    leaky, _, _ = hidden(params, TOKENS, positions=positions, segment_ids=one)
    assert rel_rms(leaky, packed) > 1e-2, (
        "the segments make no difference: this test could not fail"
    )


def test_no_token_sees_the_future(params):
    """The gradient of one position's output with respect to every embedded input is zero after it,
    not before.
    """

    def at(embeddings, t):
        # tokens 0..31 look themselves up: the table's rows are the inputs
        rows = params | {"embedding": embeddings}
        return jnp.sum(
            LanguageModel(MODEL).apply({"params": rows}, jnp.arange(32)[None])[0][0, t] ** 2
        )

    gradient = jax.jit(jax.grad(at), static_argnums=1)(params["embedding"], 20)
    size = np.abs(np.asarray(gradient)).sum(-1)
    assert (size[21:] == 0).all() and (size[:21] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"remat": "projections"},
        {"remat": "kernels"},
        {"remat": "full"},
        {"scan_layers": False},
    ],
)
def test_remat_and_unrolling_change_no_gradient(params, changed):
    def loss(p, config):
        h, _, _ = LanguageModel(config).apply({"params": p}, TOKENS[:, :20])
        return jnp.mean(h**2 * jnp.arange(h.shape[-1]))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(params, MODEL)
    actual = gradient(params, dataclasses.replace(MODEL, **changed))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert rel_rms(a, e) < 1e-5


def times_in_gradient(model, remat, what):
    """How often a text stands in the gradient of a model, as it is traced."""
    config = dataclasses.replace(model, remat=remat)

    def loss(p):
        return jnp.sum(LanguageModel(config).apply({"params": p}, TOKENS)[0])

    shapes = jax.eval_shape(lambda: make(model))
    return str(jax.make_jaxpr(jax.grad(loss))(shapes)).count(what)


def test_remat_repeats_no_more_than_it_says():
    """ "projections" repeats no matmul that is a projection's or an op's and no norm's mean of
    squares; "kernels" repeats no matmul that is an op's.
    """
    of_remat = functools.partial(times_in_gradient, DENSE)
    none, projections, kernels, full = (
        of_remat(remat, " dot_general[") for remat in ("none", "projections", "kernels", "full")
    )
    assert projections == none < kernels < full
    assert of_remat("projections", " = rsqrt ") == of_remat("none", " = rsqrt ")
    assert of_remat("kernels", " = rsqrt ") > of_remat("none", " = rsqrt ")


def test_the_stream_between_mixer_and_feed_forward_is_kept():
    """ "projections" adds the mixer's output to it once, in the forward pass."""
    model = dataclasses.replace(DENSE, pattern=("attention",))
    none, projections, kernels = (
        times_in_gradient(model, remat, "[2,40,32] = add ")
        for remat in ("none", "projections", "kernels")
    )
    assert projections == none < kernels


def test_a_backward_pass_rotates_nothing_again():
    """On TPUs "projections" keeps queries and keys as attention's kernels read them."""
    x = jnp.ones((1, 256, 2, 128), jnp.bfloat16)
    positions = jnp.arange(256)[None]
    frequencies = np.float32(100.0 ** (-np.arange(64) / 64))

    def loss(x):
        kernels = dict(implementation="tpu", interpret=True)
        q = rotary(x, positions, frequencies, jnp.ones(128), **kernels)
        return jnp.sum(attention(q, x, x, **kernels).astype(jnp.float32))

    def traced(remat):
        once = jax.checkpoint(loss, policy=remat_policy(remat))
        return str(jax.make_jaxpr(jax.grad(once))(x))

    projections, kernels = traced("projections"), traced("kernels")
    for what in ("name=rotary_forward", " = cos ", " = sin "):
        assert (projections.count(what), kernels.count(what)) == (1, 2), what


def test_statistics_come_from_sparse_layers_only(params):
    _, _, statistics = hidden(params, TOKENS)
    assert statistics["layer_0"] == {}
    counts = statistics["layer_1"]["counts"]
    assert counts.shape == (2, 4)
    np.testing.assert_array_equal(counts.sum(-1), TOKENS.size * 2)


def test_cross_entropy_is_the_negative_log_likelihood(params):
    h = jnp.asarray(np.random.default_rng(2).normal(size=(5, 32)), jnp.float32)
    targets, mask = jnp.arange(5), jnp.array([1.0, 0, 1, 1, 0])
    scores = np.asarray(logits(h, head_weights(params)), np.float64)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    losses = cross_entropy(h, head_weights(params), targets, mask)
    np.testing.assert_allclose(
        losses.cross_entropy, -(log_p[range(5), range(5)] * mask).sum(), rtol=1e-5
    )
    assert losses.count == 3


def test_padding_reaches_no_parameter(params):
    """Ids outside of the vocabulary in padding: loss and gradients of a step as without them."""
    segments = np.where(np.arange(40) < 25, 1, 0)[None].repeat(2, 0)
    mask = jnp.asarray(segments > 0, jnp.float32)

    def loss(params, tokens):
        ids = jnp.asarray(segments)
        h, _, _ = LanguageModel(DENSE).apply({"params": params}, tokens, None, ids)
        loss, _ = training_loss(h, head_weights(params), tokens, mask, jnp.float32(1), 0, 0.0)
        return loss

    dense = make(DENSE)
    value_and_gradients = jax.jit(jax.value_and_grad(loss))
    expected = value_and_gradients(dense, TOKENS)
    for bad in (-1, 32, -(2**31)):
        actual = value_and_gradients(dense, np.where(segments == 0, bad, TOKENS))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
            assert rel_rms(a, e) < 1e-6


def test_untied_head_has_its_own_weights():
    params = make(dataclasses.replace(MODEL, tie_embeddings=False))
    assert (
        head_weights(params) is params["head"] and params["head"].shape == params["embedding"].shape
    )
