"""Filters by value, greedy decoding against the full forward pass, an evaluation's error bar."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import VOCAB, plain

from gatedjax.errors import InputError
from gatedjax.evaluation.sampling import filter_logits, generate, sample_token
from gatedjax.evaluation.validation import summarize
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.step import init_params

SCORES = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05]]))


def kept(scores) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(scores)[0])).tolist()


def test_filters_keep_the_likeliest():
    assert kept(filter_logits(SCORES, top_k=2, top_p=1.0)) == [0, 1]
    assert kept(filter_logits(SCORES, top_k=0, top_p=0.6)) == [0, 1], (
        "the token that crosses p stays"
    )
    assert kept(filter_logits(SCORES, top_k=0, top_p=1e-6)) == [0], "one token always stays"
    assert kept(filter_logits(SCORES, top_k=99, top_p=1.0)) == [0, 1, 2, 3, 4]


def test_temperature_shapes_the_frequencies():
    draw = jax.vmap(lambda key: sample_token(SCORES, key, 0.5, 0, 1.0)[0])
    frequencies = (
        np.bincount(draw(jax.random.split(jax.random.key(0), 20_000)), minlength=5) / 20_000
    )
    squared = np.exp(np.asarray(SCORES[0])) ** 2
    np.testing.assert_allclose(frequencies, squared / squared.sum(), atol=0.015)
    assert int(sample_token(SCORES, jax.random.key(0), 0.0, 0, 1.0)[0]) == 0


def test_greedy_decoding_equals_the_full_forward_pass():
    config = plain(model__init_std=0.3).model
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    prompt = jnp.arange(5)[None]
    sampled = [
        int(t[0]) for t in generate(config, params, prompt, 8, vocab_size=VOCAB, temperature=0.0)
    ]
    text = jnp.concatenate([prompt, jnp.array([sampled])], axis=1)
    hidden, _, _ = LanguageModel(config).apply({"params": params}, text)
    assert sampled == jnp.argmax(logits(hidden, head_weights(params)), -1)[0, 4:-1].tolist()


def test_padding_entries_of_the_vocabulary_are_never_sampled():
    config = plain().model
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    sampled = [
        int(t[0])
        for t in generate(config, params, jnp.zeros((1, 1), int), 30, vocab_size=3, temperature=5.0)
    ]
    assert set(sampled) == {0, 1, 2}


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        next(generate(plain().model, {}, jnp.zeros((1, 1), int), 1, vocab_size=3, **wrong))


def test_error_bar_is_that_of_repeated_samples():
    """Against the spread of the mean over many simulated evaluations."""
    rng = np.random.default_rng(0)
    results = []
    for _ in range(2000):
        counts = rng.integers(50, 100, 16).astype(float)
        results.append(summarize(counts * rng.normal(2.0, 0.3, 16), counts, tokens_per_byte=0.5))
    spread = np.std([r.loss for r in results])
    assert np.mean([r.loss_error for r in results]) == pytest.approx(spread, rel=0.1)
    assert results[0].bits_per_byte == pytest.approx(results[0].loss * 0.5 / math.log(2))
