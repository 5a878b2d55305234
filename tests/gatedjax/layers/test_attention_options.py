"""GatedAttention's options: how they start, what is refused, tokens cut over devices, another
project's layer.
"""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from torch_kernels import without_kernels

from gatedjax.config import (
    GatedAttentionConfig,
    MeshConfig,
    ModelConfig,
    from_config_dict,
    layer,
    to_dict,
)
from gatedjax.config.attention_checks import DOUBLY_STOCHASTIC
from gatedjax.config.presets import PRESETS, QWEN3_NEXT
from gatedjax.errors import InputError
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.logit_scale import mean_log
from gatedjax.layers.normalizer import normalizer_of
from gatedjax.layers.token_info import TokenInfo
from gatedjax.sharding import RULES, make_mesh
from gatedjax.training.flops import forward_flops_per_token
from kernels_pallas.attention import NORMALIZERS, Entmax, Sigmoid

B, T, M = 2, 32, 16
SMALL = dict(num_heads=4, num_kv_heads=2, head_dim=8)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, M)).astype(np.float32))


def positions(x=X):
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def build(config, x=X):
    module = GatedAttention(config, 1e-6, 0.3, jnp.float32)
    init = jax.jit(module.init)
    return module, nn.meta.unbox(init(jax.random.key(0), x, TokenInfo(positions(x)))["params"])


def test_every_score_is_reachable():
    names = typing.get_args(typing.get_type_hints(GatedAttentionConfig)["normalizer"])
    # Those that are no normalizers of the op: their weights are of whole rows.
    assert set(names) == {*NORMALIZERS, *DOUBLY_STOCHASTIC}
    assert all(
        normalizer_of(GatedAttentionConfig(normalizer=name, normalizer_length=7)) is not None
        for name in NORMALIZERS
    )
    assert normalizer_of(
        GatedAttentionConfig(normalizer="sigmoid", normalizer_length=7)
    ) == Sigmoid(length=7)
    assert normalizer_of(GatedAttentionConfig(normalizer="entmax", entmax_alpha=1.3)) == Entmax(
        alpha=1.3
    )
    assert normalizer_of(GatedAttentionConfig(normalizer="sparsemax")) == Entmax(alpha=2.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    model = dict(mixers={"attention": layer("gated_attention", **PRESETS[name])}, vocab_size=8)
    config = from_config_dict({"model": {**to_dict(ModelConfig()), **model}})
    assert forward_flops_per_token(config.model, 64) > 0


@pytest.mark.parametrize(
    "values, message",
    [
        (
            dict(normalizer="sigmoid"),
            "normalizer_length: got None, expected a length for normalizer 'sigmoid'",
        ),
        (
            dict(query_scale="scalable_softmax"),
            "expected a length for query_scale 'scalable_softmax'",
        ),
        (
            dict(qk_norm_kind="l2", logit_scale="learned"),
            "expected a length for logit_scale 'learned'",
        ),
        (
            dict(normalizer="softpick", sinks=True),
            "sinks: got True, expected false with normalizer 'softpick'",
        ),
        (dict(qk_norm_kind="l2"), "logit_scale: got 'inverse_sqrt', expected inverse_sqrt unless"),
        (dict(logit_scale="log_dim"), "logit_scale: got 'log_dim', expected inverse_sqrt unless"),
        (dict(fused_gate=True, gate_position="value"), "fused_gate: got True, expected false"),
        (dict(fused_gate=True, gate_shared=True), "fused_gate: got True, expected false"),
        (
            dict(alibi="balanced", num_heads=3, num_kv_heads=3),
            "alibi: got 'balanced', expected an even number",
        ),
        (
            dict(token_sinks=True, sinks=True),
            "token_sinks: got True, expected false with sinks",
        ),
        (
            dict(token_sinks=True, logits_soft_cap=2.0),
            "token_sinks: got True, expected false with logits_soft_cap",
        ),
        (
            dict(token_sinks=True, normalizer="softpick"),
            "token_sinks: got True, expected false with normalizer 'softpick'",
        ),
        (
            dict(qk_norm_kind="l2", logit_scale="log_dim", attention_scale=0.1),
            "attention_scale: got 0.1, expected none with logit_scale 'log_dim'",
        ),
        (
            dict(gate_input="head"),
            "gate_input: got 'head', expected a head-wise sigmoid after sdpa",
        ),
        (
            dict(gate_start=0.5, gate_granularity="headwise", gate_shared=True),
            "gate_start: got 0.5, expected a head-wise sigmoid after sdpa",
        ),
        (dict(gate_start=1.0), "gate_start: got 1.0, expected between 0 and 1, both left out"),
        (dict(gate_hidden=8), "gate_hidden: got 8, expected none with gate_input 'token'"),
        (
            dict(gate_fine_tuning=True, gate_granularity="headwise", gate_input="head"),
            "gate_start: got None, expected a number with gate_fine_tuning",
        ),
        (dict(shares_weights=True, sinks=True), "sinks: got True, expected another value with"),
        (
            dict(selective_rope="low_rank", rope_fraction=0.0),
            "rope_fraction: got 0.0, expected channels that rotate with selective_rope 'low_rank'",
        ),
        (
            dict(causal=False, normalizer="reluformer", reluformer_loss=0.1),
            "reluformer_loss: got 0.1, expected 0 with causal = false",
        ),
        (
            dict(causal=False, query_scale="log_length"),
            "query_scale: got 'log_length', expected none with causal = false",
        ),
        (dict(bias="q"), "bias: got 'q', expected one of none, qkv, all"),
        (dict(entmax_alpha=1.0), "entmax_alpha: got 1.0, expected above 1"),
        (dict(logits_soft_cap=0.0), "logits_soft_cap: got 0.0, expected at least 0.001"),
        (dict(normalizer_length=0), "normalizer_length: got 0, expected at least 1"),
    ],
)
def test_bad_combinations_are_named(values, message):
    with pytest.raises(InputError) as error:
        GatedAttentionConfig(**values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_causality_both_directions_are_the_same():
    """Rows read backward give outputs in reverse, of documents and under a window too."""
    config = GatedAttentionConfig(**SMALL, causal=False, window=5, rope_fraction=0.0)
    module, params = build(config)
    ids = jnp.array([[1] * 12 + [2] * 20, [1] * 29 + [2] * 3])
    run = jax.jit(module.apply)
    y = run({"params": params}, X, TokenInfo(positions(), segment_ids=ids))
    reverse = run({"params": params}, X[:, ::-1], TokenInfo(positions(), segment_ids=ids[:, ::-1]))
    assert rel_rms(reverse[:, ::-1], y) < 1e-6
    # The first token sees the four after it, and no more.
    moved = run({"params": params}, X.at[:, 4].add(1.0), TokenInfo(positions(), segment_ids=ids))
    assert not np.allclose(moved[:, 0], y[:, 0], atol=1e-3)
    moved = run({"params": params}, X.at[:, 5].add(1.0), TokenInfo(positions(), segment_ids=ids))
    np.testing.assert_array_equal(moved[:, 0], y[:, 0])


def test_without_causality_nothing_is_decoded():
    module = GatedAttention(GatedAttentionConfig(**SMALL, causal=False), 1e-6, 0.3, jnp.float32)
    message = "GatedAttention: cache: got one with causal=False, expected none"
    with pytest.raises(ValueError, match=message):
        module.init_cache(1, 8)
    cache = GatedAttention(GatedAttentionConfig(**SMALL), 1e-6, 0.3, jnp.float32).init_cache(B, T)
    with pytest.raises(ValueError, match=message):
        info = TokenInfo(positions())
        jax.eval_shape(lambda: module.init(jax.random.key(0), X, info, cache, method="with_cache"))
    with pytest.raises(InputError) as error:
        ModelConfig(mixers={"attention": GatedAttentionConfig(causal=False)})
    expected = "got 'causal false: tokens see later ones', expected a causal mixer: this model"
    assert f"mixers.attention: {expected}" in str(error.value)
    causal, other = (GatedAttentionConfig(**SMALL, causal=causal) for causal in (True, False))
    flops = [
        GatedAttention(c, 1e-6, 0.3, jnp.float32).forward_flops_per_token(M, 64)
        for c in (causal, other)
    ]
    assert flops[1] - flops[0] == 4 * 4 * 8 * 32


def test_query_scales_start_near_one():
    """Scalable softmax: 1 on average over a training row."""
    assert mean_log(1024) == pytest.approx(1 / 0.16847, rel=1e-4)
    values = dict(
        query_scale="scalable_softmax",
        qk_norm_kind="l2",
        logit_scale="learned",
        normalizer_length=1024,
    )
    start = build(GatedAttentionConfig(**SMALL, **values))[1]["query_scale"]
    assert start["length_scale"].shape == (4,) and float(
        start["length_scale"][0] * mean_log(1024)
    ) == pytest.approx(1)
    assert float(start["logit_scale"][0]) == pytest.approx(np.log2(1024**2 - 1024))


def test_selective_temperatures_are_counted():
    model = lambda **values: ModelConfig(
        mixers={"attention": GatedAttentionConfig(**SMALL, **values)}, vocab_size=8
    )
    more = forward_flops_per_token(model(query_scale="selective"), 8) - forward_flops_per_token(
        model(), 8
    )
    assert more == 2 * 2 * 128 * (4 + 2)  # layers, multiply-adds, width, heads
    assert forward_flops_per_token(model(fused_gate=True), 8) == forward_flops_per_token(model(), 8)


MESHES = {"context": dict(context=8), "context x tensor x data": dict(context=2, tensor=2, data=2)}
ON_MESH = {
    "sinks": dict(window=20, sinks=True, alibi="learned", gate_granularity="headwise"),
    "families": dict(bias="all", token_sinks=True, qk_norm_kind="rms_all_heads"),
    "learned": dict(normalizer="centered_softmax", value_skip=True, similarity="gaussian"),
}


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, "sinks") for name in MESHES),
        slow("context x tensor x data", "families"),
        slow("context x tensor x data", "learned"),
    ],
)
def test_tokens_cut_over_devices(name, options):
    """Values and gradients, with packed documents; and no device holds the scores of all
    queries.
    """
    module, params = build(GatedAttentionConfig(**SMALL, **ON_MESH[options]))
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (B, T)), axis=1), jnp.int32)

    @jax.jit
    def step(params, x):
        with nn.logical_axis_rules(RULES):
            loss = lambda p: (lambda y: (jnp.sum(jnp.sin(y)), y))(
                module.apply({"params": p}, x, TokenInfo(positions(), ids))
            )
            return jax.value_and_grad(loss, has_aux=True)(params)

    (_, y), gradients = step(params, X)
    with jax.set_mesh(make_mesh(MeshConfig(**MESHES[name]))):
        lowered = step.lower(params, X)
        (_, y_cut), gradients_cut = lowered.compile()(params, X)
    assert "collective_permute" in lowered.as_text(), "the queries should change places"
    assert rel_rms(y_cut, y) < 1e-5
    errors = jax.tree.map(rel_rms, gradients_cut, gradients)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_equals_the_layer_of_transformers():
    """Qwen3NextAttention, its weights copied: fused projection, partial rotation, zero-centered
    norms, gate.
    """
    torch = pytest.importorskip("torch")
    with without_kernels():
        package = "transformers.models.qwen3_next"
        modeling = pytest.importorskip(f"{package}.modeling_qwen3_next")
        configuration = pytest.importorskip(f"{package}.configuration_qwen3_next")
    theirs = configuration.Qwen3NextConfig(
        hidden_size=M,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )
    theirs._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = modeling.Qwen3NextAttention(theirs, layer_idx=3).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.tensor(X, dtype=torch.float64)
    angles = modeling.Qwen3NextRotaryEmbedding(theirs)(x, torch.arange(T)[None])
    future = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected = layer(x, angles, future)[0].numpy()
    copied = lambda linear, *out: jnp.asarray(
        linear.weight.detach().numpy().T.reshape(M, *out), jnp.float32
    )
    params = {
        "query": {"kernel": copied(layer.q_proj, 4, 32)},
        "key": {"kernel": copied(layer.k_proj, 2, 16)},
        "value": {"kernel": copied(layer.v_proj, 2, 16)},
        "out": {
            "kernel": jnp.asarray(
                layer.o_proj.weight.detach().numpy().T.reshape(4, 16, M), jnp.float32
            )
        },
        "query_norm": {"scale": jnp.asarray(layer.q_norm.weight.detach().numpy(), jnp.float32)},
        "key_norm": {"scale": jnp.asarray(layer.k_norm.weight.detach().numpy(), jnp.float32)},
    }
    config = GatedAttentionConfig(**QWEN3_NEXT | dict(num_heads=4, head_dim=16, rope_base=1e4))
    module, ours = build(config)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)
    assert rel_rms(module.apply({"params": params}, X, TokenInfo(positions())), expected) < 1e-5
