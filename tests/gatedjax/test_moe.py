"""Sparse = dense mixture of experts; router formulas; balance statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import SparseMoEConfig
from gatedjax.layers.moe import SparseMoE
from gatedjax.layers.routing import balance_loss, expert_load, router_z_loss, softmax_topk, topk_softmax

X = np.random.default_rng(0).normal(size=(2, 24, 16)).astype(np.float32)
VARIANTS = {
    "Mixtral": {},
    "OLMoE": dict(renormalize=False),
    "gpt-oss": dict(router="topk_softmax"),
    "Qwen2-MoE": dict(renormalize=False, shared_hidden=24),
    "shared, no gate": dict(shared_hidden=24, shared_gate=False, activation="gelu"),
    "one expert": dict(experts_per_token=1, renormalize=False),
    "all experts": dict(experts_per_token=5),
}


def make(config):
    module = SparseMoE(config, 0.3, jnp.float32)
    return module, nn.meta.unbox(module.init(jax.random.key(0), X)["params"])


def dense(c: SparseMoEConfig, p, x):
    """Every expert on every token; the weights of those not chosen are zero."""
    activation = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}[c.activation]
    scores = x @ p["router"]["kernel"]
    probabilities = jax.nn.softmax(scores)
    order = jnp.argsort(-probabilities, stable=True)
    chosen = jnp.argsort(order, stable=True) < c.experts_per_token
    weights = jnp.where(chosen, probabilities, 0.0)
    if c.renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    h = activation(jnp.einsum("btm,emf->btef", x, p["gate"])) * jnp.einsum("btm,emf->btef", x, p["up"])
    y = jnp.einsum("bte,btef,efm->btm", weights, h, p["down"])
    if c.shared_hidden:
        s = p["shared"]
        shared = (activation(x @ s["gate"]["kernel"]) * (x @ s["up"]["kernel"])) @ s["down"]["kernel"]
        y = y + shared * (jax.nn.sigmoid(x @ p["shared_gate"]["kernel"]) if c.shared_gate else 1.0)
    return y


@pytest.mark.parametrize("name", VARIANTS)
def test_sparse_equals_dense_with_gradients(name):
    config = SparseMoEConfig(**dict(num_experts=5, hidden=12) | VARIANTS[name])
    module, params = make(config)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)
    sparse = lambda p, x: module.apply({"params": p}, x)[0]
    loss = lambda f: lambda p, x: jnp.sum(f(p, x) * weight)
    assert rel_rms(jax.jit(sparse)(params, X), dense(config, params, X)) < 1e-5
    actual = jax.jit(jax.grad(loss(sparse), argnums=(0, 1)))(params, X)
    expected = jax.grad(loss(lambda p, x: dense(config, p, x)), argnums=(0, 1))(params, X)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        assert rel_rms(a, e) < 2e-5, jax.tree_util.keystr(path)


def test_permuting_tokens_permutes_outputs():
    module, params = make(SparseMoEConfig(num_experts=5, hidden=12))
    order = np.random.default_rng(2).permutation(24)
    y, statistics = module.apply({"params": params}, X)
    z, permuted = module.apply({"params": params}, X[:, order])
    assert rel_rms(z, y[:, order]) < 1e-6
    np.testing.assert_allclose(permuted["aux_loss"], statistics["aux_loss"], rtol=1e-6)


def test_both_orders_agree_when_renormalised():
    scores = jnp.asarray(np.random.default_rng(3).normal(size=(50, 8)))
    a, b = softmax_topk(scores, 3, True), topk_softmax(scores, 3)
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-5)
    loose = softmax_topk(scores, 3, False)
    assert (loose.weights.sum(-1) < 1).all()


def test_balance_loss_is_one_at_balance_and_e_at_collapse():
    experts = jnp.arange(40).reshape(20, 2) % 4
    uniform = jnp.full((20, 4), 0.25)
    np.testing.assert_allclose(balance_loss(expert_load(experts, 4), uniform), 1.0, rtol=1e-6)
    collapsed = jnp.zeros((20, 4)).at[:, 1].set(1.0)
    np.testing.assert_allclose(balance_loss(expert_load(jnp.ones((20, 1), int), 4), collapsed), 4.0, rtol=1e-6)


def test_router_z_loss_formula():
    scores = np.random.default_rng(4).normal(size=(7, 5))
    np.testing.assert_allclose(router_z_loss(scores), np.mean(np.log(np.exp(scores).sum(-1)) ** 2), rtol=1e-5)
