"""Experts over eight devices: every way of exchange gives what one device gives, drops included."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import MeshConfig, RouterConfig, SparseMoEConfig
from gatedjax.layer_stack import remat_policy
from gatedjax.layers.moe.exchange_ragged import experts_of_received, rows_of_room
from gatedjax.layers.moe.sparse import SparseMoE
from gatedjax.layers.parameters import boxed_parameters
from gatedjax.sharding import RULES, make_mesh, param_shardings

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12, 16)).astype(np.float32))
WEIGHT = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
# Experts of which some cost nothing, unequal loads, two that nobody chooses.
CONFIG = SparseMoEConfig(
    num_experts=8,
    copy_experts=1,
    experts_per_token=3,
    hidden=8,
    router=RouterConfig(scoring="sigmoid", affine=True, renormalize=False),
)
MESHES = {
    "expert 8": dict(expert=8),
    "data x expert x tensor": dict(data=2, expert=2, tensor=2),
    "fsdp x expert": dict(fsdp=2, expert=4),
    "context x expert": dict(context=2, expert=2, data=2),
}


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all`, which CPUs do not have: everybody gets everything and picks out what
    is sent to it.
    """
    gather = lambda a: jax.lax.all_gather(a, axis_name)
    me = jax.lax.axis_index(axis_name)
    everything, starts, sizes, places = map(
        gather, (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    for sender in range(everything.shape[0]):
        offset = row - places[sender, me]
        mine = (offset >= 0) & (offset < sizes[sender, me])
        # What the receiver expects must be what the sender sends.
        mine &= sizes[sender, me] == recv_sizes[sender]
        source = jnp.where(mine, starts[sender, me] + offset, 0)
        output = jnp.where(
            mine.reshape(-1, *[1] * (output.ndim - 1)), everything[sender][source], output
        )
    return output


def run(config, mesh: dict, devices=None, x=X):
    """y, statistics and gradients on this mesh, the parameters where the rules put them."""
    module = SparseMoE(config, 0.3, jnp.float32)
    mesh = make_mesh(MeshConfig(**mesh), devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        with boxed_parameters():
            boxed = jax.jit(lambda key: module.init(key, X))(jax.random.key(0))["params"]
        params = jax.device_put(nn.meta.unbox(boxed), param_shardings(mesh, boxed))
        for name in ("gate_bias", "up_bias", "down_bias"):
            if name in params:
                params[name] += 0.1 * np.arange(params[name].shape[0])[:, None] - 0.3
        params["router_bias"] += np.array([2, 1, 0, 0, 0, 1, -30, -30, 1], np.float32)

        def loss(p, x):
            y, statistics, logits = module.apply({"params": p}, x, method="with_statistics")
            return jnp.sum(y * WEIGHT[: x.shape[0]]) + jnp.sum(statistics["probability"] ** 2), (
                y,
                statistics,
                logits,
            )

        return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x))


@pytest.fixture(scope="module")
def alone():
    return run(CONFIG, {}, jax.devices()[:1])


def assert_equal(actual, expected):
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert rel_rms(a, e) < 2e-5, jax.tree_util.keystr(path)


CASES = [
    ("all_to_all", "data x expert x tensor"),
    ("all_to_all", "context x expert"),
    ("ring", "fsdp x expert"),
    *(pytest.param("all_to_all", m, marks=pytest.mark.slow) for m in ("expert 8", "fsdp x expert")),
    pytest.param("ring", "data x expert x tensor", marks=pytest.mark.slow),
    pytest.param("gather_weights", "fsdp x expert", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("exchange, mesh", CASES)
def test_eight_devices_equal_one(exchange, mesh, alone):
    """Values, statistics and gradients of parameters and inputs."""
    assert_equal(run(dataclasses.replace(CONFIG, exchange=exchange), MESHES[mesh]), alone)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather_weights", "all_to_all", "ring"])
def test_biases_are_added_once(exchange):
    """Where devices share an expert's hidden channels, and where tokens go to the experts."""
    config = dataclasses.replace(
        CONFIG,
        bias=True,
        activation="clamped_swiglu",
        swiglu_limit=0.3,
        latent=8,
    )
    single = run(config, {}, jax.devices()[:1])
    mesh = MESHES["data x expert x tensor"]
    assert_equal(run(dataclasses.replace(config, exchange=exchange), mesh), single)


def test_ragged_exchange_equals_one_device(alone, monkeypatch):
    """Its own gathers and offsets, around an emulated collective; CPUs refuse the real one by
    name.
    """
    # Room for everything: of four devices one gets more than twice its fraction here.
    config = dataclasses.replace(CONFIG, exchange="ragged_all_to_all", exchange_factor=4.0)
    with pytest.raises(NotImplementedError, match="'ragged_all_to_all' is not implemented on CPU"):
        run(config, MESHES["fsdp x expert"])
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    monkeypatch.setattr("gatedjax.layers.moe.exchange.target_platform", lambda: "tpu")
    assert_equal(run(config, MESHES["fsdp x expert"]), alone)


def test_a_batch_too_small_to_cut():
    """One row on eight devices: each computes what its own experts contribute; with one device an
    expert, too.
    """
    single = run(CONFIG, {}, jax.devices()[:1], X[:1])
    for mesh in (MESHES["fsdp x expert"], dict(fsdp=8)):
        assert_equal(run(dataclasses.replace(CONFIG, exchange="all_to_all"), mesh, x=X[:1]), single)


@pytest.mark.parametrize(
    "exchange, factor",
    [("all_to_all", 0.5), pytest.param("ragged_all_to_all", 0.3, marks=pytest.mark.slow)],
)
def test_what_the_exchange_drops_is_counted(exchange, factor, alone, monkeypatch):
    """Limited room: the count is that of all devices, beside NumPy; what is dropped contributes
    nothing.
    """
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    monkeypatch.setattr("gatedjax.layers.moe.exchange.target_platform", lambda: "tpu")
    config = dataclasses.replace(CONFIG, exchange=exchange, exchange_factor=factor)
    _, (y, statistics, logits) = run(config, MESHES["fsdp x expert"])
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :3].reshape(8, -1)  # one row a device
    sent = np.array(
        [[np.sum(row // 2 == device) for device in range(4)] for row in chosen]
    )  # two experts a device
    if exchange == "all_to_all":
        lost = np.maximum(sent - 4, 0).sum()  # half of 36 / 4 assignments, rounded down
    else:
        lost = np.maximum(
            sent.reshape(2, 4, 4).sum(1) - 11, 0
        ).sum()  # 0.3 of 36, from four senders
    assert statistics["dropped"] == lost > 10
    np.testing.assert_array_equal(statistics["counts"], alone[1][1]["counts"])
    assert rel_rms(y, alone[1][0]) > 0.05


def test_the_room_of_a_ragged_exchange():
    """Where the configuration does not say: twice an even load, the worst case if that is less."""
    assert rows_of_room(131_072, 2_097_152, factor=0) == 262_144
    assert rows_of_room(100, 150, factor=0) == 150
    assert rows_of_room(100, 1600, factor=16.0) == 1600
    assert rows_of_room(100, 1600, factor=0.3) == 30


def test_the_experts_of_received_rows_follow_from_sizes():
    """Three senders, two experts, an expert without rows, room for less than what was sent."""
    sizes = np.array([[2, 1], [0, 3], [1, 0]])
    expected = [0, 0, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(experts_of_received(sizes, 9), [*expected, 2, 2])
    np.testing.assert_array_equal(experts_of_received(sizes, 5), expected[:5])


def test_no_row_is_sent_twice(monkeypatch):
    """Rows, their weights and results, and the gradients of the three: the backward pass finds the
    rows in memory.
    """
    monkeypatch.setattr("gatedjax.layers.moe.exchange.target_platform", lambda: "tpu")
    module = SparseMoE(dataclasses.replace(CONFIG, exchange="ragged_all_to_all"), 0.3, jnp.float32)
    mesh = make_mesh(MeshConfig(expert=8))

    def loss(params, x, policy):
        apply = jax.checkpoint(
            lambda p, x: module.apply({"params": p}, x, method="with_statistics")[0], policy=policy
        )
        return jnp.sum(apply(params, x) ** 2)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
        for name, expected in {"kernels": 6, "full": 8}.items():
            gradient = jax.grad(functools.partial(loss, policy=remat_policy(name)), argnums=(0, 1))
            text = str(jax.make_jaxpr(gradient)(params, X))
            assert text.count(" ragged_all_to_all[") == expected, name
