"""One router before all layers: the same as experts given from outside, in whole rows, packed ones
and decoding; its parameters never train.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import plain

from gatedjax.config import FrozenDict, RouterConfig, SharedRouterConfig, SparseMoEConfig
from gatedjax.data.batch import Batch, empty_row
from gatedjax.errors import InputError
from gatedjax.evaluation.cache_bytes import cache_bytes
from gatedjax.layers.moe.given_experts import given_experts
from gatedjax.layers.moe.shared_router import NAME
from gatedjax.model import LanguageModel, init_caches
from gatedjax.training import trainable
from gatedjax.training.flops import forward_flops_per_token, train_flops_per_token
from gatedjax.training.split_model import router_logits

EXPERTS = 3
ROUTER = SharedRouterConfig(num_layers=1, num_heads=2, head_dim=8, hidden=16)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))


def config(shared=ROUTER, experts=EXPERTS):
    moe = SparseMoEConfig(
        num_experts=experts,
        experts_per_token=1,
        hidden=8,
        router=RouterConfig(selection="given", weighting="uniform"),
    )
    return plain(model__ffns=FrozenDict(mlp=moe), model__shared_router=shared)


@pytest.fixture(scope="module")
def params():
    """Whose experts differ, as do the choices of tokens."""
    model = LanguageModel(config().model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * random.normal(size=s.shape), s.dtype),
        nn.meta.unbox(shapes),
    )


def chosen(params, segment_ids):
    """By the command's own router, from the same parameters."""
    rows = [dataclasses.replace(empty_row(9), tokens=row) for row in TOKENS]
    batch = Batch(*(np.stack(x) for x in zip(*(vars(row).values() for row in rows))))
    batch = dataclasses.replace(batch, positions=None, segment_ids=segment_ids)
    logits = router_logits(config().model.router_model, params[NAME], batch)
    return jnp.argmax(logits, axis=-1)


@pytest.mark.parametrize(
    "segments",
    [pytest.param(None, marks=pytest.mark.slow), [1, 1, 1, 1, 2, 2, 2, 0, 0]],
)
def test_equals_experts_that_are_given(params, segments):
    segment_ids = None if segments is None else jnp.tile(jnp.asarray(segments), (2, 1))
    ids = chosen(params, segment_ids)
    assert len(np.unique(ids)) > 1
    inside, _, _ = LanguageModel(config().model).apply(
        {"params": params}, TOKENS, None, segment_ids
    )
    outside = LanguageModel(config(SharedRouterConfig()).model)
    with given_experts(ids):
        expected, _, _ = outside.apply({"params": params}, TOKENS, None, segment_ids)
    np.testing.assert_array_equal(inside, expected)
    with given_experts((ids + 1) % EXPERTS):
        others, _, _ = outside.apply({"params": params}, TOKENS, None, segment_ids)
    assert np.max(np.abs(inside - others)) > 1e-2


@pytest.mark.slow
def test_decoding_equals_whole_rows(params):
    model = LanguageModel(config().model)
    whole, _, _ = model.apply({"params": params}, TOKENS)
    caches = init_caches(config().model, 2, 9)
    found, caches, _ = model.apply({"params": params}, TOKENS[:, :7], caches=caches)
    np.testing.assert_allclose(found, whole[:, :7], atol=1e-4)
    for i in (7, 8):
        found, caches, _ = model.apply({"params": params}, TOKENS[:, i : i + 1], caches=caches)
        np.testing.assert_allclose(found, whole[:, i : i + 1], atol=1e-4)


def test_its_parameters_never_train(params):
    trains, frozen = trainable.split(config(), params)
    assert NAME not in trains and set(frozen) == {NAME}


def test_what_it_costs():
    """Forward its own model without logits and a product with W_out; no backward pass."""
    with_router, without = config().model, config(SharedRouterConfig()).model
    router = with_router.router_model
    width = with_router.width
    own = forward_flops_per_token(router, 32) - 2 * width * router.vocab_size + 2 * width * EXPERTS
    forward = forward_flops_per_token(without, 32)
    assert forward_flops_per_token(with_router, 32) == forward + own
    assert train_flops_per_token(with_router, 32) == pytest.approx(3 * forward + own)
    held = cache_bytes(with_router, 1, 32).held
    assert held == cache_bytes(without, 1, 32).held + cache_bytes(router, 1, 32).held


def test_it_needs_layers_that_ask_for_it():
    with pytest.raises(InputError, match=r"shared_router.num_layers: got 1, expected 0, or sparse"):
        plain(model__shared_router=ROUTER)
