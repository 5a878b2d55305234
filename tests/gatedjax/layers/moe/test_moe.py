"""Sparse = dense mixture of experts, for every router; permutations, capacity, experts that cost
nothing.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_dense import combine_weights, dense_moe

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    ModelConfig,
    RouterConfig,
    SoftMoEConfig,
    SparseMoEConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers.moe.capacity import capacities, limit_capacity
from gatedjax.layers.moe.experts import Stacks, mixture, weight_of
from gatedjax.layers.moe.routing import Routing, route
from gatedjax.layers.moe.sparse import SparseMoE
from gatedjax.layers.moe.state import NAME, split
from gatedjax.layers.token_info import TokenInfo
from gatedjax.model import LanguageModel, init_caches

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 16)).astype(np.float32))
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 30, (2, 24)).astype(np.int32))
# Every way to make logits, scores, a selection and weights, and the models of the literature.
VARIANTS = {
    "Mixtral": {},
    "OLMoE": dict(router=dict(renormalize=False)),
    "gpt-oss": dict(router=dict(weighting="selected", affine=True)),
    "gpt-oss, its experts": dict(
        activation="clamped_swiglu",
        swiglu_limit=0.6,
        bias=True,
        router=dict(weighting="selected", affine=True),
    ),
    "Nemotron-3": dict(
        gated=False,
        activation="relu_squared",
        latent=6,
        shared_hidden=24,
        shared_gate=False,
        router=dict(scoring="sigmoid", scale=2.5, bias_rule="sign"),
    ),
    "biases of all, weights go in": dict(
        shared_hidden=24,
        bias=True,
        router=dict(scoring="sigmoid", renormalize=False, weight_input=True),
    ),
    "Qwen2-MoE": dict(router=dict(renormalize=False), shared_hidden=24),
    "shared, no gate": dict(shared_hidden=24, shared_gate=False, activation="gelu"),
    "Switch": dict(experts_per_token=1, router=dict(renormalize=False)),
    "Llama 4": dict(
        experts_per_token=1, router=dict(scoring="sigmoid", renormalize=False, weight_input=True)
    ),
    "DeepSeek-V2": dict(
        num_experts=6,
        router=dict(
            selection="grouped_topk",
            num_groups=3,
            kept_groups=2,
            group_score="max",
            renormalize=False,
            scale=4.0,
        ),
    ),
    "DeepSeek-V3": dict(
        num_experts=8,
        experts_per_token=3,
        router=dict(
            scoring="sigmoid",
            selection="grouped_topk",
            num_groups=4,
            kept_groups=2,
            scale=2.5,
            bias_rule="sign",
        ),
    ),
    "Kimi-Linear": dict(
        num_experts=8,
        experts_per_token=3,
        shared_hidden=24,
        shared_gate=False,
        router=dict(scoring="sigmoid", scale=2.446, bias_rule="sign"),
    ),
    "LongCat": dict(
        num_experts=4, copy_experts=2, router=dict(renormalize=False, scale=6.0, bias_rule="pid")
    ),
    "MoE++": dict(
        zero_experts=1,
        copy_experts=1,
        constant_experts=2,
        router=dict(renormalize=False, residual=True),
    ),
    "sparsemax, skipping": dict(
        experts_per_token=3, router=dict(scoring="sparsemax", threshold=1e-6, renormalize=False)
    ),
    "sparsemax of the selected": dict(
        router=dict(scoring="sparsemax", weighting="selected", renormalize=False)
    ),
    "MoDES": dict(experts_per_token=4, router=dict(threshold=0.12)),
    "hash": dict(router=dict(selection="hash", weighting="uniform")),
    "expert choice": dict(router=dict(selection="expert_choice", renormalize=False)),
    "straight through": dict(router=dict(selection="gumbel", renormalize=False)),
    "activation gate, annealed": dict(
        router=dict(
            modified_input="tanh", activation="gelu", affine=True, temperature=2.0, anneal_steps=5
        )
    ),
    "bounded input": dict(
        router=dict(
            modified_input="unit", activation="sigmoid", temperature=0.2, final_temperature=0.2
        )
    ),
    "all experts": dict(experts_per_token=5, router=dict(scoring="sigmoid", renormalize=False)),
}


def configure(**values) -> SparseMoEConfig:
    router = RouterConfig(**values.pop("router", {}))
    return SparseMoEConfig(**dict(num_experts=5, hidden=12) | values, router=router)


def make(config, **attributes):
    """The module, its parameters and its state; biases and importance are moved from where they
    start.
    """
    module = SparseMoE(config, 0.3, jnp.float32, **attributes)
    init = jax.jit(
        lambda key: module.init(key, X, TokenInfo(TOKENS, None, TOKENS))
    )  # jit leaves out the layer itself
    params = nn.meta.unbox(init(jax.random.key(0))["params"])
    params, state = split(params)
    values = np.random.default_rng(5)
    move = {"bias": 0.3, "importance": 0.2, "router_bias": 0.5}
    move |= dict.fromkeys(("gate_bias", "up_bias", "down_bias"), 0.5)
    shift = lambda path, a: (
        a + move.get(path[-1].key, 0.0) * values.normal(size=a.shape).astype(np.float32)
    )
    return module, *(jax.tree_util.tree_map_with_path(shift, tree) for tree in (params, state))


def with_statistics(module):
    return functools.partial(module.apply, method="with_statistics")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_router_equals_ranks_and_masks(name):
    """Combine weights, and their gradient by the logits; every fourth token has nothing but
    ties.
    """
    config = configure(**VARIANTS[name])
    r, k, E = config.router, config.experts_per_token, config.total_experts
    rng = np.random.default_rng(3)
    z = rng.normal(size=(2, 24, E)).astype(np.float32)
    z[:, ::4] = z[:, ::4, :1]  # rows of ties
    bias = (
        rng.normal(size=E).astype(np.float32) if r.bias_rule != "none" else np.zeros(E, np.float32)
    )
    weight = rng.normal(size=z.shape).astype(np.float32)
    key = jax.random.key(0) if r.selection == "gumbel" else None
    noise = 0.0 if key is None else jax.random.gumbel(key, z.shape)

    def sorted_form(z):
        given = jnp.asarray(bias) if r.bias_rule != "none" else None
        routing = route(r, z, k, bias=given, importance=0.9, tokens=TOKENS, key=key)
        return weight_of(routing.experts, routing.weights, 0, E)

    dense = lambda z: combine_weights(r, k, z, bias, 0.9, TOKENS, noise)
    with_gradient = lambda f, z: (f(z), jax.grad(lambda z: jnp.sum(f(z) * weight))(z))
    both = lambda z: (with_gradient(sorted_form, z), with_gradient(dense, z))
    (w, dz), (expected, dexpected) = jax.jit(both)(z)
    assert rel_rms(w, expected) < 1e-6 and rel_rms(dz, dexpected) < 1e-5


# A layer of each sort; what the others add is in the router, tested above.
QUICK = {
    "gpt-oss, its experts",
    "DeepSeek-V3",
    "MoE++",
    "expert choice",
}
LAYERS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS
]


@pytest.mark.parametrize("name", LAYERS)
def test_sparse_equals_dense_with_gradients(name):
    config = configure(**VARIANTS[name])
    module, params, state = make(config)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)
    previous = jnp.asarray(
        np.random.default_rng(2).normal(size=(*X.shape[:2], config.total_experts)), jnp.float32
    )

    def sparse(p, x):
        y, *_ = with_statistics(module)(
            {"params": p | state}, x, TokenInfo(TOKENS, None, TOKENS), previous
        )
        return jnp.sum(y * weight), y

    def dense(p, x):
        y = dense_moe(config, p, x, state.get(NAME), TOKENS, previous)
        return jnp.sum(y * weight), y

    both = lambda *args: [jax.grad(f, argnums=(0, 1), has_aux=True)(*args) for f in (sparse, dense)]
    (actual, y), (expected, z) = jax.jit(both)(params, X)
    assert rel_rms(y, z) < 1e-5
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        assert rel_rms(a, e) < 3e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["Mixtral", "expert choice"])
def test_permuting_tokens_permutes_outputs(name):
    module, params, state = make(configure(**VARIANTS[name]))
    order = np.random.default_rng(2).permutation(24)
    apply = jax.jit(lambda x: with_statistics(module)({"params": params | state}, x))
    (y, statistics, _), (z, permuted, _) = apply(X), apply(X[:, order])
    assert rel_rms(z, y[:, order]) < 1e-6
    for key in statistics:
        np.testing.assert_allclose(permuted[key], statistics[key], rtol=1e-5, err_msg=key)


def test_only_free_experts_equal_their_closed_form():
    """y = (w_copy + sum_i w_i a_i1) x + sum_i w_i a_i2 v_i, and no matrix of an expert exists."""
    free = dict(zero_experts=1, copy_experts=1, constant_experts=2)
    module, params, _ = make(
        configure(num_experts=0, experts_per_token=4, router=dict(renormalize=False), **free)
    )
    assert set(params) == {"router", "constant_mixer", "constant"}
    w = jax.nn.softmax(X @ params["router"]["kernel"])
    a = jax.nn.softmax(jnp.einsum("btm,mnc->btnc", X, params["constant_mixer"]))
    of_x = w[..., 1] + jnp.sum(w[..., 2:] * a[..., 0], -1)
    expected = of_x[..., None] * X + jnp.einsum(
        "btn,nm->btm", w[..., 2:] * a[..., 1], params["constant"]
    )
    y, statistics, _ = jax.jit(with_statistics(module))({"params": params}, X)
    assert rel_rms(y, expected) < 1e-6
    np.testing.assert_array_equal(statistics["counts"], [48] * 4)


@pytest.mark.parametrize("order", ["position", "choice", "priority"])
def test_capacity_drops_those_who_come_last(order):
    """Beside a queue in Python: each expert takes the first C of a row, the rest count as dropped
    and give 0.
    """
    config = configure(capacity_factor=0.7, capacity_order=order, router=dict(renormalize=False))
    module, params, _ = make(config, training=True)
    y, statistics, _ = jax.jit(with_statistics(module))({"params": params}, X)
    p = np.asarray(jax.nn.softmax(X @ params["router"]["kernel"]))
    capacity, weights, dropped = 7, np.zeros_like(p), 0  # ceil(2 * 24 / 5 * 0.7)
    for b in range(2):
        best = np.argsort(-p[b], axis=-1, kind="stable")[:, :2]
        calls = [(t, j) for t in range(24) for j in range(2)]
        of_token = np.argsort(np.argsort(-p[b].max(-1), kind="stable"))
        keys = {
            c: {"position": c, "choice": c[::-1], "priority": (of_token[c[0]], c[1])}[order]
            for c in calls
        }
        taken = np.zeros(5)
        for t, j in sorted(calls, key=keys.get):
            e = best[t, j]
            if taken[e] < capacity:
                weights[b, t, e] = p[b, t, e]
            else:
                dropped += 1
            taken[e] += 1
    h = jax.nn.silu(jnp.einsum("btm,emf->btef", X, params["gate"])) * jnp.einsum(
        "btm,emf->btef", X, params["up"]
    )
    assert dropped > 3 and statistics["dropped"] == dropped and statistics["counts"].sum() == 96
    assert rel_rms(y, jnp.einsum("bte,btef,efm->btm", weights, h, params["down"])) < 1e-5


def test_straight_through_noise_has_the_softmax_gradient():
    """With noise: one expert with weight exactly 1 going forward, the relaxed gradient going
    backward.
    """
    module, params, _ = make(
        configure(experts_per_token=1, router=dict(selection="gumbel", renormalize=False))
    )

    def loss(p, key):
        y, statistics, _ = with_statistics(module)(
            {"params": p}, X, rngs={"router": jax.random.key(key)}
        )
        return jnp.sum(y**2), (y, statistics)

    apply = jax.jit(jax.grad(loss, has_aux=True))
    (grads, (y, a)), (_, (_, b)) = apply(params, 0), apply(params, 1)
    assert np.abs(a["counts"] - b["counts"]).sum() > 0, "the noise should change the selection"
    h = jax.nn.silu(jnp.einsum("btm,emf->btef", X, params["gate"])) * jnp.einsum(
        "btm,emf->btef", X, params["up"]
    )
    outputs = jnp.einsum("btef,efm->btem", h, params["down"])
    nearest = jnp.abs(outputs - y[:, :, None]).sum(-1).min(-1)
    assert float(nearest.max()) < 1e-4
    assert float(jnp.abs(grads["router"]["kernel"]).max()) > 1e-3


def test_models_hand_on_router_logits_and_tokens():
    """The second of two sparse layers sees the first one's logits, in a scan too; decoding gives
    the full forward.
    """
    router = dict(residual=True, selection="hash", weighting="scores")
    ffn = configure(num_experts=4, hidden=8, router=router)
    attention = GatedAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    sizes = dict(vocab_size=32, width=8, num_layers=2, init_std=0.5, dtype="float32")
    model = ModelConfig(**sizes, mixers=FrozenDict(attention=attention), ffns=FrozenDict(mlp=ffn))
    module, tokens = LanguageModel(model), TOKENS[:, :6]
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), tokens)["params"])
    apply = jax.jit(
        lambda p, tokens, caches=None: module.apply({"params": p}, tokens, caches=caches)
    )
    full, *_ = apply(params, tokens)
    carry = params["periods"]["layer_0"]["ffn"]["router_residual"]["kernel"]  # [layers, E, E]
    for layer, changes in ((0, False), (1, True)):
        with_other = jax.tree.map(lambda a: a, params)
        with_other["periods"]["layer_0"]["ffn"]["router_residual"]["kernel"] = carry.at[
            layer
        ].multiply(3.0)
        assert (rel_rms(apply(with_other, tokens)[0], full) > 1e-3) == changes, layer
    _, caches, _ = apply(params, tokens[:, :5], init_caches(model, 2, 8))
    assert rel_rms(apply(params, tokens[:, 5:], caches)[0], full[:, 5:]) < 1e-5


def test_what_is_not_causal_is_refused_by_models():
    choice = dict(selection="expert_choice", renormalize=False)
    refused = {
        "expert_choice": configure(router=choice),
        "soft_moe": SoftMoEConfig(),
        "priority": configure(capacity_factor=1.0, capacity_order="priority"),
    }
    for name, ffn in refused.items():
        with pytest.raises(
            InputError, match=rf"ffns.mlp: got .*{name}.*, expected a causal feed-forward"
        ):
            dataclasses.replace(ModelConfig(), ffns={"mlp": ffn})
    dataclasses.replace(ModelConfig(), ffns={"mlp": configure(capacity_factor=1.0)})


@pytest.mark.parametrize(
    "values, message",
    [
        (
            dict(experts_per_token=6),
            "experts_per_token: got 6, expected between 1 and the number of experts, 5",
        ),
        (
            dict(router=dict(selection="grouped_topk", num_groups=2)),
            "router.num_groups: got 2, expected a divisor",
        ),
        (dict(router=dict(num_groups=5)), "num_groups: got 5, expected 1, or selection"),
        (dict(router=dict(final_temperature=0.5)), "anneal_steps: got 0, expected at least 1"),
        (
            dict(router=dict(selection="expert_choice")),
            "selection: got 'expert_choice', expected another, or weighting",
        ),
        (dict(router=dict(ffn_fraction=0.5)), "ffn_fraction: got 0.5, expected 0, or a bias_rule"),
        (
            dict(exchange_factor=1.0),
            "exchange_factor: got 1.0, expected 0, or exchange 'all_to_all'",
        ),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        configure(**values)


@given(
    st.lists(st.integers(0, 5), min_size=36, max_size=36),
    st.integers(1, 30),
    st.sampled_from(["position", "choice"]),
)
@settings(max_examples=40, deadline=None)
def test_any_group_sizes(ids, capacity, order):
    """Empty, full and single-row groups, empty places (id 5), experts that live elsewhere; then a
    capacity.
    """
    experts = jnp.asarray(ids, jnp.int32).reshape(1, 12, 3)
    weights = jnp.asarray(np.random.default_rng(len(set(ids))).random((1, 12, 3)), jnp.float32)
    weights = jnp.where(experts == 5, 0.0, weights)
    room = capacity + np.arange(5) % 2  # every second expert takes one more
    of_places = np.append(room, 0)[np.asarray(experts)]
    limited = CAPACITY[order](Routing(experts, weights, jnp.zeros((1, 12, 5))), of_places)
    queue = sorted(range(36), key=lambda i: i if order == "position" else (i % 3, i))
    seen, fits = [0] * 6, np.zeros(36, bool)
    for i in queue:
        fits[i] = ids[i] < 5 and seen[ids[i]] < room[ids[i]]
        seen[ids[i]] += 1
    np.testing.assert_array_equal(limited.experts.reshape(-1), np.where(fits, ids, 5))
    for first in (0, 2):
        y = MIXTURE(X[0, :12], experts[0], weights[0], first)
        local = np.asarray(experts[0]) - first
        expected = np.zeros((12, 16))
        for e in range(3):
            h = X[0, :12] @ STACK[e]
            expected += np.sum(weights[0] * (local == e), -1)[:, None] * (
                (h / (1 + np.exp(-h)) * h) @ STACK[e].T
            )
        assert rel_rms(y, expected) < 1e-5


def test_capacities_of_unlike_experts():
    """MoE++: k T gamma / (tau 4 + 2) for experts that cost nothing, tau times that for those that
    compute.
    """
    values = dict(num_experts=4, zero_experts=1, copy_experts=1, capacity_factor=1.5)
    assert (
        capacities(configure(**values, zero_computation_weight=0.5), 24).tolist()
        == [9] * 4 + [18] * 2
    )
    assert capacities(configure(**values), 24).tolist() == [12] * 6


STACK = np.random.default_rng(7).normal(size=(3, 16, 8)).astype(np.float32) * 0.3
STACKS = Stacks(
    jnp.asarray(STACK),
    jnp.asarray(STACK),
    jnp.asarray(STACK.swapaxes(1, 2)),
    "silu",
    False,
)
MIXTURE = jax.jit(lambda x, experts, weights, first: mixture(x, experts, weights, STACKS, first))
CAPACITY = {o: jax.jit(functools.partial(limit_capacity, order=o)) for o in ("position", "choice")}
