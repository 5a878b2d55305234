"""One layer, in a notebook: no context, no unboxing, an array in and an array out."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

import gatedjax
from gatedjax.layers.parameters import boxed_parameters

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 32)), jnp.float32)
LAYERS = {
    "attention": gatedjax.GatedAttention(gatedjax.GatedAttentionConfig(num_heads=4, head_dim=8)),
    "linear attention": gatedjax.GatedLinearAttention(
        gatedjax.GatedLinearAttentionConfig(num_heads=2, key_dim=8, value_dim=16, conv_width=3)
    ),
    "MLP": gatedjax.GatedMLP(gatedjax.GatedMLPConfig(hidden=48)),
    "sparse": gatedjax.SparseMoE(
        gatedjax.SparseMoEConfig(num_experts=4, hidden=16, shared_hidden=8)
    ),
    "soft": gatedjax.SoftMoE(gatedjax.SoftMoEConfig(num_experts=3, hidden=16)),
    "LoRA": gatedjax.LoRAMixture(gatedjax.LoRAMixtureConfig(hidden=48, rank=2)),
}
GATES = {
    "attention": {"gates": (2, 12, 4, 8)},
    "linear attention": {"gates": (2, 12, 2, 16), "log_decay": (2, 12, 2, 8)},
    "MLP": {"gates": (2, 12, 48)},
    "sparse": {
        "router_probs": (2, 12, 4),
        "experts": (2, 12, 2),
        "expert_weights": (2, 12, 2),
        "shared/gates": (2, 12, 8),
    },
    "soft": {"dispatch": (2, 12, 3, 1), "combine": (2, 12, 3, 1)},
    "LoRA": {"expert_weights": (2, 12, 4)},
}


@pytest.mark.parametrize("name", LAYERS)
def test_three_lines_give_a_layer_its_parameters_and_its_gates(name):
    layer = LAYERS[name]
    y, params = layer.init_with_output(jax.random.key(0), X)
    assert y.shape == X.shape and y.dtype == jnp.float32 and set(params) == {"params"}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert rel_rms(layer.apply(params, X), y) < 1e-6
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    assert rel_rms(layer.apply(params, X, gatedjax.TokenInfo(positions)), y) < 1e-6
    gates = gatedjax.gate_values(layer, params, X)
    assert {gate: value.shape for gate, value in gates.items()} == GATES[name]
    # Of the input that is given, not of the one that `init` saw; with and without "params" around.
    others = gatedjax.gate_values(layer, params["params"], 2.0 * X[:, ::-1])
    assert any(rel_rms(others[gate], gates[gate]) > 1e-3 for gate in gates)


def test_a_fresh_interpreter_needs_no_more_than_gatedjax():
    """Without the rest of the tests' imports; and `import gatedjax` alone imports no jax."""
    code = """
import sys
import gatedjax
assert "jax" not in sys.modules
import jax
x = jax.random.normal(jax.random.key(1), (2, 10, 32))
layer = gatedjax.GatedAttention(gatedjax.GatedAttentionConfig(num_heads=4, head_dim=16))
y, params = layer.init_with_output(jax.random.key(0), x)
assert y.shape == x.shape
assert set(dir(gatedjax)) >= {"LanguageModel", "Config", "gate_values"}
try:
    gatedjax.GatedTransformer
except AttributeError as error:
    assert "GatedTransformer" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_parameters_are_boxed_on_request():
    layer = LAYERS["MLP"]
    with boxed_parameters():
        boxed = layer.init(jax.random.key(0), X)["params"]
    assert boxed["gate"]["kernel"].names == ("embed", "mlp")
    plain = layer.init(jax.random.key(0), X)["params"]
    assert rel_rms(boxed["gate"]["kernel"].value, plain["gate"]["kernel"]) == 0.0


def test_values_of_a_whole_model_are_stacked_over_periods():
    model = gatedjax.LanguageModel(
        gatedjax.ModelConfig(
            vocab_size=16,
            width=16,
            num_layers=2,
            mixers={"attention": gatedjax.GatedAttentionConfig(num_heads=2, head_dim=8)},
            ffns={"mlp": gatedjax.GatedMLPConfig(hidden=24)},
            dtype="float32",
        )
    )
    tokens = jnp.arange(10).reshape(1, 10)
    params = model.init(jax.random.key(0), tokens)
    gates = gatedjax.gate_values(model, params, tokens)
    assert {name: value.shape for name, value in gates.items()} == {
        "periods/layer_0/mixer/gates": (2, 1, 10, 2, 8),
        "periods/layer_0/ffn/gates": (2, 1, 10, 24),
    }


def test_key_and_value_heads_follow_the_heads():
    config = gatedjax.GatedAttentionConfig(num_heads=6)
    assert config.kv_heads == 6 and config.num_kv_heads is None
    assert gatedjax.GatedAttentionConfig(num_heads=6, num_kv_heads=2).kv_heads == 2
