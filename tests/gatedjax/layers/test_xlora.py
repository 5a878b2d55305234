"""X-LoRA on any projection: the formula and its gradients, layers with weights of their own, what
trains, what is refused.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import plain

from gatedjax.config import LoRAConfig
from gatedjax.errors import InputError
from gatedjax.layers import low_rank
from gatedjax.layers.moe.lora import xlora_weights
from gatedjax.layers.projection import Projection, Weights
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel, init_caches
from gatedjax.training.trainable import is_trainable

RNG = np.random.default_rng(0)
CONFIG = LoRAConfig(rank=2, alpha=6.0, targets=("*.mixer.*",), num_experts=3)


class Parent(nn.Module):
    """Patterns are about paths: the projection needs a name."""

    layer: type = Projection

    @nn.compact
    def __call__(self, *x):
        axes = {"heads": 2, "head_dim": 4}, {"embed": 5}
        if self.layer is Weights:
            axes = {"embed": 8}, {"embed": 5}
        return self.layer(*axes, 0.02, jnp.float32, name="p")(*x)


def applied(params, x, weights, layer=Projection):
    config = LoRAConfig(rank=2, alpha=6.0, targets=("*",), num_experts=3)
    with low_rank.low_rank_updates(config), low_rank.expert_weights(weights):
        return Parent(layer).apply({"params": params}, *x)


def arrays():
    shapes = {"x": (2, 5, 2, 4), "w": (2, 4, 5), "a": (3, 2, 4, 2), "b": (3, 2, 5), "p": (2, 5, 3)}
    made = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    made["p"] = np.exp(made["p"]) * (made["p"] > -0.5)
    return made


def test_a_mixture_of_updates_equals_loops_over_experts():
    """`y = x W + (alpha / r) sum_e p_e x A_e B_e` and its gradients, in float64."""
    o = arrays()
    given = {name: jnp.asarray(value, jnp.float32) for name, value in o.items()}
    params = {"p": {"kernel": given["w"], "lora": {"a": given["a"], "b": given["b"]}}}
    dy = RNG.normal(size=(2, 5, 5))
    y, back = jax.vjp(lambda *z: applied(z[0], [z[1]], z[2]), params, given["x"], given["p"])
    expected = np.einsum("bthd,hdm->btm", o["x"], o["w"])
    dp = np.zeros((2, 5, 3))
    da = np.zeros_like(o["a"])
    db = np.zeros_like(o["b"])
    dx = np.einsum("btm,hdm->bthd", dy, o["w"])
    for e in range(3):
        low = np.einsum("bthd,hdr->btr", o["x"], o["a"][e])
        weight = 3.0 * o["p"][..., e : e + 1]
        expected += weight * (low @ o["b"][e])
        dp[..., e] = 3.0 * np.sum(dy * (low @ o["b"][e]), axis=-1) * (o["p"][..., e] != 0)
        d_low = weight * (dy @ o["b"][e].T)
        da[e] = np.einsum("bthd,btr->hdr", o["x"], d_low)
        db[e] = np.einsum("btr,btm->rm", weight * low, dy)
        dx += np.einsum("btr,hdr->bthd", d_low, o["a"][e])
    assert rel_rms(y, expected) < 1e-5
    grads, found_dx, found_dp = back(jnp.asarray(dy, jnp.float32))
    assert rel_rms(grads["p"]["lora"]["a"], da) < 1e-5
    assert rel_rms(grads["p"]["lora"]["b"], db) < 1e-5
    assert rel_rms(found_dx, dx) < 1e-5
    assert rel_rms(found_dp, dp) < 1e-5


def test_what_is_refused():
    o = arrays()
    params = {"p": {"kernel": o["w"], "lora": {"a": o["a"], "b": o["b"]}}}
    with pytest.raises(InputError, match=r"lora.targets: got 'p', expected projections of tokens"):
        applied(params, [o["x"][:, :3]], o["p"])
    flat = {"p": {"kernel": np.zeros((8, 5)), "lora": {"a": o["a"], "b": o["b"]}}}
    with pytest.raises(InputError, match=r"lora.targets: got p, expected, with num_experts"):
        applied(flat, [], o["p"], Weights)
    with pytest.raises(InputError, match=r"lora.num_experts: got 3, expected 0"):
        low_rank.merged(params, CONFIG)
    with pytest.raises(InputError, match=r"rank: got 0, expected at least 1 with num_experts = 3"):
        LoRAConfig(num_experts=3)
    with pytest.raises(InputError, match=r"experts_per_token: got 4, expected between 0"):
        LoRAConfig(rank=2, targets=("*",), num_experts=3, experts_per_token=4)


def test_what_trains():
    """Experts alone, or what the patterns name alone: the classifier."""
    paths = [
        ("m", "mixer", "out", "lora", "a"),
        ("lora_classifier",),
        ("m", "mixer", "out", "kernel"),
    ]
    config = plain(model__lora=CONFIG)
    assert [is_trainable(config, path) for path in paths] == [True, False, False]
    config = plain(model__lora=CONFIG, optim__trainable=("lora_classifier",))
    assert [is_trainable(config, path) for path in paths] == [False, True, False]


def model_and_tokens(**changes):
    config = plain(
        model__lora=LoRAConfig(**{**vars(CONFIG), **changes}),
        model__num_layers=2,
        model__init_std=0.3,
    ).model
    tokens = jnp.asarray(RNG.integers(0, config.vocab_size, (2, 8)), jnp.int32)
    params = nn.meta.unbox(jax.jit(LanguageModel(config).init)(jax.random.key(0), tokens)["params"])
    return config, params, tokens


@pytest.mark.slow
def test_step_0_is_the_base_and_then_every_layer_has_its_weights():
    config, params, tokens = model_and_tokens(experts_per_token=2)
    hidden = jax.jit(lambda p: LanguageModel(config).apply({"params": p}, tokens)[0])
    flat = flatten_dict(params)
    base_params = {
        path: x
        for path, x in flat.items()
        if not low_rank.is_update(path) and path != ("lora_classifier",)
    }
    base = plain(model__num_layers=2, model__init_std=0.3).model
    of_base = jax.jit(lambda p: LanguageModel(base).apply({"params": p}, tokens)[0])
    expected = of_base(unflatten_dict(base_params))
    np.testing.assert_array_equal(hidden(params), expected)

    def noisy(path, x):
        noise = 0.5 * jax.random.normal(jax.random.key(x.size), x.shape)
        return x + noise if path[-1] in ("b", "lora_classifier") else x

    trained = {path: noisy(path, x) for path, x in flat.items()}
    y = hidden(unflatten_dict(trained))
    assert rel_rms(y, expected) > 0.01
    # With all weights on the merged model's own tokens: one token, all of its weights known.
    classifier = trained[("lora_classifier",)]
    weights = [xlora_weights(expected, of_layer, 1.0, 2) for of_layer in classifier]
    for b, t in ((0, 0), (1, 0)):
        merged = dict(base_params)
        for path in base_params:
            update = (*path[:-1], "lora", "a")
            if path[-1] != "kernel" or update not in trained:
                continue
            a, up = trained[update], trained[(*path[:-1], "lora", "b")]
            of_layers = []
            # Stacked over two periods of one layer.
            for layer in range(2):
                p = weights[layer][b, t]
                size = a[layer].reshape(3, -1, 2)
                product = jnp.einsum("e,eir,ero->io", p, size, up[layer].reshape(3, 2, -1))
                of_layers.append(3.0 * product.reshape(base_params[path].shape[1:]))
            merged[path] = base_params[path] + jnp.stack(of_layers)
        alone = jax.jit(
            lambda p, b=b, t=t: LanguageModel(base).apply(
                {"params": p}, tokens[b : b + 1, : t + 1]
            )[0]
        )(unflatten_dict(merged))
        assert rel_rms(y[b, t], alone[0, t]) < 1e-4
    swapped = trained | {("lora_classifier",): classifier[::-1]}
    assert rel_rms(hidden(unflatten_dict(swapped)), y) > 0.01


@pytest.mark.slow
def test_decoding_equals_the_row():
    config, params, tokens = model_and_tokens()
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    expected, *_ = jax.jit(LanguageModel(config).apply)({"params": params}, tokens)
    step = jax.jit(
        lambda t, caches: LanguageModel(config).apply({"params": params}, t, caches=caches)[:2]
    )
    y, caches = step(tokens[:, :6], init_caches(config, 2, 8))
    parts = [y]
    for t in range(6, 8):
        y, caches = step(tokens[:, t : t + 1], caches)
        parts.append(y)
    assert rel_rms(jnp.concatenate(parts, axis=1), expected) < 1e-4
