"""Blocks: where their norms stand, what they consist of, and the layers around the periods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from random_parameters import random_parameters
from tiny_run import random_batch

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    LoRAMixtureConfig,
    MLPConfig,
    ModelConfig,
    NoFeedForwardConfig,
    NoMixerConfig,
    RouterConfig,
    RWKV7Config,
    SparseMoEConfig,
)
from gatedjax.errors import InputError
from gatedjax.evaluation.probes import measure
from gatedjax.layers.mlp import MLP, GatedMLP
from gatedjax.layers.moe.first_pass import weights_by_block
from gatedjax.layers.moe.losses import load_metrics, router_losses
from gatedjax.layers.moe.state import split, updated
from gatedjax.layers.tree import flatten_dict
from gatedjax.model import LanguageModel, init_caches
from gatedjax.training.flops import forward_flops_per_token
from gatedjax.training.optim import is_matrix
from gatedjax.training.state import init_params, param_axes

RNG = np.random.default_rng(0)
KIMI = ModelConfig(
    mixers=FrozenDict(kda=GatedLinearAttentionConfig(), full=GatedAttentionConfig()),
    ffns=FrozenDict(dense=GatedMLPConfig(), moe=SparseMoEConfig()),
    num_layers=27,
    prefix=("kda",),
    ffn_prefix=("dense",),
    pattern=("kda", "kda", "full", "kda"),
    ffn_pattern=("moe",),
    suffix=("kda", "full"),
    ffn_suffix=("moe", "moe"),
)


def test_kimi_linear_has_27_layers_by_a_list():
    """Its config.json: full_attn_layers counts from 1; the first layer is dense."""
    full = [i + 1 for i in range(27) if KIMI.layer(i)[0] == KIMI.mixers["full"]]
    assert full == [4, 8, 12, 16, 20, 24, 27]
    dense = [i for i in range(27) if KIMI.layer(i)[1] == KIMI.ffns["dense"]]
    assert dense == [0] and KIMI.num_periods == 6
    names = [block.name for block in KIMI.blocks]
    assert names == [
        "prefix_0",
        *(f"layer_{i}" for i in range(4)),
        "suffix_0",
        "suffix_1",
    ]
    assert sorted(i for block in KIMI.blocks for i in block.layers) == list(range(27))
    for block in KIMI.blocks:
        assert all(KIMI.layer(i) == (block.mixer, block.feed_forward) for i in block.layers)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(num_layers=26), "num_layers: got 26, expected 3 of prefix and suffix and a multiple"),
        (dict(num_layers=3), "num_layers: got 3, expected 3 of prefix and suffix and a multiple"),
        (dict(ffn_prefix=()), "ffn_prefix: got (), expected as many as in prefix, 1"),
        (dict(suffix=("mla", "full")), "suffix: got 'mla', expected one of mixers: kda, full"),
        (dict(norm_placement={"x": "post"}), "norm_placement: got 'x', expected one of mixers"),
        (dict(norm_placement={"full": "late"}), "norm_placement.full: got 'late', expected one of"),
        (
            dict(
                mixers={**KIMI.mixers, "kda": NoMixerConfig()},
                ffns={**KIMI.ffns, "dense": NoFeedForwardConfig()},
            ),
            "ffns: got 'none in layer 0', expected a feed-forward in a layer without a mixer",
        ),
    ],
)
def test_what_is_no_model_is_refused(values, message):
    with pytest.raises(InputError) as e:
        dataclasses.replace(KIMI, **values)
    assert str(e.value).startswith(message)


def test_weights_of_a_first_pass_find_their_layers():
    """X-LoRA's weights count the layers with a mixture, wherever they stand."""
    mixture = LoRAMixtureConfig(first_pass=True, num_experts=2)
    config = ModelConfig(
        num_layers=6,
        prefix=("attention",),
        ffn_prefix=("mixture",),
        pattern=("attention", "attention"),
        ffns={"mlp": GatedMLPConfig(), "mixture": mixture},
        ffn_pattern=("mlp", "mixture"),
        suffix=("attention",),
        ffn_suffix=("mixture",),
    )
    # Layers 0, 2, 4 and 5 have one; each weight says which.
    weights = jnp.broadcast_to(jnp.arange(4.0)[:, None], (1, 3, 4, 2))
    found = weights_by_block(config, weights)
    expected = {"prefix_0": [0], "layer_1": [1, 2], "suffix_0": [3]}
    assert {name: list(w[:, 0, 0, 0]) for name, w in found.items()} == expected


# Every sort of state around the periods: values that later layers see, router logits and biases
# that go from layer to layer, caches with and without room.
MOE = SparseMoEConfig(
    num_experts=4,
    hidden=8,
    router=RouterConfig(residual=True, bias_rule="sign", bias_rate=0.1),
)
AROUND = ModelConfig(
    vocab_size=16,
    width=16,
    num_layers=7,
    mixers=FrozenDict(
        rwkv=RWKV7Config(num_heads=2, head_dim=8, chunk_size=8),
        gla=GatedLinearAttentionConfig(num_heads=2, key_dim=4, value_dim=8, chunk_size=8),
        attention=GatedAttentionConfig(
            num_heads=2,
            head_dim=8,
            gate_position="none",
            qk_norm=False,
        ),
    ),
    ffns=FrozenDict(mlp=GatedMLPConfig(hidden=12), moe=MOE),
    prefix=("rwkv", "gla"),
    ffn_prefix=("mlp", "moe"),
    pattern=("gla", "rwkv"),
    ffn_pattern=("moe",),
    suffix=("attention",),
    ffn_suffix=("moe",),
    norm_placement={"attention": "sandwich"},
    init_std=0.2,
    dtype="float32",
)
# The same in little.
SMALL = dataclasses.replace(
    AROUND,
    num_layers=4,
    prefix=("attention",),
    ffn_prefix=("mlp",),
    pattern=("attention",),
    ffn_pattern=("moe",),
    mixers={"attention": AROUND.mixers["attention"], "last": AROUND.mixers["attention"]},
    suffix=("last",),
    norm_placement={"last": "post"},
)
TOKENS = jnp.asarray(RNG.integers(0, 16, (2, 10)).astype(np.int32))


def one_period(config):
    """The same layers as one period, which does not repeat."""
    names = {}
    for key in ("", "ffn_"):
        pattern = getattr(config, f"{key}pattern") * config.num_periods * config.period
        around = (getattr(config, f"{key}prefix"), getattr(config, f"{key}suffix"))
        repeated = pattern[: config.num_layers - sum(map(len, around))]
        names[f"{key}pattern"] = (*around[0], *repeated, *around[1])
        names |= {f"{key}prefix": (), f"{key}suffix": ()}
    return dataclasses.replace(config, **names)


def in_one_period(config, tree):
    """Parameters or router state of a model as those of `one_period`."""
    layers = {}
    for block in config.blocks:
        of_block = tree
        for name in block.path:
            of_block = of_block.get(name, {})
        for place, layer in enumerate(block.layers):
            own = of_block
            if block.is_repeated:
                own = jax.tree.map(lambda p, place=place: p[place], of_block)
            if own:
                layers[f"layer_{layer}"] = jax.tree.map(lambda p: p[None], own)
    others = {name: tree[name] for name in ("embedding", "final_norm") if name in tree}
    return others | {"periods": layers}


@functools.cache
def made(config):
    return random_parameters(LanguageModel(config), TOKENS)


def loss(params, config):
    hidden, _, statistics = LanguageModel(config).apply({"params": params}, TOKENS)
    aux, logged = router_losses(config, statistics)
    return jnp.sum(jnp.sin(hidden)) + aux, (hidden, statistics, logged)


value = jax.jit(loss, static_argnums=1)
gradients = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)


@pytest.mark.parametrize("config", [SMALL, slow(AROUND)], ids=["small", "all"])
def test_layers_around_the_periods_are_layers_like_others(config):
    """Values, statistics, losses and the router state after a step are those of one long period."""
    one = one_period(config)
    params = made(config)
    params_of_one = in_one_period(config, params)
    total, (hidden, statistics, logged) = value(params, config)
    total_of_one, (hidden_of_one, statistics_of_one, logged_of_one) = value(params_of_one, one)
    assert rel_rms(hidden, hidden_of_one) < 1e-5 and rel_rms(total, total_of_one) < 1e-5
    for name, of_one in logged_of_one.items():
        np.testing.assert_allclose(logged[name], of_one, rtol=1e-5)
    counts = {name: s["counts"] for name, s in statistics.items() if s}
    counts_of_one = {name: s["counts"] for name, s in statistics_of_one.items() if s}
    load = load_metrics(config, counts)["expert_load"]
    load_of_one = load_metrics(one, counts_of_one)["expert_load"]
    assert load.shape == (config.num_layers - 1, 4)
    np.testing.assert_allclose(load, load_of_one, rtol=1e-5)
    # The biases of the routers, after a step.
    _, state = split(params)
    _, state_of_one = split(params_of_one)
    new = updated(config, state, counts, jnp.int32(1))
    new_of_one = updated(one, state_of_one, counts_of_one, jnp.int32(1))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, in_one_period(config, new), new_of_one)
    assert forward_flops_per_token(config, 10) == forward_flops_per_token(one, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, changes",
    [
        (AROUND, dict()),
        (SMALL, dict(remat="full")),
        (SMALL, dict(remat="kernels", scan_layers=False)),
        (one_period(SMALL), dict(remat="full")),
    ],
    ids=["all", "computed again", "unrolled", "no period repeats"],
)
def test_their_gradients_too(config, changes):
    """With and without parts that the backward pass computes again; beside one long period's."""
    params = made(config)
    actual, _ = gradients(params, dataclasses.replace(config, **changes))
    expected, _ = gradients(in_one_period(config, params), one_period(config))
    for a, e in zip(
        jax.tree.leaves(in_one_period(config, actual)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        assert rel_rms(a, e) < 3e-5


@pytest.mark.parametrize("config", [SMALL, slow(AROUND)], ids=["small", "all"])
def test_they_decode_with_caches(config):
    """In two pieces of the same length: one program for an empty cache and a filled one."""
    params = made(config)
    _, (full, _, _) = value(params, config)
    apply = jax.jit(LanguageModel(config).apply)
    caches = init_caches(config, 2, 10)
    for start in (0, 5):
        tokens = TOKENS[:, start : start + 5]
        y, caches, _ = apply({"params": params}, tokens, caches=caches)
        assert rel_rms(y, full[:, start : start + 5]) < 1e-5
    with pytest.raises(ValueError, match="caches: got room for 10 tokens a row, expected"):
        LanguageModel(config).apply({"params": params}, tokens[:, :1], caches=caches)


@pytest.mark.slow
def test_probes_have_the_numbers_of_layers():
    batch = random_batch(length=16)
    batch = batch.replace(tokens=batch.tokens % 16)
    params = made(AROUND)
    found = measure(AROUND, params, batch)
    expected = measure(one_period(AROUND), in_one_period(AROUND, params), batch)
    assert {name: list(layers) for name, layers in found.items()} == {
        name: list(layers) for name, layers in expected.items()
    }
    assert list(found["max_activation"]) == list(range(7))
    assert list(found["attention_entropy"]) == [6]
    for name, layers in found.items():
        for layer, values in layers.items():
            np.testing.assert_allclose(values, expected[name][layer], rtol=1e-4, atol=1e-6)


def test_biases_are_no_matrices_to_the_optimizer():
    """They do not decay, and Muon leaves them to Adam; layers in no period have no axis of them."""
    ffns = {
        "mlp": GatedMLPConfig(hidden=12, bias=True),
        "moe": dataclasses.replace(MOE, bias=True, latent=4, shared_hidden=8),
    }
    config = dataclasses.replace(SMALL, ffns=ffns, norm_kind="layer")
    boxed = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    axes = flatten_dict(param_axes(boxed))
    vectors = {path[-1] for path, of_one in axes.items() if not is_matrix(of_one)}
    biases = {"bias", "gate_bias", "up_bias", "down_bias"}
    assert vectors == biases | {"scale"}
    assert {path[0] for path, of_one in axes.items() if "layers" in of_one} == {"periods"}
    assert {path[0] for path in axes} >= {"prefix_0", "periods", "suffix_0"}


# --- norms and single layers, in float64

M = 6
ALONE = ModelConfig(
    vocab_size=8,
    width=M,
    num_layers=2,
    mixers=FrozenDict(
        attention=GatedAttentionConfig(num_heads=1, head_dim=M, gate_position="none"),
        nothing=NoMixerConfig(),
    ),
    pattern=("attention", "nothing"),
    ffns=FrozenDict(nothing=NoFeedForwardConfig(), mlp=MLPConfig(hidden=5)),
    ffn_pattern=("nothing", "mlp"),
    norm_eps=1e-2,
    init_std=0.5,
    dtype="float32",
)


def normed(x, p, offset):
    """RMSNorm, or LayerNorm where there is a bias."""
    if "bias" in p:
        x = x - jnp.mean(x, -1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2)
    return x * (offset + p["scale"]) + p.get("bias", 0.0)


def twin(params, config):
    """Rows of one token, whose attention is its own value: a block of each, with its norms."""
    placement = config.norm_placement["attention"]
    offset = 1.0 if config.zero_centered_norm else 0.0
    attention = jax.tree.map(lambda p: p[0], params["periods"]["layer_0"])
    mlp = jax.tree.map(lambda p: p[0], params["periods"]["layer_1"])

    def added(block, name, f, x):
        if placement != "post":
            x = normed(x, block[f"{name}_norm"], offset)
        y = f(x)
        if placement != "pre":
            y = normed(y, block[f"{name}_post_norm"], offset)
        return y

    def values(x):
        return (
            x @ attention["mixer"]["value"]["kernel"][:, 0] @ attention["mixer"]["out"]["kernel"][0]
        )

    def relu2(x):
        up = x @ mlp["ffn"]["up"]["kernel"]
        return (up * (up > 0)) ** 2 @ mlp["ffn"]["down"]["kernel"]

    x = params["embedding"]
    if config.embedding_norm:
        x = normed(x, params["embedding_norm"], offset)
    x = x + added(attention, "mixer", values, x)
    x = x + added(mlp, "ffn", relu2, x)
    return normed(x, params["final_norm"], offset)


def in_float64(f, *args):
    """Values and gradients of sum(sin(f)) by the first argument, in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)
        y = np.asarray(f(*args))
        gradients = jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))))(*args)
        return y, jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize(
    "placement, values",
    [
        slow("pre", dict()),
        slow("post", dict(norm_kind="layer", embedding_norm=True)),
        ("sandwich", dict(zero_centered_norm=True)),
    ],
)
def test_norms_stand_where_the_configuration_says(placement, values):
    """Blocks that are a mixer alone and a feed-forward alone, with one norm or two each."""
    config = dataclasses.replace(
        ALONE,
        norm_placement={"attention": placement, "nothing": placement},
        **values,
    )
    tokens = jnp.arange(8)[:, None]
    params = made(config)
    y, expected = in_float64(lambda p: twin(p, config), params)

    def ours(p):
        hidden, _, _ = LanguageModel(config).apply({"params": p}, tokens)
        return jnp.sum(jnp.sin(hidden)), hidden[:, 0]

    actual, hidden = jax.jit(jax.grad(ours, has_aux=True))(params)
    assert rel_rms(hidden, y) < 1e-5
    norms = {name for block in actual["periods"].values() for name in block if "norm" in name}
    assert (
        norms
        == {
            "pre": {"mixer_norm", "ffn_norm"},
            "post": {"mixer_post_norm", "ffn_post_norm"},
            "sandwich": {"mixer_norm", "ffn_norm", "mixer_post_norm", "ffn_post_norm"},
        }[placement]
    )
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    ):
        # Queries and keys do nothing in a row of one token.
        if np.abs(e).max() > 0:
            assert rel_rms(a, e) < 1e-5, jax.tree_util.keystr(path)


def dense_twin(c, p, x):
    act = {
        "silu": lambda z: z / (1 + jnp.exp(-z)),
        "gelu": lambda z: z / (1 + jnp.exp(-2 * (2 / jnp.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "relu_squared": lambda z: jnp.where(z > 0, z * z, 0.0),
    }
    linear = lambda name, y: y @ p[name]["kernel"] + (p[name]["bias"] if c.bias else 0.0)
    up = linear("up", x)
    if c.kind == "mlp":
        return linear("down", act[c.activation](up))
    gate = linear("gate", x)
    if c.activation != "clamped_swiglu":
        return linear("down", act[c.activation](gate) * up)
    # gpt-oss: the gate is cut from above, up on both sides.
    gate = jnp.where(gate > c.swiglu_limit, c.swiglu_limit, gate)
    up = jnp.where(jnp.abs(up) > c.swiglu_limit, jnp.sign(up) * c.swiglu_limit, up)
    return linear("down", (up + 1) * gate / (1 + jnp.exp(-1.702 * gate)))


@pytest.mark.parametrize(
    "config",
    [
        GatedMLPConfig(hidden=7, activation="clamped_swiglu", swiglu_limit=0.7, bias=True),
        MLPConfig(hidden=7, activation="relu_squared", bias=True),
        MLPConfig(hidden=7, activation="gelu"),
    ],
    ids=lambda config: f"{config.kind}, {config.activation}",
)
def test_dense_feed_forwards(config):
    cls = GatedMLP if config.kind == "gated_mlp" else MLP
    x = jnp.asarray(RNG.normal(size=(2, 20, M)), jnp.float32)
    module = cls(config, 0.7)
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(1), p.shape), params)
    expected, gradients = in_float64(lambda p, x: dense_twin(config, p, x), params, x)
    actual, y = jax.jit(
        jax.grad(
            lambda p: (jnp.sum(jnp.sin(y := module.apply({"params": p}, x))), y),
            has_aux=True,
        )
    )(params)
    assert rel_rms(y, expected) < 1e-5
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(gradients), strict=True):
        assert rel_rms(a, e) < 1e-5
