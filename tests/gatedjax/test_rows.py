"""Rows of unequal lengths, prompts in pieces, documents in caches: each equals itself alone.

The oracle is the model without caches on a row that holds nothing else. Tokens after a document
cannot change it, so one program gives all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from random_parameters import random_parameters

from gatedjax.config import (
    AssociativeMemoryConfig,
    DeltaAttentionConfig,
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    GatedUnitConfig,
    KalmaNetConfig,
    LoRAMixtureConfig,
    Mamba2Config,
    MLAConfig,
    ModelConfig,
    RWKV6ChannelMixConfig,
    RWKV6Config,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.evaluation.sampling import generate
from gatedjax.layers.token_info import document_numbers
from gatedjax.model import LanguageModel, head_weights, init_caches, logits

ATTENTION = GatedAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
GLA = GatedLinearAttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    key_dim=8,
    value_dim=4,
    conv_width=4,
    decay_rank=4,
    chunk_size=16,
)
DELTA = DeltaAttentionConfig(num_heads=2, num_key_heads=1, key_dim=8, value_dim=4, chunk_size=16)
change = dataclasses.replace
MIXERS = {
    "attention": ATTENTION,
    "window": change(ATTENTION, window=5),
    "alibi with sinks": change(ATTENTION, rope_fraction=0.0, alibi="fixed", sinks=True),
    "log length": change(ATTENTION, query_scale="log_length"),
    "sigmoid": change(ATTENTION, normalizer="sigmoid", normalizer_length=20),
    "mla": MLAConfig(num_heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=8, window=9),
    "sinks of tokens": change(ATTENTION, token_sinks=True, rope_layout="interleaved"),
    "gla": GLA,
    "retnet": change(GLA, decay="constant", rope_fraction=1.0, conv_width=0),
    "normalized": change(
        GLA,
        decay="none",
        feature_map="elu_plus_one",
        normalize=True,
        output_gate="none",
    ),
    "cosformer": change(
        GLA,
        decay="none",
        feature_map="cosformer",
        feature_length=64,
        normalize=True,
    ),
    "random features": change(
        GLA,
        decay="scalar",
        feature_map="favor+",
        num_features=6,
        normalize=True,
    ),
    # Of a small condition, so that sums in another order are not far apart.
    "kalmanet": KalmaNetConfig(num_heads=2, key_dim=4, value_dim=8, ridge=0.2, chunk_size=8),
    "delta": DELTA,
    "delta by channels": change(DELTA, decay="vector", erase_and_write="channels"),
    "delta product": change(DELTA, num_householder=2),
    "comba": change(DELTA, state_feedback=True, output_feedback=1.0),
    "mamba's decay": change(GLA, decay="scalar", decay_form="softplus", num_kv_heads=2),
    "mamba2": Mamba2Config(num_heads=2, head_dim=8, state_dim=4, chunk_size=16),
    "rwkv6": RWKV6Config(
        num_heads=2,
        key_dim=4,
        value_dim=8,
        shift_rank=4,
        decay_rank=4,
        chunk_size=16,
    ),
    "rwkv7": RWKV7Config(
        num_heads=2,
        head_dim=8,
        decay_rank=4,
        rate_rank=4,
        value_rank=4,
        output_gate_rank=4,
        chunk_size=16,
    ),
    "gated unit": GatedUnitConfig(hidden=8, key_dim=8, chunk=4),
    "associative memory": AssociativeMemoryConfig(width=16, slots=4),
}
FFNS = {
    "rwkv6": RWKV6ChannelMixConfig(hidden=16),
    "rwkv7": RWKV7ChannelMixConfig(hidden=16),
}
# Every path of a cache in one model; the mixers one by one in `make test-all`.
PATTERNS = {
    "mixed": ("gla", "window", "log length", "retnet", "delta"),
    **{name: (name,) for name in MIXERS},
}
NAMES = [slow("mixed"), *(n if n == "attention" else slow(n) for n in MIXERS)]
B, T = 3, 20
TOKENS = np.random.default_rng(0).integers(0, 32, (B, T)).astype(np.int32)
# What padding holds: ids of every kind of wrong.
JUNK = np.resize(np.array([99, -1, 0, 31, -(2**31), 2**31 - 1], np.int32), (B, T))


def config_of(pattern, **changes):
    config = ModelConfig(
        vocab_size=32,
        width=16,
        num_layers=len(PATTERNS[pattern]),
        mixers=FrozenDict({name: MIXERS[name] for name in PATTERNS[pattern]}),
        pattern=PATTERNS[pattern],
        ffns=FrozenDict(mlp=FFNS.get(pattern, GatedMLPConfig(hidden=16))),
        ffn_pattern=("mlp",),
        init_std=0.3,
        dtype="float32",
    )
    return change(config, **changes)


@functools.cache
def model_of(config):
    """The jitted model, and its hidden states of each row of TOKENS."""
    model = LanguageModel(config)
    params = {"params": random_parameters(model, TOKENS)}
    run = jax.jit(lambda tokens, ids, caches: model.apply(params, tokens, None, ids, caches)[:2])
    whole, _ = run(TOKENS, None, None)
    return run, np.asarray(whole)


def piece(lengths, starts, width, side):
    """Tokens starts .. starts + lengths of each row, padded to `width`, and their ids."""
    tokens, ids = JUNK[:, :width].copy(), np.zeros((B, width), np.int32)
    for row, (length, start) in enumerate(zip(lengths, starts)):
        first = width - length if side == "left" else 0
        place = slice(first, first + length)
        tokens[row, place] = TOKENS[row, start : start + length]
        ids[row, place] = 1
    return tokens, ids


@pytest.mark.parametrize("sides", [("left", "right"), ("right", "left")])
@pytest.mark.parametrize("name", NAMES)
def test_unequal_prompts_in_pieces_equal_each_alone(name, sides):
    """Two pieces, padded on different sides, one of them empty for a row; then token by token."""
    config = config_of(name)
    run, whole = model_of(config)
    caches = init_caches(config, B, T)
    seen = np.zeros(B, int)
    for lengths, side in (((3, 9, 6), sides[0]), ((7, 0, 4), sides[1])):
        tokens, ids = piece(lengths, seen, 9, side)
        hidden, caches = run(tokens, ids, caches)
        for row, length in enumerate(lengths):
            expected = whole[row, seen[row] : seen[row] + length]
            assert rel_rms(hidden[row][ids[row] == 1], expected) < 1e-5
        seen += lengths
    for _ in range(8):
        rows = np.arange(B)
        hidden, caches = run(TOKENS[rows, seen][:, None], None, caches)
        assert rel_rms(hidden[:, 0], whole[rows, seen]) < 1e-5
        seen += 1
    np.testing.assert_array_equal(caches.history.tokens, seen)
    np.testing.assert_array_equal(caches.history.next_position, seen)


@pytest.mark.parametrize("name", NAMES)
def test_documents_in_caches_equal_each_alone(name):
    """Documents begin anywhere in a piece; an id that comes back is another document."""
    config = config_of(name)
    run, whole = model_of(config)
    caches = init_caches(config, B, 2 * T)
    # By row: segment ids of three pieces; what is not 0 counts through the documents.
    pieces = np.array(
        [
            [[1, 1, 1, 2, 2, 2, 2, 2, 2], [2, 2, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
            [[0, 5, 5, 0, 5, 5, 5, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 5, 5, 5, 5, 3, 5, 0]],
            [[7, 7, 7, 7, 7, 7, 7, 7, 0], [4, 4, 4, 4, 4, 4, 4, 4, 4], [0, 4, 4, 4, 4, 0, 0, 4, 4]],
        ]
    ).swapaxes(0, 1)
    last, place = np.zeros(B, int), np.zeros(B, int)
    for ids in pieces:
        tokens, expected = JUNK[:, :9].copy(), np.full((B, 9, 16), np.nan)
        for row in range(B):
            previous = last[row]
            for t, number in enumerate(ids[row]):
                if number:
                    place[row] = place[row] + 1 if number == previous else 0
                    tokens[row, t] = TOKENS[row, place[row]]
                    expected[row, t] = whole[row, place[row]]
                    last[row] = number
                # Padding ends a document inside of a piece, not at its edges.
                is_inside = ids[row, :t].any()
                previous = number if number or is_inside else previous
        hidden, caches = run(tokens, ids.astype(np.int32), caches)
        is_token = ids != 0
        assert rel_rms(np.asarray(hidden)[is_token], expected[is_token]) < 1e-5
        np.testing.assert_array_equal(caches.history.in_document, place + 1)
    # The last documents go on, token by token.
    rows = np.arange(B)
    hidden, caches = run(TOKENS[rows, place + 1][:, None], None, caches)
    assert rel_rms(hidden[:, 0], whole[rows, place + 1]) < 1e-5
    # A row that has ended gets padding; another one begins a document.
    ids = np.array([[0], [9], [4]], np.int32)
    tokens = np.array([-1, TOKENS[1, 0], TOKENS[2, place[2] + 2]], np.int32)[:, None]
    before = caches
    hidden, caches = run(tokens, ids, caches)
    assert rel_rms(hidden[1:, 0], [whole[1, 0], whole[2, place[2] + 2]]) < 1e-5
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(caches.layers)):
        np.testing.assert_array_equal(old[:, 0], new[:, 0])
    assert int(caches.history.tokens[0]) == int(before.history.tokens[0])


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_need_no_positions(name):
    """Without caches: positions start over in each document, ids come back, padding anywhere."""
    run, whole = model_of(config_of(name))
    ids = np.array([[1] * 9 + [2] * 6 + [1] * 5, [0, 0, 3, 3, 3, 0, 3, 3] + [1] * 12, [-2] * 20])
    tokens, expected = JUNK.copy(), np.zeros((B, T, 16))
    for row in range(B):
        starts = np.flatnonzero(np.diff(ids[row], prepend=0))
        for t in np.flatnonzero(ids[row]):
            place = t - starts[starts <= t].max()
            tokens[row, t] = TOKENS[row, place]
            expected[row, t] = whole[row, place]
    hidden, _ = run(tokens, ids.astype(np.int32), None)
    assert rel_rms(np.asarray(hidden)[ids != 0], expected[ids != 0]) < 1e-5
    assert np.isfinite(hidden).all()


def test_documents_are_runs():
    ids = jnp.asarray([[3, 3, 0, 3, 1, 1, 3, 0], [0, 0, -1, -1, 2, 2, -1, -1]])
    expected = [[1, 1, 0, 2, 3, 3, 4, 0], [0, 0, 1, 1, 2, 2, 3, 3]]
    np.testing.assert_array_equal(document_numbers(ids), expected)


@pytest.mark.slow
def test_a_first_pass_has_rows_of_its_own():
    """X-LoRA runs the model twice: both passes keep every row at its place."""
    mixture = LoRAMixtureConfig(
        hidden=16,
        num_experts=2,
        rank=2,
        first_pass=True,
    )
    config = config_of("mixed", ffns=FrozenDict(mlp=mixture))
    run, whole = model_of(config)
    caches = init_caches(config, B, T)
    lengths = (3, 9, 6)
    tokens, ids = piece(lengths, (0, 0, 0), 9, "left")
    hidden, caches = run(tokens, ids, caches)
    rows, next_place = np.arange(B), np.array(lengths)
    assert rel_rms(hidden[:, -1], whole[rows, next_place - 1]) < 1e-5
    hidden, caches = run(TOKENS[rows, next_place][:, None], None, caches)
    assert rel_rms(hidden[:, 0], whole[rows, next_place]) < 1e-5


def test_caches_without_room_are_refused():
    """In one line where the number of tokens is known; in a compiled program with NaN."""
    config = config_of("attention")
    model = LanguageModel(config)
    run, whole = model_of(config)
    variables = {"params": random_parameters(model, TOKENS)}
    with pytest.raises(ValueError, match=r"caches: got room for 8 tokens a row, expected .* 9"):
        model.apply(variables, TOKENS[:, :9], caches=init_caches(config, B, 8))
    with pytest.raises(ValueError, match=r"cache: got room for 8 tokens, expected at least 9"):
        run(TOKENS[:, :9], None, init_caches(config, B, 8))
    # Rows of 2, 8 and 5 tokens fit, however wide their padding is.
    tokens, ids = piece((2, 8, 5), (0, 0, 0), 9, "left")
    hidden, caches = run(tokens, ids, init_caches(config, B, 8))
    assert np.isfinite(hidden).all()
    rows, place = np.arange(B), np.array([2, 8, 5])
    with pytest.raises(ValueError, match=r"caches: got room for 8 tokens a row, expected .* 9"):
        model.apply(variables, TOKENS[rows, place][:, None], caches=caches)
    hidden, caches = run(TOKENS[rows, place][:, None], None, caches)
    assert rel_rms(hidden[[0, 2], 0], whole[[0, 2], [2, 5]]) < 1e-5
    assert np.isnan(hidden[1]).all(), "not the ring that the slots could be"


def test_a_window_is_a_ring():
    """Its slots are enough for any length."""
    config = config_of("window")
    run, whole = model_of(config)
    caches = init_caches(config, B, 6)
    assert caches.layers["layer_0"].k.shape[2] == 5
    hidden, caches = run(TOKENS[:, :9], None, caches)
    assert rel_rms(hidden, whole[:, :9]) < 1e-5
    hidden, caches = run(TOKENS[:, 9:18], None, caches)
    assert rel_rms(hidden, whole[:, 9:18]) < 1e-5
    hidden, caches = run(TOKENS[:, 18:19], None, caches)
    assert rel_rms(hidden[:, 0], whole[:, 18]) < 1e-5


@pytest.mark.slow
def test_a_cache_shorter_than_its_window_is_no_ring():
    config = config_of("window")
    run, _ = model_of(config)
    _, caches = run(TOKENS[:, :4], None, init_caches(config, B, 4))
    hidden, _ = run(TOKENS[:, 4:5], None, caches)
    assert np.isnan(hidden).all()


def test_unwritten_slots_hold_nothing():
    """Memory that was never written, NaN here, is selected away from a further piece."""
    config = config_of("attention")
    run, whole = model_of(config)
    empty = init_caches(config, B, T)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), empty.layers)
    hidden, caches = run(TOKENS[:, :9], None, empty.replace(layers=bad))
    assert rel_rms(hidden, whole[:, :9]) < 1e-5
    hidden, caches = run(TOKENS[:, 9:18], None, caches)
    assert rel_rms(hidden, whole[:, 9:18]) < 1e-5


def test_tokens_outside_the_vocabulary_are_not_silent():
    """Padding may hold anything; a token may not: no row of the table is taken in its place."""
    run, _ = model_of(config_of("attention"))
    for bad in (-1, 32):
        tokens = TOKENS.copy()
        tokens[0, 5] = bad
        hidden, _ = run(tokens, None, None)
        assert np.isnan(hidden[0, 5:]).all() and np.isfinite(hidden[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_decoding_loop_says_what_whole_rows_say(pattern):
    """Greedy tokens, several in a call, of a model of two periods."""
    # A head of its own: with a tied one every token would follow itself.
    layers = 2 * len(PATTERNS[pattern])
    config = config_of(pattern, num_layers=layers, tie_embeddings=False)
    params = random_parameters(LanguageModel(config), TOKENS)
    steps = generate(config, params, TOKENS[:, :5], 12, vocab_size=32, temperature=0.0)
    given = np.stack(list(steps), axis=1)
    text = np.concatenate([TOKENS[:, :5], given], axis=1)
    hidden, _, _ = jax.jit(LanguageModel(config).apply)({"params": params}, text)
    best = np.argmax(logits(hidden, head_weights(params)), axis=-1)
    assert given.tolist() == best[:, 4:-1].tolist()
    assert len(np.unique(given)) > 3
