"""SambaY: the gated memory unit and attention on another layer's keys in float64 numpy, and models
made of both, against their layers one by one, in pieces, packed, on a mesh.
"""

import dataclasses
import functools

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
    GatedMemoryConfig,
    GatedMLPConfig,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    NoFeedForwardConfig,
)
from gatedjax.errors import InputError
from gatedjax.evaluation import decoding
from gatedjax.evaluation.cache_bytes import cache_bytes
from gatedjax.evaluation.sampling import generate
from gatedjax.layers import GatedAttention, GatedMemory
from gatedjax.layers.block import block_layers, stream_norm
from gatedjax.layers.last_token import info_of_last, last_places
from gatedjax.layers.shared_weights import SharedWeights
from gatedjax.layers.token_info import TokenInfo, arranged, default_info, empty_history
from gatedjax.model import LanguageModel, init_caches, logits
from gatedjax.sharding import RULES, make_mesh
from gatedjax.training.flops import forward_flops_per_token

R = np.random.default_rng(0)
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=8)
FULL = GatedAttentionConfig(**HEADS, rope_fraction=0.5, gate_position="none")
WINDOW = dataclasses.replace(FULL, window=4)
CROSS = dataclasses.replace(FULL, shares_cache=True, gate_position="sdpa")
MAMBA = Mamba2Config(num_heads=4, head_dim=6, state_dim=5, chunk_size=4)
MEMORY = GatedMemoryConfig(num_heads=4, head_dim=6, num_groups=2)
MODEL = ModelConfig(
    vocab_size=32,
    width=16,
    num_layers=6,
    mixers=FrozenDict(mamba=MAMBA, window=WINDOW, full=FULL, gmu=MEMORY, cross=CROSS),
    prefix=("mamba", "full"),
    ffn_prefix=("none",) * 2,
    pattern=("gmu", "cross"),
    ffns=FrozenDict(none=NoFeedForwardConfig(), mlp=GatedMLPConfig(hidden=16)),
    ffn_pattern=("none",),
    init_std=0.3,
    dtype="float32",
)
# The self-decoder repeats, the cross-decoder does not: of 8 layers as published.
PUBLISHED = dataclasses.replace(
    MODEL,
    num_layers=8,
    prefix=(),
    ffn_prefix=(),
    pattern=("mamba", "window"),
    ffn_pattern=("mlp",),
    suffix=("mamba", "full", "gmu", "cross"),
    ffn_suffix=("mlp",) * 4,
)
# The cross-decoder begins before the pattern.
EARLIER = dataclasses.replace(
    MODEL, num_layers=5, prefix=("mamba", "full", "gmu"), ffn_prefix=("none",) * 3
)
TOKENS = jnp.asarray(R.integers(0, 32, (2, 14)), jnp.int32)
DOCUMENTS = jnp.asarray([[1] * 5 + [2] * 9, [7] * 3 + [9] * 8 + [0] * 3], jnp.int32)
IS_TOKEN = (DOCUMENTS > 0)[..., None]


@functools.cache
def made(model):
    return random_parameters(LanguageModel(model), TOKENS)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("norm", [True, False])
def test_the_unit_is_its_formula(norm):
    """norm(M silu(x W_1)) W_2: values and all gradients, the memory's too."""
    config = dataclasses.replace(MEMORY, norm=norm)
    module = GatedMemory(config, 1e-5, 0.4, jnp.float32)
    x = jnp.asarray(R.normal(size=(2, 3, 5)), jnp.float32)
    memory = jnp.asarray(R.normal(size=(2, 3, 4, 6)), jnp.float32)
    positions = jnp.zeros((2, 3), jnp.int32)
    given = {"x": x, "memory": memory}
    given["params"] = random_parameters(module, x, TokenInfo(positions, memory=memory))
    weight = R.normal(size=x.shape)

    def loss(given):
        info = TokenInfo(positions, memory=given["memory"])
        return jnp.sum(module.apply({"params": given["params"]}, given["x"], info) * weight)

    def formula(given):
        p = given["params"]
        o = given["memory"] * silu(np.tensordot(given["x"], p["gate"]["kernel"], 1))
        if norm:
            groups = o.reshape(2, 3, 2, -1)
            groups = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-5)
            o = groups.reshape(o.shape) * p["norm_scale"]
        return (np.tensordot(o, p["out"]["kernel"], 2) * weight).sum()

    value, gradient = jax.value_and_grad(loss)(given)
    given = jax.tree.map(np.float64, given)
    assert value == pytest.approx(formula(given), rel=1e-4)
    check_gradients(formula, given, gradient)


def test_queries_on_another_layers_keys_are_their_formula():
    """Gradients reach that layer's keys and values."""
    config = dataclasses.replace(CROSS, rope_fraction=0.0)
    module = GatedAttention(config, 1e-6, 0.4, jnp.float32)
    x = jnp.asarray(R.normal(size=(1, 5, 6)), jnp.float32)
    k, v = (jnp.asarray(R.normal(size=(1, 5, 2, 8)), jnp.float32) for _ in range(2))
    given = {"x": x, "k": k, "v": v}
    info = dataclasses.replace(default_info(x), keys=SharedWeights(k, k, v=v))
    given["params"] = random_parameters(module, x, info)
    assert set(given["params"]) == {"query", "query_norm", "gate", "out"}
    weight = R.normal(size=x.shape)

    def loss(given):
        keys = SharedWeights(given["k"], given["k"], v=given["v"])
        info = dataclasses.replace(default_info(x), keys=keys)
        return jnp.sum(module.apply({"params": given["params"]}, given["x"], info) * weight)

    def formula(given):
        p = given["params"]
        q = np.tensordot(given["x"], p["query"]["kernel"], 1)
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * p["query_norm"]["scale"]
        k, v = (np.repeat(given[name], 2, axis=2) for name in "kv")
        products = np.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
        weights = np.tril(np.exp(products))
        weights = weights / weights.sum(-1, keepdims=True)
        o = np.einsum("bhij,bjhd->bihd", weights, v)
        (gate,) = jax.tree.leaves(p["gate"])
        o = o / (1 + np.exp(-np.tensordot(given["x"], gate, 1)))
        return (np.tensordot(o, p["out"]["kernel"], 2) * weight).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(given)
    given = jax.tree.map(np.float64, given)
    assert value == pytest.approx(formula(given), rel=1e-4)
    check_gradients(formula, given, gradient)


@pytest.mark.parametrize(
    "model, ends",
    [
        (MODEL, tuple(range(1, 15))),
        slow(MODEL, (6, 12, 13, 14)),
        slow(PUBLISHED, (8, 12, 13, 14)),
    ],
    ids=["steps", "pieces", "published"],
)
def test_prefill_pieces_and_steps_equal_the_full_forward(model, ends):
    """Of packed rows. Units and layers on another one's keys have no cache."""
    params = made(model)
    full, _ = hidden(model, params, TOKENS, DOCUMENTS)
    caches, pieces, first = init_caches(model, 2, 14), [], 0
    if ends[0] == 1:
        # One program for all tokens, the first one too.
        history = dataclasses.replace(caches.history, is_empty=False)
        caches = dataclasses.replace(caches, history=history)
    for last in ends:
        tokens, documents = TOKENS[:, first:last], DOCUMENTS[:, first:last]
        y, caches = hidden(model, params, tokens, documents, caches)
        pieces.append(y)
        first = last
    assert rel_rms(jnp.concatenate(pieces, 1) * IS_TOKEN, full * IS_TOKEN) < 1e-5
    for block in model.blocks:
        is_without = isinstance(block.mixer, GatedMemoryConfig) or block.mixer == CROSS
        assert bool(jax.tree.leaves(caches.layers[block.name])) != is_without, block.name


@functools.partial(jax.jit, static_argnums=(0, 3))
def of_prompt(model, params, caches, last_alone, documents):
    y, caches, _ = LanguageModel(model, last_alone=last_alone).apply(
        {"params": params}, TOKENS[:, : documents.shape[1]], segment_ids=documents, caches=caches
    )
    return y, caches


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [MODEL, PUBLISHED, EARLIER, dataclasses.replace(MODEL, pattern=("window",), num_layers=3)],
    ids=["short", "published", "earlier", "none"],
)
def test_the_second_decoder_sees_the_last_token_alone(model):
    """Of packed rows, with padding on both sides, and in a second piece: as in full prefill."""
    params = made(model)
    documents = jnp.asarray([[0, 1, 1, 1, 2, 2, 2], [7, 7, 7, 7, 9, 0, 0]], jnp.int32)
    pieces = (documents, jnp.asarray([[2, 2, 3, 3, 3, 0, 0], [0] * 7], jnp.int32))
    lasts = ((6, 4), (4, 0))
    full = one = init_caches(model, 2, 14)
    for documents, last in zip(pieces, lasts, strict=True):
        expected, full = of_prompt(model, params, full, False, documents)
        found, one = of_prompt(model, params, one, True, documents)
        assert found.shape == (2, 1, 16)
        # A row of padding has no last token.
        for row in np.flatnonzero(np.asarray(documents).any(axis=1)):
            assert rel_rms(found[row, 0], expected[row, last[row]]) < 1e-5, (row, last)
        jax.tree.map(np.testing.assert_array_equal, one, full)


def test_the_last_token_is_told_what_it_is_told_in_decoding():
    """As if all tokens of the call but each row's last one had come before."""
    ids = jnp.asarray([[0, 1, 1, 2, 2, 2], [3, 4, 4, 4, 0, 0], [0] * 6], jnp.int32)
    last = jnp.asarray([[5], [3], [0]])
    before = dataclasses.replace(
        empty_history(3),
        tokens=jnp.asarray([2, 3, 3]),
        in_document=jnp.asarray([2, 1, 3]),
        next_position=jnp.asarray([2, 1, 3]),
        segment_id=jnp.asarray([1, 3, 5]),
    )
    tokens = TOKENS[:1, :6] + jnp.arange(3)[:, None]
    info, after, _ = arranged(tokens, None, ids, before)
    found = info_of_last(info, after, last_places(info, 6))
    but_last = arranged(tokens, None, ids.at[jnp.arange(3), last[:, 0]].set(0), before).after
    one = (jnp.take_along_axis(x, last, axis=1) for x in (tokens, ids))
    expected = arranged(next(one), None, next(one), but_last)
    for name in ("positions", "segment_ids"):
        of_tokens = getattr(found, name)[:2], getattr(expected.info, name)[:2]
        np.testing.assert_array_equal(*of_tokens, err_msg=name)
    np.testing.assert_array_equal(found.tokens[:2], expected.info.tokens[:2])
    assert found.segment_ids[2, 0] == 0
    for name in ("tokens", "in_document", "next_position"):
        of_rows = getattr(found.before, name), getattr(expected.info.before, name)
        np.testing.assert_array_equal(*of_rows, err_msg=name)


def test_where_a_second_decoder_begins():
    """Where every layer from there on holds nothing, of the model and of its period."""
    assert MODEL.cross_decoder == "layer_0" and PUBLISHED.cross_decoder == "suffix_2"
    replace = dataclasses.replace
    assert EARLIER.cross_decoder == "prefix_2"
    for kept in (
        replace(MODEL, suffix=("window",), ffn_suffix=("none",), num_layers=7),
        replace(PUBLISHED, pattern=("mamba", "full", "cross", "gmu"), suffix=(), ffn_suffix=()),
        replace(MODEL, pattern=("window",), num_layers=4),
    ):
        assert kept.cross_decoder is None
    with pytest.raises(ValueError, match="caches: got None, expected those of a prompt"):
        jax.eval_shape(LanguageModel(MODEL, last_alone=True).init, jax.random.key(0), TOKENS)


def test_periods_without_caches_are_taken_apart():
    """Decoding gives every layer a cache of its own: here some have none."""
    layers = init_caches(MODEL, 2, 14).layers
    assert not jax.tree.leaves((layers["layer_0"], layers["layer_1"]))
    split = decoding._split(("layer_0", "layer_1"), 2, layers)
    assert split["periods"] == [{"layer_0": (), "layer_1": ()}] * 2
    assert decoding._joined(split).keys() == layers.keys()


@pytest.mark.slow
def test_sampling_is_the_likeliest_token_of_the_full_forward():
    params = made(MODEL)
    tokens = TOKENS[:1, :6]
    for token in generate(MODEL, params, tokens, 4, vocab_size=32, temperature=0.0):
        y, _ = hidden(MODEL, params, tokens)
        expected = jnp.argmax(logits(y[:, -1], params["embedding"]), axis=-1)
        np.testing.assert_array_equal(token, expected)
        tokens = jnp.concatenate([tokens, expected[:, None]], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, PUBLISHED], ids=["short", "published"])
def test_a_model_is_its_layers_one_by_one(model):
    """What is handed on comes from the last layer before that has it. Gradients too."""
    params = made(model)
    weight = R.normal(size=(2, 14, 16))

    def by_hand(params):
        x = params["embedding"][TOKENS]
        info, memory, keys = default_info(x), None, None
        for layer in range(model.num_layers):
            block = next(b for b in model.blocks if layer in b.layers)
            p = params["periods"][block.name] if block.is_repeated else params[block.name]
            if block.is_repeated:
                at = block.layers.index(layer)
                p = jax.tree.map(lambda leaf, at=at: leaf[at], p)
            norm = lambda name, y, p=p: stream_norm(model, None).apply({"params": p[name]}, y)
            mixer, feed_forward = block_layers(model, block)
            variables = {"params": p["mixer"]}
            told = dataclasses.replace(info, memory=memory, keys=keys)
            before = norm("mixer_norm", x)
            if model.layer(layer)[0] == MAMBA:
                y, _, memory = mixer.apply(variables, before, told, None, method="with_memory")
            elif model.layer(layer)[0] == FULL:
                y, _, keys = mixer.apply(variables, before, told, None, method="with_weights")
            else:
                y = mixer.apply(variables, before, told)
            x = x + y
            if "ffn" in p:
                x = x + feed_forward.apply({"params": p["ffn"]}, norm("ffn_norm", x))
        return stream_norm(model, None).apply({"params": params["final_norm"]}, x)

    def loss(run):
        return lambda p: jnp.sum(run(p) * weight)

    whole = loss(lambda p: hidden(model, p, TOKENS)[0])
    value, gradient = jax.value_and_grad(whole)(params)
    value_by_hand, gradient_by_hand = jax.jit(jax.value_and_grad(loss(by_hand)))(params)
    assert value == pytest.approx(float(value_by_hand), rel=1e-5)
    errors = jax.tree.map(rel_rms, gradient, gradient_by_hand)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 0


@pytest.mark.slow
def test_packed_documents_equal_rows_of_their_own():
    params = made(MODEL)
    full, _ = hidden(MODEL, params, TOKENS, DOCUMENTS)
    moved = jnp.roll(TOKENS, -5, axis=1)
    ids = jnp.tile(jnp.arange(14) < 9, (2, 1)).astype(jnp.int32)
    alone, _ = hidden(MODEL, params, moved, ids)
    assert rel_rms(alone[0, :9], full[0, 5:]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(tensor=2, fsdp=2, data=2), dict(context=2, tensor=2, data=2)]
)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_on_a_mesh_values_and_gradients_are_the_same(mesh, remat):
    params = made(MODEL)
    model = dataclasses.replace(MODEL, remat=remat)

    def loss(p, model):
        with nn.logical_axis_rules(RULES):
            y, _, _ = LanguageModel(model).apply({"params": p}, TOKENS, segment_ids=DOCUMENTS)
        return jnp.sum(jnp.sin(y) * IS_TOKEN), y * IS_TOKEN

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradient, y = step(params, MODEL)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        gradient_cut, y_cut = step(params, model)
    assert rel_rms(y_cut, y) < 1e-5
    errors = jax.tree.map(rel_rms, gradient_cut, gradient)
    assert max(jax.tree.leaves(errors)) < 2e-4, errors


def test_bytes_and_flops_are_counted():
    """Of 8 layers: one full cache for two layers that read it; the unit reads nothing."""
    found = cache_bytes(PUBLISHED, rows=3, tokens=100)
    key_bytes = 3 * 2 * 2 * 8 * 4
    state = 3 * 4 * (4 * 5 * 6 + 3 * (4 * 6 + 2 * 5))
    assert found.held == 3 * state + key_bytes * (2 * 4 + 100)
    assert found.with_own_keys == found.held + 100 * key_bytes
    assert found.read == 3 * state + key_bytes * (2 * 4 + 2 * 100)
    assert found.read_with_attention == found.read - 0 + 100 * key_bytes
    own = dataclasses.replace(CROSS, shares_cache=False)
    with_keys = dataclasses.replace(MODEL, mixers={**MODEL.mixers, "cross": own})
    more = forward_flops_per_token(with_keys, 8) - forward_flops_per_token(MODEL, 8)
    assert more == 2 * (2 * 16 * 2 * 2 * 8)  # layers, multiply-adds, width, keys and values


BAD = {
    "mixers.gmu: got 'no layer before it to take from', expected a scan": dict(
        num_layers=2, prefix=(), ffn_prefix=()
    ),
    "mixers.cross.shares_cache: got 'no layer before it": dict(prefix=("mamba", "mamba")),
    "mixers.gmu: got 'one in the pattern', expected a scan (mamba2": dict(
        prefix=(),
        ffn_prefix=(),
        pattern=("mamba",),
        suffix=("gmu",),
        ffn_suffix=("mlp",),
    ),
    "mixers.gmu: got 'one after it in the pattern'": dict(
        num_layers=8, pattern=("gmu", "cross", "mamba")
    ),
    "mixers.gmu.num_heads and head_dim: got (2, 6), expected (4, 6), as mixers.mamba": dict(
        mixers={**MODEL.mixers, "gmu": GatedMemoryConfig(num_heads=2, head_dim=6)}
    ),
    "mixers.cross.window: got 3, expected None, as in mixers.full": dict(
        mixers={**MODEL.mixers, "cross": dataclasses.replace(CROSS, window=3)}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_models_that_do_not_fit_together_are_refused(message):
    with pytest.raises(InputError) as error:
        dataclasses.replace(MODEL, **BAD[message])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_of_keys_are_refused():
    for name, value in dict(gate_position="key", value_bank=1, shares_weights=True).items():
        with pytest.raises(InputError, match=f"{name}: got {value!r}, expected another value"):
            dataclasses.replace(CROSS, **{name: value})
    x = jnp.zeros((1, 2, 5))
    with pytest.raises(InputError, match=r"info\.memory: got None, expected"):
        jax.eval_shape(GatedMemory(MEMORY).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"info\.keys: got None with shares_cache"):
        jax.eval_shape(GatedAttention(CROSS).init, jax.random.key(0), x)
