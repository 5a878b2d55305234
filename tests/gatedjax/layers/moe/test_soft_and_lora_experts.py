"""Soft MoE beside loops over slots; mixtures of LoRA experts beside loops over experts, and what
stays frozen.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import plain, run_steps

from gatedjax.config import FrozenDict, LoRAMixtureConfig, SoftMoEConfig
from gatedjax.errors import InputError
from gatedjax.layer_stack import periods_of
from gatedjax.layers import TokenInfo
from gatedjax.layers.moe.lora import LoRAMixture, phatgoose_weights, xlora_weights
from gatedjax.layers.moe.soft import SoftMoE
from gatedjax.model import LanguageModel, init_caches

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 9, 8)).astype(np.float32))


def make(module):
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), X)["params"])
    return jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


def softmax(z, axis):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def mlp(x, gate, up, down):
    h = x @ gate
    return (h / (1 + np.exp(-h)) * (x @ up)) @ down


def test_soft_moe_equals_loops_over_slots():
    module = SoftMoE(SoftMoEConfig(num_experts=3, slots_per_expert=2, hidden=5), 0.3, jnp.float32)
    params = make(module)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = np.zeros(X.shape)
    for b, x in enumerate(X.astype(np.float64)):
        unit = x / np.sqrt((x**2).sum(-1, keepdims=True))
        phi = p["phi"].reshape(8, 6)
        logits = p["scale"] * unit @ (phi / np.sqrt((phi**2).sum(0)))
        dispatch, combine = softmax(logits, 0), softmax(logits, 1)
        for s in range(6):
            slot = dispatch[:, s] @ x
            y = mlp(slot, *(p[name][s // 2] for name in ("gate", "up", "down")))
            expected[b] += combine[:, s : s + 1] * y
    y = jax.jit(module.apply)({"params": params}, X)
    assert rel_rms(y, expected) < 1e-5


def test_soft_moe_does_not_care_for_the_order_of_tokens():
    module = SoftMoE(SoftMoEConfig(num_experts=3, hidden=5), 0.3, jnp.float32)
    params, apply = make(module), jax.jit(module.apply)
    order = RNG.permutation(9)
    assert (
        rel_rms(apply({"params": params}, X[:, order]), apply({"params": params}, X)[:, order])
        < 1e-5
    )


@pytest.mark.parametrize("gate, k", [("xlora", 0), ("xlora", 2), ("phatgoose", 2), ("sigmoid", 0)])
def test_lora_mixture_equals_loops_over_experts(gate, k):
    config = LoRAMixtureConfig(
        hidden=6, num_experts=3, rank=2, alpha=3.0, gate=gate, experts_per_token=k
    )
    module = LoRAMixture(config, 0.3, jnp.float32)
    params = make(module)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = X.astype(np.float64)

    def weights(x, gates):
        if gate == "xlora":
            w = softmax(X.astype(np.float64) @ p["classifier"], -1)
            kept = np.argsort(np.argsort(-w)) < (k or 3)
            return w * kept
        if gate == "sigmoid":
            return 1 / (1 + np.exp(-x @ gates.T))
        norm = lambda u: (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5)
        score = norm(x) @ norm(gates).T / np.sqrt(x.shape[-1])
        return softmax(np.where(np.argsort(np.argsort(-score)) < k, score, -np.inf), -1)

    def linear(name, x):
        q = p[name]
        w = weights(x, q.get("gates"))
        low = sum(w[..., i : i + 1] * (x @ q["lora_a"][i] @ q["lora_b"][i]) for i in range(3))
        return x @ q["frozen"] + 3.0 / 2 * low

    h = linear("gate", x)
    expected = linear("down", h / (1 + np.exp(-h)) * linear("up", x))
    y = jax.jit(module.apply)({"params": params}, X)
    assert rel_rms(y, expected) < 1e-5


def first_pass_model(**changes):
    """A model of two layers whose experts do something, its parameters and its tokens."""
    ffn = LoRAMixtureConfig(
        hidden=16, num_experts=3, rank=2, first_pass=True, experts_per_token=2, **changes
    )
    config = plain(model__ffns=FrozenDict(mlp=ffn), model__num_layers=2, model__init_std=0.3).model
    tokens = jnp.asarray(RNG.integers(0, config.vocab_size, (2, 12)), jnp.int32)
    params = nn.meta.unbox(jax.jit(LanguageModel(config).init)(jax.random.key(0), tokens)["params"])
    noisy = lambda path, p: (
        p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape) * ("lora" in path[-1].key)
    )
    return config, jax.tree_util.tree_map_with_path(noisy, params), tokens


def second_pass(config, params, tokens, weights):
    """The model's hidden states, with the experts' weights [L, B, T, E] given: embedding, layers,
    final norm.
    """
    info = TokenInfo(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None, tokens)
    x = params["embedding"][tokens], None, None
    given = {"layer_0": weights}
    (x, _, _), _ = periods_of(config).apply({"params": params["periods"]}, x, info, given, None)
    return (
        x
        * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
        * params["final_norm"]["scale"]
    )


@pytest.mark.slow
def test_the_first_pass_is_the_model_without_experts():
    """Values; and gradients as if the weights were given, but for the classifier's. Each of the two
    layers has weights of its own.
    """
    config, params, tokens = first_pass_model()

    def by_hand(p):
        hidden = second_pass(config, p, tokens, jnp.zeros((2, *tokens.shape, 3)))
        fixed = jax.lax.stop_gradient(hidden)
        weights = jnp.stack([xlora_weights(fixed, c, 1.0, 2) for c in p["lora_classifier"]])
        y = second_pass(config, p, tokens, weights)
        return jnp.sum(jnp.sin(y)), (y, hidden)

    def ours(p):
        y, *_ = LanguageModel(config).apply({"params": p}, tokens)
        return jnp.sum(jnp.sin(y)), y

    (_, (expected, hidden)), expected_grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(
        params
    )
    (_, y), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    assert rel_rms(y, expected) < 1e-5
    assert rel_rms(y, hidden) > 0.01  # the experts matter here
    swapped = params | {"lora_classifier": params["lora_classifier"][::-1]}
    assert rel_rms(jax.jit(ours)(swapped)[1], y) > 0.01  # which layer gets which matters too
    assert float(jnp.abs(grads["lora_classifier"]).max()) > 1e-4
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads)
    ):
        assert rel_rms(g, e) < 1e-4, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_decoding_with_a_first_pass_equals_the_forward_pass():
    config, params, tokens = first_pass_model()
    expected, *_ = jax.jit(LanguageModel(config).apply)({"params": params}, tokens)
    step = jax.jit(
        lambda t, caches: LanguageModel(config).apply({"params": params}, t, caches=caches)[:2]
    )
    y, caches = step(tokens[:, :9], init_caches(config, 2, 16))
    parts = [y]
    for t in range(9, 12):
        y, caches = step(tokens[:, t : t + 1], caches)
        parts.append(y)
    assert rel_rms(jnp.concatenate(parts, axis=1), expected) < 1e-5


def test_only_xlora_has_a_first_pass():
    with pytest.raises(
        InputError, match="first_pass: got True, expected False unless gate is 'xlora'"
    ):
        LoRAMixtureConfig(gate="phatgoose", first_pass=True)


def test_phatgoose_ignores_the_length_of_its_vectors():
    gates = jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)
    scaled = gates * np.array([[1.0], [9.0], [3.0], [0.5]], np.float32)
    np.testing.assert_allclose(
        phatgoose_weights(X, gates, 2), phatgoose_weights(X, scaled, 2), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_frozen_weights_stay_to_the_bit(optimizer):
    ffn = LoRAMixtureConfig(hidden=16, num_experts=2, rank=2)
    config = plain(model__ffns=FrozenDict(mlp=ffn), optim__name=optimizer)
    one = jax.devices()[:1]
    (_, before, _), (_, after, _) = (
        run_steps(config, 0, devices=one),
        run_steps(config, 2, devices=one),
    )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after.params), jax.tree.leaves(before.params)
    ):
        assert np.array_equal(a, b) == (path[-1].key == "frozen"), jax.tree_util.keystr(path)
