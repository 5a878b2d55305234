"""The encoder of images beside transformers' ViT with the same numbers: logits and all gradients.

Skipped where torch and transformers are not: `make test-oracles`, `pip install -e '.[oracles]'`, or
name an interpreter that has them in GATEDJAX_PEERS_PYTHON.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    MLPConfig,
    ModelConfig,
    PatchConfig,
)
from gatedjax.data.image_rows import patches_of
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel, head_weights

HAS_PEERS = all(importlib.util.find_spec(package) for package in ("torch", "transformers"))
PYTHON = os.environ.get("GATEDJAX_PEERS_PYTHON") or (sys.executable if HAS_PEERS else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="neither torch and transformers, nor GATEDJAX_PEERS_PYTHON"
)

PATCHES = PatchConfig(height=8, width=8, channels=3)
VIT = ModelConfig(
    task="classify",
    patches=PATCHES,
    vocab_size=5,
    width=16,
    num_layers=2,
    mixers=FrozenDict(
        attention=GatedAttentionConfig(
            num_heads=2,
            head_dim=8,
            gate_position="none",
            bias="all",
            qk_norm=False,
            rope_fraction=0.0,
            causal=False,
        )
    ),
    ffns=FrozenDict(mlp=MLPConfig(hidden=24, activation="gelu", bias=True)),
    norm_kind="layer",
    norm_eps=1e-12,
    init_std=0.3,
    dtype="float32",
)


def test_vit_equals_transformers(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    weight = rng.normal(size=(3, 5)).astype(np.float32)
    patches = np.stack([np.pad(patches_of(image, PATCHES), ((1, 0), (0, 0))) for image in pixels])
    tokens = jnp.zeros(patches.shape[:2], jnp.int32)
    module = LanguageModel(VIT)
    boxed = module.init(jax.random.key(0), tokens, patches=jnp.asarray(patches))["params"]
    # Away from their starts.
    params = {
        path: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32)
        for path, p in flatten_dict(nn.meta.unbox(boxed)).items()
    }

    def loss(flat):
        params = unflatten_dict(flat)
        hidden, _, _ = module.apply({"params": params}, tokens, patches=jnp.asarray(patches))
        logits = hidden[:, 0] @ head_weights(params).T
        return jnp.sum(logits * weight), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    named = {"p/" + "/".join(path): p for path, p in params.items()}
    np.savez(tmp_path / "in.npz", pixels=pixels, weight=weight, **named)
    script = Path(__file__).with_name("vit_peer.py")
    command = [PYTHON, script, tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "out.npz")
    assert rel_rms(logits, theirs["logits"]) < 1e-5
    for path, gradient in gradients.items():
        of_peer = theirs["d " + "/".join(path)]
        if path[-2:] == ("key", "bias"):
            # It adds the same to all logits of a row: rounding is all there is.
            np.testing.assert_allclose(of_peer, gradient, atol=1e-4)
            continue
        assert rel_rms(gradient, of_peer) < 5e-5, path
