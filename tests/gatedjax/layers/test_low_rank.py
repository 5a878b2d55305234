"""Low-rank updates of projections: the first pass, the formula and its gradients, merging."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import plain, random_batch, tiny

from gatedjax.config import FrozenDict, LoRAConfig, MLAConfig
from gatedjax.layers import low_rank
from gatedjax.layers.projection import Projection, Weights
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel
from gatedjax.training.optim import muon_dimensions
from gatedjax.training.state import init_params, param_axes

CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=("*",))


class Parent(nn.Module):
    """Patterns are about paths: the projection needs a name."""

    inputs: dict
    outputs: dict

    @nn.compact
    def __call__(self, x):
        return Projection(self.inputs, self.outputs, 0.02, jnp.float32, name="p")(x)


class Product(nn.Module):
    """As `Parent`, by hand."""

    inputs: dict
    outputs: dict

    @nn.compact
    def __call__(self, x):
        weights = Weights(self.inputs, self.outputs, 0.02, jnp.float32, name="p")()
        return jnp.tensordot(x, weights, 1)


def test_weights_are_those_of_the_projection():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    axes = ({"rank": 4}, {"heads": 2, "head_dim": 3})
    with low_rank.low_rank_updates(CONFIG):
        params = Parent(*axes).init(jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(
            jnp.shape, Product(*axes).init(jax.random.key(0), x)
        )
        params = jax.tree.map(lambda p: p + 0.1, params)
        projected = Parent(*axes).apply(params, x)
        assert rel_rms(Product(*axes).apply(params, x), projected) < 1e-6


def test_the_update_and_its_gradients_are_numpys():
    """`y = x W + (alpha / r) x A B`, heads in and width out, in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 2, 4))
    dy = rng.normal(size=(2, 5, 6))
    w = rng.normal(size=(2, 4, 6))
    a = rng.normal(size=(2, 4, 3))
    b = rng.normal(size=(3, 6))
    layer = Parent({"heads": 2, "head_dim": 4}, {"embed": 6})
    params = {"p": {"kernel": w, "lora": {"a": a, "b": b}}}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)

    def apply(params, x):
        with low_rank.low_rank_updates(CONFIG):
            return layer.apply({"params": params}, x)

    y, back = jax.vjp(apply, params, jnp.asarray(x, jnp.float32))
    merged = w + 2.0 * np.einsum("hdr,rm->hdm", a, b)
    assert rel_rms(y, np.einsum("bthd,hdm->btm", x, merged)) < 1e-5
    grads, dx = back(jnp.asarray(dy, jnp.float32))
    low = np.einsum("bthd,hdr->btr", x, a)
    d_low = 2.0 * np.einsum("btm,rm->btr", dy, b)
    assert rel_rms(grads["p"]["kernel"], np.einsum("bthd,btm->hdm", x, dy)) < 1e-5
    assert rel_rms(grads["p"]["lora"]["a"], np.einsum("bthd,btr->hdr", x, d_low)) < 1e-5
    assert rel_rms(grads["p"]["lora"]["b"], 2.0 * np.einsum("btr,btm->rm", low, dy)) < 1e-5
    expected_dx = np.einsum("btm,hdm->bthd", dy, w) + np.einsum("btr,hdr->bthd", d_low, a)
    assert rel_rms(dx, expected_dx) < 1e-5


def made(model):
    return nn.meta.unbox(init_params(model, jax.random.key(0)))


def hidden_of(model):
    def hidden(params, batch):
        tokens = (batch.tokens, batch.positions, batch.segment_ids)
        return LanguageModel(model).apply({"params": params}, *tokens)[0]

    return jax.jit(hidden)


def check_first_pass_and_merged(base):
    """The pass before any training, and after: the base's bits, and the merged model's values."""
    updates = dataclasses.replace(CONFIG, targets=("*.mixer.*", "*.ffn.*"))
    with_updates = dataclasses.replace(base, lora=updates)
    params = made(with_updates)
    flat = flatten_dict(params)
    without = {path: x for path, x in flat.items() if not low_rank.is_update(path)}
    # The random numbers of everything else are those of the model without updates.
    expected = flatten_dict(made(base))
    assert without.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(without[path], x)

    batch = random_batch(0, rows=2)
    hidden, hidden_of_base = hidden_of(with_updates), hidden_of(base)
    first = hidden(params, batch)
    np.testing.assert_array_equal(first, hidden_of_base(unflatten_dict(without), batch))

    rng = np.random.default_rng(0)
    trained = {}
    for path, x in flat.items():
        noise = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        trained[path] = x + 0.5 * noise if path[-2:] == (low_rank.UPDATE, "b") else x
    params = unflatten_dict(trained)
    after = hidden(params, batch)
    merged = low_rank.merged(params, updates)
    assert flatten_dict(merged).keys() == without.keys()
    assert rel_rms(first, after) > 0.1
    assert rel_rms(hidden_of_base(merged, batch), after) < 1e-5


def test_first_pass_and_merged_under_scan():
    model = plain(model__num_layers=2, model__scan_layers=True).model
    check_first_pass_and_merged(model)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_first_pass_and_merged_with_every_layer(scan):
    model = tiny(model__num_layers=4, model__scan_layers=scan).model
    check_first_pass_and_merged(model)


@pytest.mark.slow
def test_first_pass_and_merged_with_latent_attention():
    """Its keys and values are made with the matrix itself."""
    mla = MLAConfig(num_heads=2, kv_rank=8, q_rank=6, nope_dim=4, rope_dim=4, value_dim=8)
    model = plain(model__num_layers=2).model
    mixers = dict.fromkeys(model.mixers, mla)
    check_first_pass_and_merged(dataclasses.replace(model, mixers=FrozenDict(mixers)))


def test_muon_takes_a_and_b_as_matrices():
    """Of every projection: A contracts what the projection contracts, B the rank alone."""
    model = tiny(model__lora=CONFIG).model
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    axes = flatten_dict(param_axes(boxed))
    found = 0
    for path, names in axes.items():
        if not low_rank.is_update(path):
            continue
        found += 1
        dimensions = muon_dimensions(names)
        assert names[0] == "layers"
        inside = tuple(range(1, len(names)))
        if path[-1] == "a":
            assert dimensions == (inside[:-1], inside[-1:]), (path, names)
        else:
            assert dimensions == (inside[:1], inside[1:]), (path, names)
    # Every projection of the model, routers and gates included.
    assert found == 2 * 20
