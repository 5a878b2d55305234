"""FAVOR+ beside performer-pytorch with the same random matrix: values and gradients.

Skipped where it is not: `make test-oracles`, `pip install -e '.[oracles]'`, or name an interpreter
that has it in GATEDJAX_PEERS_PYTHON.
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

from gatedjax.layers.bidirectional import linear_attention
from gatedjax.layers.feature_maps import favor_projection, features
from kernels_pallas.linear_scan import linear_scan

HAS_PEERS = all(importlib.util.find_spec(package) for package in ("torch", "performer_pytorch"))
PYTHON = os.environ.get("GATEDJAX_PEERS_PYTHON") or (sys.executable if HAS_PEERS else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="neither torch and performer-pytorch, nor GATEDJAX_PEERS_PYTHON"
)


def test_performer_equals_ours(tmp_path):
    B, T, H, D = 2, 12, 2, 8
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(B, T, H, D)).astype(np.float32) for name in "qkv"}
    given["weights"] = rng.normal(size=(B, T, H, D)).astype(np.float32)
    W = favor_projection(24, D, seed=0)
    np.savez(tmp_path / "in.npz", projection=W, **given)
    script = Path(__file__).parent / "performer_peer.py"
    command = [PYTHON, str(script), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'performer_pytorch'" in done.stderr:
        pytest.skip("the interpreter of GATEDJAX_PEERS_PYTHON has no performer-pytorch")
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "out.npz")

    def loss(q, k, v):
        phi = features("favor+", q, k, projection=W, shift_keys=True)
        o = linear_attention(*phi, v)
        return (o * given["weights"]).sum(), (o, phi)

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    gradients, (o, phi) = run(*(jnp.asarray(given[name]) for name in "qkv"))
    assert rel_rms(o, theirs["o"]) < 1e-5
    for name, gradient in zip("qkv", gradients):
        assert rel_rms(gradient, theirs[f"d{name}"]) < 1e-4, name
    causal = linear_scan(*phi, given["v"], normalize=True)
    # Theirs adds 1e-6 to the sum of keys.
    total = jnp.sum(phi.q * jnp.cumsum(phi.k, axis=1), axis=-1, keepdims=True)
    added = 1e-6 * jnp.sum(phi.q, axis=-1, keepdims=True)
    assert rel_rms(causal * total / (total + added), theirs["causal"]) < 1e-5
