"""transformers' blocks of Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss and Nemotron-3 with the same
weights: values and gradients.

Skipped where torch and transformers are not: `pip install -e '.[oracles]'`, or name an interpreter
that has them in GATEDJAX_PEERS_PYTHON.
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

from gatedjax.config import RouterConfig, SparseMoEConfig
from gatedjax.layers.moe.losses import weight_here
from gatedjax.layers.moe.sparse import SparseMoE

HAS_PEERS = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
PYTHON = os.environ.get("GATEDJAX_PEERS_PYTHON") or (sys.executable if HAS_PEERS else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="neither torch and transformers, nor GATEDJAX_PEERS_PYTHON"
)

E, M, F, L = 8, 16, 12, 6
V3 = dict(
    scoring="sigmoid",
    selection="grouped_topk",
    num_groups=4,
    kept_groups=2,
    scale=2.5,
    bias_rule="sign",
)
MODELS = {
    "mixtral": {},
    "qwen3": {},
    "qwen3_unnormalized": dict(router=RouterConfig(renormalize=False)),
    "deepseek_v3": dict(
        experts_per_token=3, shared_hidden=F, shared_gate=False, router=RouterConfig(**V3)
    ),
    "gpt_oss": dict(
        activation="clamped_swiglu",
        swiglu_limit=0.1,
        bias=True,
        router=RouterConfig(weighting="selected", affine=True),
    ),
    "nemotron_h": dict(
        experts_per_token=3,
        gated=False,
        activation="relu_squared",
        latent=L,
        shared_hidden=F,
        shared_gate=False,
        router=RouterConfig(scoring="sigmoid", scale=2.5, bias_rule="sign"),
    ),
}


@pytest.fixture(scope="module")
def given():
    normal = np.random.default_rng(0).normal
    shapes = dict(
        x=(2, 20, M),
        weight=(2, 20, M),
        router=(M, E),
        gate=(E, M, F),
        up=(E, M, F),
        down=(E, F, M),
        bias=(E,),
        gate_bias=(E, F),
        up_bias=(E, F),
        down_bias=(E, M),
        latent_down=(M, L),
        latent_up=(L, M),
        low_up=(E, L, F),
        low_down=(E, F, L),
    )
    shared = dict(shared_gate=(M, F), shared_up=(M, F), shared_down=(F, M))
    return {
        name: 0.3 * normal(size=shape).astype(np.float32)
        for name, shape in (shapes | shared).items()
    }


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    np.savez(folder / "in.npz", **given)
    script = Path(__file__).with_name("moe_peers.py")
    command = [PYTHON, script, folder / "in.npz", folder / "out.npz"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name, given, theirs):
    config = SparseMoEConfig(**dict(num_experts=E, hidden=F) | MODELS[name])
    matrices = ("gate", "up", "down")
    params = {"router": {"kernel": given["router"]}} | {k: given[k] for k in matrices}
    if config.shared_hidden:
        params["shared"] = {k: {"kernel": given[f"shared_{k}"]} for k in matrices}
        params["router_state"] = {"bias": given["bias"]}
    if config.bias:
        params["router_bias"] = given["bias"]
        params |= {f"{k}_bias": given[f"{k}_bias"] for k in matrices}
    if config.latent:
        params |= {f"latent_{k}": {"kernel": given[f"latent_{k}"]} for k in ("down", "up")}
        params |= {k: given[f"low_{k}"] for k in ("up", "down")}
    module = SparseMoE(config, 0.3, jnp.float32)

    def loss(p, x):
        y, statistics, _ = module.apply({"params": p}, x, method="with_statistics")
        return jnp.sum(y * given["weight"]), (y, statistics)

    (dp, dx), (y, statistics) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        params, given["x"]
    )
    ours = {"y": y, "x": dx, "router": dp["router"]["kernel"], "down": dp["down"]}
    for key, value in ours.items():
        assert rel_rms(value, theirs[f"{name}.{key}"]) < 1e-5, key
    if name == "mixtral":
        load = statistics["counts"] / statistics["counts"].sum()
        balance = E * jnp.sum(load * statistics["probability"])
        assert float(theirs["balance_loss"]) == pytest.approx(
            weight_here("huggingface", 1.0, E, 2) * float(balance), rel=1e-5
        )
