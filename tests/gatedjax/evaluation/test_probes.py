"""Probes against their plain formulas, on arrays and on a whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import LENGTH, random_batch, tiny

from gatedjax.config import FrozenDict, MLAConfig, ModelConfig
from gatedjax.evaluation import attention_rows as rows
from gatedjax.evaluation import probes
from gatedjax.evaluation.attention_rows import attention_rows
from gatedjax.evaluation.layer_statistics import (
    effective_rank,
    first_norm,
    half_life,
    kurtosis,
    max_activation,
)
from gatedjax.evaluation.probes import measure
from gatedjax.model import LanguageModel
from gatedjax.training.run import fresh_state, prepare
from kernels_pallas.attention import NORMALIZERS

R = np.random.default_rng(0)


def plain_rows(
    q, k, segments, positions, window=None, logits_soft_cap=None, slopes=None, relu=False
):
    """Share and entropy with T x T arrays and loops, float64."""
    B, T, H, D = q.shape
    share, entropy = [[] for _ in range(H)], [[] for _ in range(T)]
    for b in range(B):
        for i in range(T):
            if segments[b, i] == 0:
                continue
            for h in range(H):
                seen = [
                    j
                    for j in range(i + 1)
                    if segments[b, j] == segments[b, i] and (not window or i - j < window)
                ]
                s = np.array([q[b, i, h] @ k[b, j, h * k.shape[2] // H] for j in seen]) / np.sqrt(D)
                s = logits_soft_cap * np.tanh(s / logits_soft_cap) if logits_soft_cap else s
                s = s - slopes[h] * (i - np.array(seen)) if slopes is not None else s
                p = np.maximum(s, 0) if relu else np.exp(s)
                p = p / p.sum() if p.sum() else p
                first = i - positions[b, i]
                if first != i:
                    share[h].append(p[seen.index(first)] if first in seen else 0.0)
                entropy[positions[b, i]].append(-(p[p > 0] * np.log(p[p > 0])).sum())
    return np.array([np.mean(x) for x in share]), np.array(
        [np.mean(x) if x else np.nan for x in entropy]
    )


@pytest.mark.parametrize(
    "options", [{}, dict(window=7, relu=True), dict(logits_soft_cap=2.0, slopes=np.full(4, 0.1))]
)
def test_attention_rows_equal_the_plain_formula(options, monkeypatch):
    monkeypatch.setattr(rows, "QUERY_BLOCK", 16)
    B, T, H, D = 2, 41, 4, 8
    q, k = 2 * R.normal(size=(B, T, H, D)), R.normal(size=(B, T, 2, D))
    ends = np.array([[20, 41], [5, 37]])
    segments = np.array([np.searchsorted(e, np.arange(T), "right") + 1 for e in ends])
    segments[1, 37:] = 0  # padding
    positions = np.array([[t - max([0, *e[e <= t]]) for t in range(T)] for e in ends])
    want = plain_rows(q, k, segments, positions, **options)
    low = [jnp.asarray(x, jnp.float32) for x in (q, k)]
    normalizer = NORMALIZERS["relu" if options.pop("relu", False) else "softmax"]
    slopes, sinks = (
        options.pop("slopes", None),
        jnp.asarray([0.5, -1.0, 2.0, 0.0]) if "logits_soft_cap" in options else None,
    )
    by_head = dict(alibi_slopes=None if slopes is None else jnp.asarray(slopes), sink_logits=sinks)
    got = attention_rows(*low, segments, positions, normalizer=normalizer, **by_head, **options)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-6)


def test_attention_rows_take_memory_linear_in_length():
    def temporaries(T):
        shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
        ids = shape(1, T, dtype=jnp.int32)
        compiled = (
            jax.jit(attention_rows)
            .lower(shape(1, T, 2, 16), shape(1, T, 2, 16), ids, ids)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096) < 4 * 2 * 4096**2


def test_statistics_of_the_residual_stream():
    x, real = R.normal(size=(2, 500, 64)), np.ones((2, 500), bool)
    x[1, 400:], real[1, 400:] = 1e9, False
    known = x[real]
    assert kurtosis(jnp.asarray(x), real) == pytest.approx(
        np.mean((known - known.mean()) ** 4) / known.var() ** 2, rel=1e-4
    )
    assert kurtosis(jnp.asarray(x), real) == pytest.approx(3.0, abs=0.2)
    assert max_activation(jnp.asarray(x), real) == pytest.approx(np.abs(known).max())


def test_first_tokens_are_told_apart():
    """Norms of two documents and padding; and attention of some of the queries alone."""
    x = R.normal(size=(1, 6, 2, 3)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    norms = np.linalg.norm(x[0], axis=-1)
    expected = norms[[0, 3]].mean(axis=0) / norms[[1, 2, 4]].mean(axis=0)
    np.testing.assert_allclose(first_norm(x, segments), expected, rtol=1e-5)
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    counted = jnp.asarray([[True, True, False, True, False, True]])
    fraction, _ = attention_rows(x, x, segments, positions, counted=counted)
    logits = np.einsum("hd,khd->hk", x[0, 1], x[0, :2]) / np.sqrt(3)
    p = np.exp(logits)
    np.testing.assert_allclose(fraction, p[:, 0] / p.sum(axis=1), rtol=1e-5)


def test_effective_rank_counts_directions():
    M, D = 32, 8
    orthogonal = np.linalg.qr(R.normal(size=(M, M)))[0]
    value = np.stack([orthogonal[:, :D], orthogonal[:, :D] * (np.arange(D) < 3)], 1)  # [M, Hk, D]
    out = np.stack([orthogonal[:D]] * 4)  # [H, D, M]
    np.testing.assert_allclose(
        effective_rank(jnp.asarray(value), jnp.asarray(out)), [8, 8, 3, 3], rtol=1e-4
    )
    value, out = R.normal(size=(M, 2, D)), R.normal(size=(2, D, M))
    s = np.linalg.svd(np.einsum("mhd,hdn->hmn", value, out), compute_uv=False)[:, :D]
    p = s / s.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        effective_rank(*map(jnp.asarray, (value, out))), np.exp(-(p * np.log(p)).sum(-1)), 1e-4
    )


def test_half_life():
    g = np.log(0.5) / np.array([1.0, 4.0, 100.0])
    np.testing.assert_allclose(half_life(jnp.asarray(g)), [1, 4, 100], rtol=1e-5)
    per_step = (
        np.broadcast_to(g, (2, 5, 3)) * np.array([0.5, 1.5, 1.0, 1.0, 1.0])[:, None]
    )  # the mean counts
    np.testing.assert_allclose(half_life(jnp.asarray(per_step)), [1, 4, 100], rtol=1e-5)


def test_a_model_shows_every_probe_of_its_layers():
    config = tiny(model__num_layers=4, model__dtype="float32")
    run = prepare(config, jax.devices()[:1])
    params = fresh_state(run).params
    batch = random_batch()
    batch = batch.replace(
        segment_ids=np.ones_like(batch.tokens), positions=np.tile(np.arange(LENGTH), (8, 1))
    )
    found = measure(config.model, params, batch)
    assert {name: list(layers) for name, layers in found.items()} == {
        "attention_entropy": [1, 3],
        "effective_rank": [1, 3],
        "expert_load": [1, 3],
        "first_residual_norm": [0, 1, 2, 3],
        "first_token_fraction": [1, 3],
        "first_value_norm": [1, 3],
        "gate_edges": [0, 1, 2, 3],
        "gate_histogram": [0, 1, 2, 3],
        "gate_mean": [0, 1, 2, 3],
        "half_life": [0, 2],
        "kurtosis": [0, 1, 2, 3],
        "massive_channel_ids": [0, 1, 2, 3],
        "massive_channels": [0, 1, 2, 3],
        "max_activation": [0, 1, 2, 3],
        "median_activation": [0, 1, 2, 3],
        "mixer_kurtosis": [0, 1, 2, 3],
        "mixer_max_activation": [0, 1, 2, 3],
    }
    assert found["half_life"][0].shape == (4 * 8,) and found["first_token_fraction"][1].shape == (
        4,
    )
    for histogram in found["gate_histogram"].values():
        assert histogram.sum() == pytest.approx(1.0, abs=1e-5)
    assert found["gate_mean"][1] == pytest.approx(0.5, abs=0.1), "sigmoid of small logits"
    # The last layer's figures are those of its own queries and keys.
    model, inputs = LanguageModel(config.model), (batch.tokens, batch.positions, batch.segment_ids)
    _, sown = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, mutable=["probes"]))(
        *inputs
    )
    of_layer = sown["probes"]["periods"]["layer_1"]
    added = np.asarray(of_layer["mixer_output"][0][1], np.float64)
    assert found["mixer_max_activation"][3] == pytest.approx(np.abs(added).max())
    central = added - added.mean()
    spread = np.mean(central**4) / np.mean(central**2) ** 2
    assert found["mixer_kurtosis"][3] == pytest.approx(spread, rel=1e-4)
    of_mixer = of_layer["mixer"]
    q, k = (np.asarray(of_mixer[name][0][1], np.float64) for name in "qk")
    share, entropy = plain_rows(q, k, batch.segment_ids, batch.positions)
    np.testing.assert_allclose(found["first_token_fraction"][3], share, rtol=1e-4)
    np.testing.assert_allclose(found["attention_entropy"][3], entropy, rtol=1e-4, atol=1e-6)
    # The layers are told apart: what one period shows is what its own parameters make.
    changed = jax.tree.map(lambda p: p, params)
    kernel = changed["periods"]["layer_1"]["mixer"]["gate"]["projection"]["kernel"]
    changed["periods"]["layer_1"]["mixer"]["gate"]["projection"]["kernel"] = kernel.at[1].mul(50.0)
    again = measure(config.model, changed, batch)
    assert again["gate_mean"][1] == found["gate_mean"][1]
    assert np.std(again["gate_edges"][3]) > 2 * np.std(found["gate_edges"][3])
    assert rel_rms(again["kurtosis"][0], found["kurtosis"][0]) == 0.0


def test_latent_attention_has_the_probes_of_attention():
    mixer = MLAConfig(num_heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=8)
    model = ModelConfig(vocab_size=32, width=16, mixers=FrozenDict(attention=mixer))
    batch = random_batch()
    params = jax.eval_shape(LanguageModel(model).init, jax.random.key(0), batch.tokens)["params"]
    measure = functools.partial(probes._measure.__wrapped__, model)
    found = jax.eval_shape(measure, params, batch, None)["layer_0"]
    assert found["first_token_fraction"].shape == found["effective_rank"].shape == (2, 2)
    assert found["attention_entropy"].shape == (2, LENGTH)
