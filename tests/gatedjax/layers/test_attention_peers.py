"""Latent attention, and gated attention with the options of families of models, beside
transformers' layers with the same numbers: values and all gradients.

Skipped where torch and transformers are not: `make test-oracles`, `pip install -e '.[oracles]'`, or
name an interpreter that has them in GATEDJAX_PEERS_PYTHON.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import GatedAttentionConfig, MLAConfig
from gatedjax.config.presets import GPT_OSS
from gatedjax.layers import MLA, GatedAttention
from gatedjax.layers.tree import flatten_dict, unflatten_dict

HAS_PEERS = all(importlib.util.find_spec(package) for package in ("torch", "transformers"))
PYTHON = os.environ.get("GATEDJAX_PEERS_PYTHON") or (sys.executable if HAS_PEERS else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="neither torch and transformers, nor GATEDJAX_PEERS_PYTHON"
)

B, T, M = 2, 37, 16
RNG = np.random.default_rng(0)
LATENT = dict(num_heads=4, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=8, gate_position="none")
LAYERS = {
    "DeepSeek-V3": MLAConfig(
        **LATENT,
        q_rank=7,
        yarn_factor=8.0,
        yarn_original_length=64,
        yarn_mscale=0.7,
        yarn_mscale_all=0.9,
    ),
    "Kimi-Linear": MLAConfig(**LATENT, rope="none"),
    "Ling 3": MLAConfig(**LATENT, gate_position="sdpa", gate_granularity="headwise"),
    "gpt-oss": GatedAttentionConfig(
        **HEADS | GPT_OSS | dict(window=7, rope_base=1.5e5, yarn_factor=32.0, yarn_truncate=False)
    ),
    "Qwen2": GatedAttentionConfig(**HEADS, bias="qkv", qk_norm=False),
    "OLMo-Hybrid": GatedAttentionConfig(**HEADS, qk_norm_kind="rms_all_heads"),
    "Laguna": GatedAttentionConfig(
        **HEADS
        | dict(gate_position="sdpa", gate_granularity="headwise", gate_activation="softplus")
    ),
    "Inkling 2's sinks": GatedAttentionConfig(
        **HEADS, token_sinks=True, qk_norm=False, rope_fraction=0.0
    ),
}


def module_of(case):
    config = LAYERS[case]
    layer = MLA if isinstance(config, MLAConfig) else GatedAttention
    return layer(config, 1e-5, 0.4)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def given():
    cases = {}
    for case in LAYERS:
        params = module_of(case).init(jax.random.key(0), jnp.zeros((1, 2, M)))["params"]
        # Away from their starts.
        inputs = {
            "/".join(path): np.asarray(p + 0.3 * normal(*p.shape))
            for path, p in flatten_dict(params).items()
        }
        cases[case] = inputs | dict(x=normal(B, T, M), weight=normal(B, T, M))
    return cases


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    arrays = {f"{case}/{name}": a for case, inputs in given.items() for name, a in inputs.items()}
    np.savez(folder / "in.npz", **arrays)
    script = Path(__file__).with_name("attention_peers.py")
    command = [PYTHON, script, folder / "in.npz", folder / "out.npz"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


@pytest.mark.parametrize("case", LAYERS)
def test_equals_the_peer(case, given, theirs):
    inputs = dict(given[case])
    weight = inputs.pop("weight")

    def loss(inputs):
        flat = {tuple(name.split("/")): p for name, p in inputs.items() if name != "x"}
        y = module_of(case).apply({"params": unflatten_dict(flat)}, inputs["x"])
        return jnp.sum(y * weight), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert rel_rms(y, theirs[f"{case}/o"]) < 1e-5
    for name, gradient in gradients.items():
        assert rel_rms(gradient, theirs[f"{case}/d {name}"]) < 5e-5, name
