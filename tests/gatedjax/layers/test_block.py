"""Blocks: where their norms stand, what they consist of, and the layers around the periods."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import random_batch

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
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
from gatedjax.layers.moe.losses import load_metrics, router_losses
from gatedjax.layers.moe.state import split, updated
from gatedjax.model import LanguageModel, init_caches
from gatedjax.training.flops import forward_flops_per_token

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
        attention=GatedAttentionConfig(num_heads=2, head_dim=8),
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
# The same layers as one period.
ONE_PERIOD = dataclasses.replace(
    AROUND,
    pattern=("rwkv", "gla", "gla", "rwkv", "gla", "rwkv", "attention"),
    ffn_pattern=("mlp", *["moe"] * 6),
    **dict.fromkeys(("prefix", "ffn_prefix", "suffix", "ffn_suffix"), ()),
)
TOKENS = jnp.asarray(RNG.integers(0, 16, (2, 10)).astype(np.int32))


def in_one_period(params):
    """The parameters of AROUND as those of ONE_PERIOD."""
    layers = {}
    for block in AROUND.blocks:
        of_block = params
        for name in block.path:
            of_block = of_block[name]
        for place, layer in enumerate(block.layers):
            own = of_block
            if block.is_repeated:
                own = jax.tree.map(lambda p, place=place: p[place], of_block)
            layers[f"layer_{layer}"] = jax.tree.map(lambda p: p[None], own)
    others = {name: params[name] for name in ("embedding", "final_norm")}
    return others | {"periods": layers}


def made(config):
    params = jax.jit(LanguageModel(config).init)(jax.random.key(0), TOKENS[:, :2])["params"]
    noisy = lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape)
    return jax.tree.map(noisy, nn.meta.unbox(params))


@pytest.fixture(scope="module")
def around():
    return made(AROUND)


def loss(params, config):
    hidden, _, statistics = LanguageModel(config).apply({"params": params}, TOKENS)
    aux, logged = router_losses(config, statistics)
    return jnp.sum(jnp.sin(hidden)) + aux, (hidden, statistics, logged)


value_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_layers_around_the_periods_are_layers_like_others(around, remat):
    """Values, gradients, statistics, losses and router state are those of one long period."""
    config = dataclasses.replace(AROUND, remat=remat)
    (value, (hidden, statistics, logged)), gradients = value_and_gradients(around, config)
    expected = value_and_gradients(in_one_period(around), ONE_PERIOD)
    (value_of_one, (hidden_of_one, statistics_of_one, logged_of_one)), gradients_of_one = expected
    assert rel_rms(hidden, hidden_of_one) < 1e-5 and rel_rms(value, value_of_one) < 1e-5
    for a, e in zip(
        jax.tree.leaves(in_one_period(gradients)),
        jax.tree.leaves(gradients_of_one),
        strict=True,
    ):
        assert rel_rms(a, e) < 3e-5
    for name, of_one in logged_of_one.items():
        np.testing.assert_allclose(logged[name], of_one, rtol=1e-5)
    counts = {name: s["counts"] for name, s in statistics.items() if s}
    counts_of_one = {name: s["counts"] for name, s in statistics_of_one.items() if s}
    load = load_metrics(AROUND, counts)["expert_load"]
    np.testing.assert_allclose(
        load,
        load_metrics(ONE_PERIOD, counts_of_one)["expert_load"],
        rtol=1e-5,
    )
    assert load.shape == (6, 4)
    # The biases of the routers, after a step.
    _, state = split(around)
    _, state_of_one = split(in_one_period(around))
    new = updated(AROUND, state, counts, jnp.int32(1))
    new_of_one = updated(ONE_PERIOD, state_of_one, counts_of_one, jnp.int32(1))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    biases = [new["prefix_1"], new["suffix_0"], new["periods"]["layer_1"]]
    biases = [block["ffn"]["router_state"]["bias"] for block in biases]
    expected = [new_of_one["periods"][f"layer_{i}"]["ffn"]["router_state"]["bias"] for i in (1, 6)]
    np.testing.assert_allclose(biases[0], expected[0][0])
    np.testing.assert_allclose(biases[1], expected[1][0])
    assert biases[2].shape == (2, 4)
    flops = [forward_flops_per_token(config, 10) for config in (AROUND, ONE_PERIOD)]
    assert flops[0] == flops[1]


def test_they_decode_with_caches(around):
    apply = jax.jit(LanguageModel(AROUND).apply)
    full, _, _ = apply({"params": around}, TOKENS)
    y, caches, _ = apply({"params": around}, TOKENS[:, :9], caches=init_caches(AROUND, 2, 10))
    assert rel_rms(y, full[:, :9]) < 1e-5
    y, caches, _ = apply({"params": around}, TOKENS[:, 9:], caches=caches)
    assert rel_rms(y[:, 0], full[:, 9]) < 1e-5
    with pytest.raises(ValueError, match="caches: got room for 10 tokens a row, expected"):
        LanguageModel(AROUND).apply({"params": around}, TOKENS[:, :1], caches=caches)


@pytest.mark.slow
def test_probes_have_the_numbers_of_layers(around):
    batch = random_batch(length=10)
    batch = batch.replace(tokens=batch.tokens % 16)
    found = measure(AROUND, around, batch)
    expected = measure(ONE_PERIOD, in_one_period(around), batch)
    assert {name: list(layers) for name, layers in found.items()} == {
        name: list(layers) for name, layers in expected.items()
    }
    assert list(found["max_activation"]) == list(range(7))
    assert list(found["attention_entropy"]) == [6]
    for name, layers in found.items():
        for layer, values in layers.items():
            np.testing.assert_allclose(values, expected[name][layer], rtol=1e-4, atol=1e-6)


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


def rms(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) * scale


def twin(params, placement, is_zero_centered):
    """Rows of one token, whose attention is its own value: a block of each, with its norms."""
    offset = 1.0 if is_zero_centered else 0.0
    attention = jax.tree.map(lambda p: p[0], params["periods"]["layer_0"])
    mlp = jax.tree.map(lambda p: p[0], params["periods"]["layer_1"])

    def added(block, name, f, x):
        if placement != "post":
            x = rms(x, offset + block[f"{name}_norm"]["scale"])
        y = f(x)
        if placement != "pre":
            y = rms(y, offset + block[f"{name}_post_norm"]["scale"])
        return y

    def values(x):
        return (
            x @ attention["mixer"]["value"]["kernel"][:, 0] @ attention["mixer"]["out"]["kernel"][0]
        )

    def relu2(x):
        up = x @ mlp["ffn"]["up"]["kernel"]
        return (up * (up > 0)) ** 2 @ mlp["ffn"]["down"]["kernel"]

    x = params["embedding"]
    x = x + added(attention, "mixer", values, x)
    x = x + added(mlp, "ffn", relu2, x)
    return rms(x, offset + params["final_norm"]["scale"])


def in_float64(f, *args):
    """Values and gradients of sum(sin(f)) by the first argument, in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)
        y = np.asarray(f(*args))
        gradients = jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))))(*args)
        return y, jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_norms_stand_where_the_configuration_says(placement):
    """Blocks that are a mixer alone and a feed-forward alone, with one norm or two each."""
    is_zero_centered = placement == "sandwich"
    config = dataclasses.replace(
        ALONE,
        norm_placement={"attention": placement, "nothing": placement},
        zero_centered_norm=is_zero_centered,
    )
    tokens = jnp.arange(8)[:, None]
    params = made(config)
    y, gradients = in_float64(lambda p: twin(p, placement, is_zero_centered), params)

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
        jax.tree.leaves(gradients),
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
