"""Selective RoPE's angles, MoVE's bank of values and UniAttn's shared weights, in float64 numpy and
inside models.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow
from hidden_states import hidden
from random_parameters import random_parameters

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    MeshConfig,
    ModelConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.rope import inverse_frequencies
from gatedjax.layers.selective_rope import SelectiveAngles, accumulated_angles
from gatedjax.layers.shared_weights import SharedWeights, ValueCache, compensation_start
from gatedjax.layers.token_info import TokenInfo, default_info
from gatedjax.layers.value_bank import mixed_values
from gatedjax.model import LanguageModel, init_caches
from gatedjax.sharding import RULES, make_mesh
from gatedjax.training.flops import forward_flops_per_token

R = np.random.default_rng(0)
OWN = GatedAttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    gate_input="head",
    gate_granularity="headwise",
    gate_start=0.25,
    selective_rope="low_rank",
    selective_rank=3,
    value_bank=2,
    window=6,
)
SHARED = dataclasses.replace(OWN, shares_weights=True, gate_input="token", gate_start=None)
LINEAR = GatedLinearAttentionConfig(
    num_heads=2,
    key_dim=8,
    value_dim=8,
    rope_fraction=1.0,
    selective_rope="per_head",
)
MODEL = ModelConfig(
    vocab_size=32,
    width=16,
    num_layers=2,
    mixers=FrozenDict(own=OWN, shared=SHARED, linear=LINEAR),
    pattern=("own", "shared"),
    ffns=FrozenDict(mlp=GatedMLPConfig(hidden=16)),
    init_std=0.3,
    scan_layers=False,
    dtype="float32",
)
WITH_LINEAR = dataclasses.replace(
    MODEL, num_layers=6, pattern=("own", "linear", "shared"), scan_layers=True
)
TOKENS = jnp.asarray(R.integers(0, 32, (2, 14)), jnp.int32)
DOCUMENTS = jnp.asarray([[1] * 5 + [2] * 9, [7] * 3 + [9] * 8 + [0] * 3], jnp.int32)
IS_TOKEN = (DOCUMENTS > 0)[..., None]


def made(model):
    return random_parameters(LanguageModel(model), TOKENS)


def test_angles_are_sums_over_the_document_modulo_a_turn():
    """A thousand tokens that turn by radians each: no bits are lost. Gradients end at documents."""
    length, starts = 1000, (0, 300, 700)
    ids = np.ones(length, np.int32)
    ids[300:690], ids[690:700], ids[700:] = 2, 0, 3
    steps = R.normal(3.0, 1.0, (1, length, 1, 2))
    steps[:, 690:700] = 1e9
    start, weight = R.normal(size=(1, 1, 2)), R.normal(size=steps.shape)

    def loss(given):
        angles = accumulated_angles(given["steps"], jnp.asarray(ids[None]), given["start"])
        return jnp.sum(angles * weight), angles

    # The formula of the float32 numbers: it is the sum that is looked at.
    given = jax.tree.map(jnp.float32, {"steps": steps, "start": start})
    gradient, angles = jax.jit(jax.grad(loss, has_aux=True))(given)
    real = np.where(ids[None, :, None, None] > 0, np.float64(given["steps"]), 0)
    real[:, 0] += np.float64(given["start"])
    expected, slopes = np.zeros_like(real), np.zeros_like(real)
    for first, last in zip(starts, (*starts[1:], length)):
        expected[:, first:last] = np.cumsum(real[:, first:last], 1)
        slopes[:, first:last] = np.cumsum(weight[:, first:last][:, ::-1], 1)[:, ::-1]
    assert np.abs(angles).max() <= np.pi + 1e-6
    turned = np.float64(angles) - expected
    assert np.abs(np.angle(np.exp(1j * turned))).max() < 1e-4, "naive float32 sums: 1e-3"
    slopes = np.where(ids[None, :, None, None] > 0, slopes, 0)
    assert rel_rms(gradient["steps"], slopes) < 1e-5
    assert rel_rms(gradient["start"], slopes[:, 0]) < 1e-5


@pytest.mark.parametrize("kind", ["low_rank", slow("per_head")])
def test_steps_of_one_are_rope(kind):
    config = dataclasses.replace(OWN, selective_rope=kind, selective_bias=True)
    x = jnp.asarray(R.normal(size=(1, 5, 16)), jnp.float32)
    frequencies = inverse_frequencies(8, 10_000.0)
    module = SelectiveAngles(config, jnp.float32)
    apply = lambda method, first: method(first, x, default_info(x), frequencies, None)
    shapes = jax.eval_shape(lambda key: apply(module.init, key), jax.random.key(0))
    # Without weights all that is left of a step is exp(0).
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)
    angles, _ = jax.jit(lambda zeros: apply(module.apply, zeros))(zeros)
    turned = np.float64(angles - angles[:, :1])
    expected = np.arange(5)[:, None, None] * frequencies
    assert np.abs(np.exp(1j * turned) - np.exp(1j * expected)).max() < 1e-6


def test_the_bank_is_mixed_by_the_formula():
    given = {
        "v": R.normal(size=(1, 3, 2, 4)),
        "vectors": R.normal(size=(1, 3, 5, 2, 4)),
        "gates": R.uniform(0, 2, (1, 3, 2, 6)),
    }
    weight = R.normal(size=given["v"].shape)

    def formula(given):
        y = given["v"] * given["gates"][..., :1]
        for i in range(5):
            y = y + given["gates"][..., i + 1, None] * given["vectors"][:, :, i]
        return (y * weight).sum()

    loss = lambda given: jnp.sum(mixed_values(**given) * weight)
    low = jax.tree.map(jnp.float32, given)
    value, gradient = jax.jit(jax.value_and_grad(loss))(low)
    assert value == pytest.approx(formula(given), rel=1e-5)
    check_gradients(formula, given, gradient)


def test_a_layer_with_shared_weights_equals_the_formula():
    """Softmax of another layer's queries and keys, own values, a map of the input; the bank."""
    config = dataclasses.replace(SHARED, gate_position="none")
    module = GatedAttention(config, 1e-6, 0.3, jnp.float32)
    given = {
        "x": R.normal(size=(1, 9, 16)),
        "q": R.normal(size=(1, 9, 4, 8)),
        "k": R.normal(size=(1, 9, 2, 8)),
        "bank": R.normal(size=(1, 9, 2, 2, 8)),
    }

    def info(given):
        weights = SharedWeights(given["q"], given["k"])
        positions = jnp.arange(9)[None]
        return TokenInfo(positions, bank_values=given["bank"], weights=weights)

    low = jax.tree.map(jnp.float32, given)
    shapes = jax.eval_shape(module.init, jax.random.key(0), low["x"], info(low))["params"]
    assert set(shapes) == {"value", "value_bank", "out", "compensation"}, "no queries, no keys"
    given["params"] = jax.tree.map(lambda p: 0.3 * R.normal(size=p.shape), nn.meta.unbox(shapes))
    weight = R.normal(size=(1, 9, 16))

    def formula(given):
        p, x = given["params"], given["x"]
        v = np.tensordot(x, p["value"]["kernel"], 1)
        gates = 2 / (1 + np.exp(-np.tensordot(x, p["value_bank"]["gate"]["kernel"], 1)))
        v = gates[..., :1] * v + np.einsum("bths,btshd->bthd", gates[..., 1:], given["bank"])
        k, v = np.repeat(given["k"], 2, 2), np.repeat(v, 2, 2)
        logits = np.einsum("bthd,bshd->bhts", given["q"], k) / np.sqrt(8)
        i, j = np.arange(9)[:, None], np.arange(9)
        e = np.where((j <= i) & (j > i - 6), np.exp(logits), 0)
        o = np.einsum("bhts,bshd->bthd", e / e.sum(-1, keepdims=True), v)
        y = np.tensordot(o, p["out"]["kernel"], 2) + x @ p["compensation"]["kernel"]
        return (y * weight).sum()

    def loss(given):
        y, _ = module.apply(
            {"params": given["params"]}, given["x"], info(given), method="with_cache"
        )
        return jnp.sum(y * weight)

    value, gradient = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.float32, given))
    assert value == pytest.approx(formula(given), rel=1e-4)
    check_gradients(formula, given, gradient)


def test_compensation_starts_as_least_squares():
    x, w = R.normal(size=(40, 6)), R.normal(size=(6, 6))
    np.testing.assert_allclose(compensation_start(x, x @ w), w, atol=1e-9)
    noisy = x @ w + R.normal(size=(40, 6))
    left = noisy - x @ compensation_start(x, noisy)
    np.testing.assert_allclose(x.T @ left, 0, atol=1e-9)


@pytest.mark.parametrize(
    "model, ends",
    [(MODEL, (12, 13, 14)), slow(WITH_LINEAR, (6, 12, 13, 14))],
    ids=["attention", "linear too"],
)
def test_prefill_pieces_and_steps_equal_the_full_forward(model, ends):
    """Of packed rows; the keys are cached by one layer."""
    params = made(model)
    full, _ = hidden(model, params, TOKENS, DOCUMENTS)
    caches, pieces, first = init_caches(model, 2, 14), [], 0
    for last in ends:
        tokens, documents = TOKENS[:, first:last], DOCUMENTS[:, first:last]
        y, caches = hidden(model, params, tokens, documents, caches)
        pieces.append(y)
        first = last
    y = jnp.concatenate(pieces, 1)
    assert rel_rms(y * IS_TOKEN, full * IS_TOKEN) < 1e-5
    of_shared = caches.layers[f"layer_{len(model.pattern) - 1}"]
    assert isinstance(of_shared, ValueCache) and of_shared.v.shape[-3] == 6


@pytest.mark.slow
def test_packed_documents_equal_rows_of_their_own():
    params = made(WITH_LINEAR)
    full, _ = hidden(WITH_LINEAR, params, TOKENS, DOCUMENTS)
    moved = jnp.roll(TOKENS, -5, axis=1)
    ids = jnp.tile(jnp.arange(14) < 9, (2, 1)).astype(jnp.int32)
    alone, _ = hidden(WITH_LINEAR, params, moved, ids)
    assert rel_rms(alone[0, :9], full[0, 5:]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(tensor=2, fsdp=2, data=2), dict(context=2, tensor=2, data=2)]
)
def test_on_a_mesh_values_and_gradients_are_the_same(mesh):
    params = made(WITH_LINEAR)

    @jax.jit
    def step(params):
        def loss(p):
            with nn.logical_axis_rules(RULES):
                y, _, _ = LanguageModel(WITH_LINEAR).apply(
                    {"params": p}, TOKENS, segment_ids=DOCUMENTS
                )
            return jnp.sum(jnp.sin(y) * IS_TOKEN), y * IS_TOKEN

        return jax.grad(loss, has_aux=True)(params)

    gradient, y = step(params)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        gradient_cut, y_cut = step(params)
    assert rel_rms(y_cut, y) < 1e-5
    errors = jax.tree.map(rel_rms, gradient_cut, gradient)
    assert max(jax.tree.leaves(errors)) < 2e-4, errors
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 0


def test_a_bank_that_starts_at_zero_changes_nothing():
    """Gates of 1 and vectors of 0: the model without a bank, to the bit."""
    plain = dataclasses.replace(
        MODEL,
        mixers={"own": dataclasses.replace(OWN, value_bank=0)},
        pattern=("own",),
        num_layers=1,
    )
    banked = dataclasses.replace(plain, mixers={"own": OWN})
    shapes = jax.eval_shape(LanguageModel(banked).init, jax.random.key(0), TOKENS)["params"]
    assert shapes["value_bank"].shape == (32, 2 * 2 * 8)
    more = forward_flops_per_token(banked, 8) - forward_flops_per_token(plain, 8)
    assert more == 2 * 16 * 2 * 3  # multiply-adds, width, key heads, gates
    v = jnp.asarray(R.normal(size=(1, 3, 2, 8)), jnp.float32)
    same = mixed_values(v, jnp.zeros((1, 3, 2, 2, 8)), jnp.ones((1, 3, 2, 3)))
    np.testing.assert_array_equal(same, v)


def with_mixers(**changes):
    return dict(mixers=FrozenDict({**MODEL.mixers, **changes}))


@pytest.mark.parametrize(
    "values, message",
    [
        (
            dict(pattern=("shared", "own")),
            "mixers.shared.shares_weights: got True, expected a layer before it with weights of",
        ),
        (
            with_mixers(shared=dataclasses.replace(SHARED, window=5)),
            "mixers.shared.window: got 5, expected 6, as the layer that it shares",
        ),
        (
            with_mixers(shared=dataclasses.replace(SHARED, value_bank=3)),
            "mixers: got [(2, 2, 8), (3, 2, 8)], expected one bank",
        ),
        (dict(width=18), "mixers.own.num_heads: got 4, expected a divisor of the width 18"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(values, message):
    with pytest.raises(InputError) as error:
        dataclasses.replace(MODEL, **values)
    assert message in str(error.value) and "\n" not in str(error.value)
