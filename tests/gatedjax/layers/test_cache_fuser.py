"""Cache-to-Cache's fuser: the formula and its gradients in float64, the bits of a fresh one, which
layers go together, what is refused.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms
from scipy.special import erf
from tiny_run import plain

from gatedjax.config import FrozenDict, GatedAttentionConfig, GatedLinearAttentionConfig
from gatedjax.errors import InputError
from gatedjax.layers.cache_fuser import (
    NORM_EPS,
    CacheFuser,
    Fuser,
    Noise,
    Pair,
    attention_places,
    cache_of,
    gate_temperature,
    noisy_gate,
    paired_layers,
    with_cache_of,
)
from gatedjax.layers.kv_cache import KVCache

RNG = np.random.default_rng(5)
B, S, H, D, F = 2, 3, 2, 4, 6
SOURCE = RNG.normal(size=(B, S, 3, 2)).astype(np.float32)
TARGET = RNG.normal(size=(B, S, H, D)).astype(np.float32)


def linear(p, name, x):
    return x @ p[name]["kernel"] + p[name].get("bias", 0.0)


def block(p, name, x):
    y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + NORM_EPS) * p[f"{name}_norm"]["scale"]
    y = linear(p, f"{name}_up", y)
    y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
    return x + linear(p, f"{name}_down", y)


def formula(p, source, target, gate):
    h = linear(p, "in", np.concatenate([source.reshape(B, S, -1), target.reshape(B, S, -1)], -1))
    h = block(p, "common", h)
    weights = 1 / (1 + np.exp(-linear(p, "weights_out", block(p, "weights_0", h))))
    projected = linear(p, "out", block(p, "values_0", h)).reshape(B, S, H, D)
    return target + (gate * weights)[..., None] * projected


def made():
    layer = Fuser(hidden=F, depth=2)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), SOURCE, TARGET, None)["params"]
    return layer, jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), shapes)


def test_the_fuser_and_its_gradients():
    """While it learns: a noisy gate, of which the logit has a gradient too."""
    layer, params = made()
    noise = Noise(jax.random.key(1), 0.7)
    gumbel = np.asarray(jax.random.gumbel(noise.key, (B, S, H)), np.float64)
    weights = RNG.normal(size=TARGET.shape)

    def expected(given):
        p, source, target = given
        gate = 1 / (1 + np.exp(-(p["gate"] + gumbel) / 0.7))
        return formula(p, source, target, gate)

    def total(given):
        p, source, target = given
        y = layer.apply({"params": p}, source, target, noise)
        return jnp.vdot(y, jnp.asarray(weights, jnp.float32)), y

    given = (params, SOURCE, TARGET)
    (_, y), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    assert rel_rms(y, expected(wide)) < 1e-5
    check_gradients(lambda given: np.sum(expected(given) * weights), given, gradient)


def test_a_gate_is_closed_until_it_has_learned():
    layer, params = made()
    closed = params | {"gate": np.float32(0.0)}
    np.testing.assert_array_equal(layer.apply({"params": closed}, SOURCE, TARGET, None), TARGET)
    # Also where what is brought is no number.
    broken = layer.apply({"params": closed}, SOURCE * np.nan, TARGET, None)
    np.testing.assert_array_equal(broken, TARGET)
    opened = params | {"gate": np.float32(1e-3)}
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), opened)
    y = layer.apply({"params": opened}, SOURCE, TARGET, None)
    assert rel_rms(y, formula(wide, SOURCE, TARGET, np.ones((B, S, H)))) < 1e-5


def test_the_temperature_falls_exponentially():
    assert [gate_temperature(f) for f in (0.0, 0.5, 1.0)] == pytest.approx([1, 1e-3**0.5, 1e-3])
    gates = noisy_gate(jnp.float32(0.1), jnp.asarray([-0.2, 0.0]), 1e-3)
    np.testing.assert_allclose(gates, [0, 1], atol=1e-6)


ATTENTION = GatedAttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4)
LINEAR = GatedLinearAttentionConfig(num_heads=2, num_kv_heads=2, key_dim=4, value_dim=4)


def model(pattern, layers, **attention):
    mixers = {"a": dataclasses.replace(ATTENTION, **attention), "g": LINEAR}
    changes = dict(
        mixers=FrozenDict({name: mixers[name] for name in set(pattern)}),
        pattern=tuple(pattern),
        num_layers=layers,
    )
    return plain(**{f"model__{key}": value for key, value in changes.items()}).model


def test_the_last_layers_of_attention_go_together():
    source, target = model("ga", 4), model("a", 3)
    assert paired_layers(source, target) == (Pair(3, 2), Pair(1, 1))
    # What a layer's cache is, and changing it alone.
    periods, *shape = 2, B, S, 2, 4
    caches = {
        "layer_1": KVCache(RNG.normal(size=(periods, *shape)), RNG.normal(size=(periods, *shape)))
    }
    caches["layer_1"] = jax.tree.map(jnp.asarray, caches["layer_1"])
    assert sorted(attention_places(source)) == [1, 3]
    held = cache_of(source, caches, 3)
    np.testing.assert_array_equal(held.k, caches["layer_1"].k[1])
    changed = with_cache_of(source, caches, 1, held)["layer_1"]
    np.testing.assert_array_equal(changed.v[0], caches["layer_1"].v[1])
    np.testing.assert_array_equal(changed.v[1], caches["layer_1"].v[1])


def test_what_cannot_be_fused():
    source, target = model("a", 2), model("a", 2)
    with pytest.raises(InputError, match=r"vocab_size of the source: got 7, expected that of the"):
        paired_layers(dataclasses.replace(source, vocab_size=7), target)
    with pytest.raises(InputError, match=r"mixers of layer 0: got 'window', expected attention"):
        paired_layers(model("a", 2, window=4), target)
    with pytest.raises(
        InputError, match=r"mixers: got .*'gated_linear_attention'.* expected at least"
    ):
        paired_layers(model("g", 2), target)
    caches = [
        {"layer_0": KVCache(jnp.zeros((2, B, slots, 2, 4)), jnp.zeros((2, B, slots, 2, 4)))}
        for slots in (3, 4)
    ]
    with pytest.raises(
        InputError, match=r"source: got 'caches of \(2, 3\) rows and slots', expected"
    ):
        jax.eval_shape(CacheFuser(source, target).init, jax.random.key(0), *caches)
