"""ConViT's attention and gMLP's gate beside timm's, with the same numbers: values and gradients.

Skipped where torch and timm are not: `make test-oracles`, `pip install -e '.[oracles]'`, or name an
interpreter that has them in GATEDJAX_PEERS_PYTHON.
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

from gatedjax.layers.gpsa import GatedPositionalSelfAttention
from gatedjax.layers.spatial_gate import SpatialGatingUnit

HAS_PEERS = all(importlib.util.find_spec(package) for package in ("torch", "timm"))
PYTHON = os.environ.get("GATEDJAX_PEERS_PYTHON") or (sys.executable if HAS_PEERS else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="neither torch and timm, nor GATEDJAX_PEERS_PYTHON"
)

RNG = np.random.default_rng(0)
B, M, H, SIDE = 2, 8, 4, 3
T = SIDE * SIDE


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def gpsa(p):
    params = {
        "query": {"kernel": p["query"]},
        "key": {"kernel": p["key"]},
        "value": {"kernel": p["value"]},
        "out": {"kernel": p["out"], "bias": p["out_bias"]},
        "positions": p["positions"],
        "gate": p["gate"],
    }
    return GatedPositionalSelfAttention(H, (SIDE, SIDE)).apply({"params": params}, p["x"])


def unit(p):
    params = {
        "norm": {"scale": p["norm_scale"], "bias": p["norm_bias"]},
        "tokens": {"matrix": p["matrix"], "bias": p["bias"]},
    }
    return SpatialGatingUnit(-2, 0.02, 1e-6).apply({"params": params}, p["x"])


HEADS = (M, H, M // H)
INPUTS = {
    "gpsa": dict(
        x=normal(B, T, M),
        query=normal(*HEADS),
        key=normal(*HEADS),
        value=normal(*HEADS),
        out=normal(H, M // H, M),
        out_bias=normal(M),
        positions=normal(H, 3),
        gate=normal(H),
        weight=normal(B, T, M),
    ),
    "spatial_gating_unit": dict(
        x=normal(B, T, M),
        norm_scale=normal(M // 2),
        norm_bias=normal(M // 2),
        matrix=normal(T, T),
        bias=normal(T),
        weight=normal(B, T, M // 2),
    ),
}
OURS = {"gpsa": gpsa, "spatial_gating_unit": unit}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    source, target = folder / "in.npz", folder / "out.npz"
    arrays = {f"{case}/{name}": x for case, p in INPUTS.items() for name, x in p.items()}
    np.savez(source, **arrays)
    script = Path(__file__).with_name("mixing_peers.py")
    subprocess.run([PYTHON, str(script), str(source), str(target)], check=True)
    return np.load(target)


@pytest.mark.parametrize("case", INPUTS)
def test_equals_timm(theirs, case):
    p = dict(INPUTS[case])
    weight = p.pop("weight")

    def weighted(p):
        y = OURS[case](p)
        return jnp.vdot(y, weight), y

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    (_, y), gradients = run(p)
    assert rel_rms(y, theirs[f"{case}/o"]) < 1e-5
    for name, gradient in gradients.items():
        assert rel_rms(gradient, theirs[f"{case}/d {name}"]) < 1e-4, name
