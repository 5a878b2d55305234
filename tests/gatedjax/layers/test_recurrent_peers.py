"""The delta rule, Mamba-2 and RWKV-7 beside other projects', with the same numbers: values and all
gradients.

transformers' functions and layers, fla-core's naive functions, RWKV-7 by its author. Skipped where
torch, transformers, fla-core and rwkv are not: `make test-oracles`, `pip install -e '.[oracles]'`,
or name an interpreter that has them in GATEDJAX_PEERS_PYTHON.
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

from gatedjax.config import (
    DeltaAttentionConfig,
    Mamba2Config,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.layers import RWKV7, DeltaAttention, Mamba2, RWKV7ChannelMix, TokenInfo
from gatedjax.layers.depth import Depth
from gatedjax.ops import delta_product_scan, delta_scan, rwkv7_scan

PACKAGES = ("torch", "transformers", "fla", "rwkv")
HAS_PEERS = all(importlib.util.find_spec(package) for package in PACKAGES)
PYTHON = os.environ.get("GATEDJAX_PEERS_PYTHON") or (sys.executable if HAS_PEERS else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="neither torch and the other packages, nor GATEDJAX_PEERS_PYTHON"
)

B, T, H, Hk, K, V, M, N = 2, 37, 4, 2, 8, 6, 16, 2
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def fraction(*shape):
    return RNG.uniform(0.05, 0.95, shape).astype(np.float32)


def decay(*shape):
    return (-(10.0 ** RNG.uniform(-3, 0.5, shape))).astype(np.float32)


def unit(*shape):
    x = normal(*shape)
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


# --- functions: inputs, and the call of ours

SCAN = dict(return_final_state=True, chunk_size=16)
WRITES = dict(q=normal(B, T, H, K), k=unit(B, T, H, K), v=normal(B, T, H, V))
GROUPED = dict(q=normal(B, T, Hk, K), k=normal(B, T, Hk, K), v=normal(B, T, H, V))
FULL = dict(q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, H, V))
BETA = dict(beta=fraction(B, T, H))
BY_HEAD = BETA | dict(log_decay=decay(B, T, H))
BY_CHANNEL = BETA | dict(log_decay=decay(B, T, H, K))


def scan(**inputs):
    return delta_scan(**inputs, **SCAN)


def normalized_scan(**inputs):
    return delta_scan(**inputs, l2_norm=True, **SCAN)


def by_channels(q, k, v, log_decay, erase_gate, write):
    erase = erase_gate * k
    return delta_scan(q, k, v, log_decay=log_decay, erase=erase, write=write, **SCAN)


def by_another_key(q, k, v, beta, log_decay, p):
    """Comba: its erase key is beta p."""
    write = jnp.broadcast_to(beta[..., None], v.shape)
    erase = beta[..., None] * p
    return delta_scan(q, k, v, log_decay=log_decay, erase=erase, write=write, **SCAN)


FUNCTIONS = {
    "transformers chunk": (GROUPED | BY_HEAD, normalized_scan),
    "transformers recurrent": (GROUPED | BY_HEAD, normalized_scan),
    "transformers kimi chunk": (FULL | BY_CHANNEL, normalized_scan),
    "transformers kimi recurrent": (FULL | BY_CHANNEL, normalized_scan),
    "fla delta_rule": (WRITES | BETA, scan),
    "fla gated_delta_rule": (WRITES | BY_HEAD, scan),
    "fla kda": (WRITES | BY_CHANNEL, scan),
    "fla gdn2": (
        WRITES
        | dict(
            log_decay=decay(B, T, H, K),
            erase_gate=fraction(B, T, H, K),
            write=fraction(B, T, H, V),
        ),
        by_channels,
    ),
    "fla comba": (WRITES | BY_HEAD | dict(p=unit(B, T, H, K)), by_another_key),
    "fla gated_delta_product": (
        dict(
            q=normal(B, T, H, K),
            k=unit(B, T, N, H, K),
            v=normal(B, T, N, H, V),
            beta=2 * fraction(B, T, N, H),
            log_decay=decay(B, T, H),
        ),
        lambda **inputs: delta_product_scan(**inputs, **SCAN),
    ),
    "fla dplr (RWKV-7)": (
        WRITES
        | dict(
            log_decay=-0.6065 * fraction(B, T, H, K),
            removal_key=unit(B, T, H, K),
            rate=fraction(B, T, H, K),
        ),
        lambda **inputs: rwkv7_scan(**inputs, scale=K**-0.5, **SCAN),
    ),
}

# --- layers

RWKV = RWKV7(RWKV7Config(num_heads=4, head_dim=4, decay_rank=3, rate_rank=2, value_rank=2))
LAYERS = {
    "transformers Gated DeltaNet": DeltaAttention(
        DeltaAttentionConfig(num_heads=4, num_key_heads=2, key_dim=6, value_dim=5), 1e-5, 0.4
    ),
    "transformers Kimi Delta Attention": DeltaAttention(
        DeltaAttentionConfig(
            num_heads=3,
            key_dim=6,
            value_dim=6,
            decay="vector",
            decay_rank=6,
            output_gate="sigmoid",
            output_gate_rank=6,
        ),
        1e-5,
        0.4,
    ),
    "transformers Mamba-2": Mamba2(
        Mamba2Config(
            num_heads=4,
            head_dim=8,
            state_dim=5,
            num_groups=2,
            min_step_size=0.02,
            max_step_size=0.2,
        ),
        1e-5,
        0.4,
    ),
    "rwkv time mixing, first layer": RWKV,
    "rwkv time mixing, later layer": RWKV,
    "rwkv channel mixing": RWKV7ChannelMix(RWKV7ChannelMixConfig(hidden=24)),
}
INFO = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)))


def flat(tree):
    """Parameters by path: "value/kernel"."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        found["/".join(key.key for key in path)] = leaf
    return found


def layer_inputs(case):
    """The layer's parameters, away from their starts, and its input."""
    params = LAYERS[case].init(jax.random.key(0), jnp.zeros((1, 2, M)))["params"]
    inputs = {name: np.asarray(p) + 0.3 * normal(*p.shape) for name, p in flat(params).items()}
    inputs["x"] = normal(B, T, M)
    if case == "rwkv time mixing, later layer":
        inputs["first_values"] = normal(B, T, M)
    return {name: np.asarray(a, np.float32) for name, a in inputs.items()}


def layer_output(case, inputs):
    """The layer, of the inputs by name."""
    inputs = dict(inputs)
    x = inputs.pop("x")
    info = INFO
    if "first_values" in inputs:
        depth = Depth(index=1, first_values=inputs.pop("first_values"))
        info = TokenInfo(INFO.positions, depth=depth)
    params = {}
    for path, leaf in inputs.items():
        *above, last = path.split("/")
        place = params
        for key in above:
            place = place.setdefault(key, {})
        place[last] = leaf
    return LAYERS[case].apply({"params": params}, x, info)


@pytest.fixture(scope="module")
def given():
    cases = {}
    for case, (inputs, _) in FUNCTIONS.items():
        weights = dict(weight=normal(B, T, H, V), state_weight=normal(B, H, K, V))
        cases[case] = inputs | weights
    for case in LAYERS:
        cases[case] = layer_inputs(case) | dict(weight=normal(B, T, M))
    return cases


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    arrays = {f"{case}/{name}": a for case, inputs in given.items() for name, a in inputs.items()}
    np.savez(folder / "in.npz", **arrays)
    script = Path(__file__).with_name("recurrent_peers.py")
    command = [PYTHON, script, folder / "in.npz", folder / "out.npz"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


@pytest.mark.parametrize("case", [*FUNCTIONS, *LAYERS])
def test_equals_the_peer(case, given, theirs):
    inputs = dict(given[case])
    weights = [inputs.pop(name) for name in ("weight", "state_weight") if name in inputs]

    def loss(inputs):
        if case in FUNCTIONS:
            outputs = FUNCTIONS[case][1](**inputs)
        else:
            outputs = [layer_output(case, inputs)]
        total = sum(jnp.sum(y * weight) for y, weight in zip(outputs, weights))
        return total, outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    for name, y in zip(("o", "state"), outputs):
        assert rel_rms(y, theirs[f"{case}/{name}"]) < 1e-5, name
    for name, gradient in gradients.items():
        expected = theirs[f"{case}/d {name}"]
        if expected.ndim == 0:
            assert not np.any(gradient), name
            continue
        # No larger than rounding where a parameter hardly matters.
        assert rel_rms(gradient, expected) < 5e-5, name
