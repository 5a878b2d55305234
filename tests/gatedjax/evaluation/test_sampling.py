"""Filters by value, greedy decoding against the full forward pass, an evaluation's error bar."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import VOCAB, plain

from gatedjax.errors import InputError
from gatedjax.evaluation import decoding, sampling
from gatedjax.evaluation.filters import filter_logits, sample_token
from gatedjax.evaluation.sampling import generate, next_steps
from gatedjax.evaluation.validation import summarize
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.state import init_params

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


def kept_by_numpy(scores, top_k, top_p):
    """The k first of a stable order, and of those the fewest whose mass reaches p; float64."""
    kept = np.zeros(scores.shape, bool)
    for row, of_row in enumerate(scores.astype(np.float64)):
        order = np.argsort(-of_row, kind="stable")[: top_k or None]
        p = np.exp(of_row[order] - of_row.max())
        reached = np.flatnonzero(np.cumsum(p) / p.sum() >= top_p)
        last = reached[0] if top_p < 1 else len(order) - 1
        kept[row, order[: last + 1]] = True
    return kept


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_filters_equal_numpy(decimals):
    """With many ties (few decimals) and none: exactly k, exactly the nucleus, lower ids first."""
    rng = np.random.default_rng(decimals)
    scores = np.round(2 * rng.normal(size=(4, 30)), decimals).astype(np.float32)
    scores[1, 20:] = -np.inf
    scores[2] = 1.5
    for top_k in (0, 1, 2, 7, 29, 30, 99):
        for top_p in (1e-60, 1e-3, 0.123, 0.5, 0.77, 0.999, 1.0):
            filtered = np.asarray(filter_logits(jnp.asarray(scores), top_k, top_p))
            expected = np.where(kept_by_numpy(scores, top_k, top_p), scores, -np.inf)
            np.testing.assert_array_equal(filtered, expected, err_msg=f"{top_k} {top_p}")


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e6, 1e38, 1e300])
def test_any_positive_temperature(temperature):
    """The limits are the most likely token, and any token of the vocabulary."""
    scores = jnp.array([[5.0, -2.0, 3e4, -jnp.inf, 7.0, 2.9e4]])
    draw = jax.vmap(lambda key: sample_token(scores, key, temperature, 0, 1.0)[0])
    tokens = set(np.asarray(draw(jax.random.split(jax.random.key(0), 200))).tolist())
    assert tokens == ({2} if temperature < 1 else {0, 1, 2, 4, 5})


@pytest.fixture
def forwards(monkeypatch):
    """The shapes of what the model is run on: prompts [B, T], and tokens after them [B, 1]."""
    shapes = []
    prefill, decode = sampling.forward, decoding.decode

    def counted(model, params, tokens, *args):
        shapes.append(tokens.shape)
        return prefill(model, params, tokens, *args)

    def counted_steps(*args):
        given = decode(*args)
        shapes.extend([(given.tokens.shape[1], 1)] * int(given.count))
        return given

    monkeypatch.setattr(sampling, "forward", counted)
    monkeypatch.setattr(decoding, "decode", counted_steps)
    return shapes


def test_nothing_runs_after_the_last_token(forwards):
    config = plain().model
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    for prompt_length in (1, 5, 16):
        prompt = np.zeros((1, prompt_length), int)
        assert len(list(generate(config, params, prompt, 3, vocab_size=VOCAB))) == 3
        assert forwards == [(1, 16), (1, 1), (1, 1)], "and one program for all these prompts"
        forwards.clear()
    assert list(generate(config, params, prompt, 0, vocab_size=VOCAB)) == []
    assert len(list(itertools.islice(generate(config, params, prompt, 9, vocab_size=VOCAB), 1)))
    assert forwards == [(1, 16)], "nor after the token where the reader stops"
    forwards.clear()
    # Every token is a stop: the first one, of the prompt's forward pass, is the last.
    every = dict(vocab_size=VOCAB, stop_ids=range(VOCAB))
    assert len(list(generate(config, params, prompt, 9, **every))) == 1
    assert forwards == [(1, 16)], "nor after a stop"
    forwards.clear()
    steps = generate(config, params, prompt, 9, vocab_size=VOCAB)
    next(steps), next(steps)
    steps.finish(0)
    assert list(steps) == [] and forwards == [(1, 16), (1, 1)], "nor for a row that is finished"


def test_the_reader_waits_for_a_tenth_of_a_second():
    """Tokens of 1 ms and of 1 s: the most that fit, one at least, and no more than a call gives."""
    for seconds, settled in ((1e-3, 64), (4e-3, 16), (0.03, 2), (1.0, 1)):
        steps = 1
        for _ in range(20):
            steps = next_steps(steps, seconds * steps)
        assert steps == settled, seconds


@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_prompts_are_continued_as_each_alone(side):
    config = plain(model__init_std=0.3).model
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    lengths = (2, 7, 5)
    prompts = [rng.integers(0, VOCAB, length) for length in lengths]
    rows, ids = np.full((3, 7), -1), np.zeros((3, 7), int)
    for row, prompt in enumerate(prompts):
        place = slice(7 - len(prompt), 7) if side == "left" else slice(0, len(prompt))
        rows[row, place], ids[row, place] = prompt, 1
    options = dict(vocab_size=VOCAB, temperature=0.0)
    together = np.stack(list(generate(config, params, rows, 6, segment_ids=ids, **options)), 1)
    for row, prompt in enumerate(prompts):
        alone = [int(t[0]) for t in generate(config, params, prompt[None], 6, **options)]
        assert together[row].tolist() == alone


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": 2**70},
    ],
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        next(generate(plain().model, {}, jnp.zeros((1, 1), int), 1, vocab_size=3, **wrong))


@pytest.mark.parametrize(
    "prompt, segment_ids",
    [([[]], None), ([[1, VOCAB]], None), ([[-1]], None), ([[1, 2], [3, 4]], [[1, 0], [0, 0]])],
)
def test_prompts_that_are_none_are_named(prompt, segment_ids):
    with pytest.raises(InputError, match="prompt: got"):
        generate(plain().model, {}, np.array(prompt, int), 1, vocab_size=3, segment_ids=segment_ids)


def test_one_row_says_nothing_of_its_error():
    result = summarize(np.array([30.0, 0.0]), np.array([20.0, 0.0]), tokens_per_byte=0.5)
    assert result.loss == 1.5 and result.tokens == 20
    assert result.loss_error == result.bits_per_byte_error == math.inf


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
