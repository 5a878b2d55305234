"""Every mesh over eight devices gives the same losses, spreads the state as the rules say, and
moves no array whole.

One process: what several change (which rows each reads, what they save) is tested with real ones.
"""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from gatedjax.aot.step import abstract_batch
from gatedjax.config import MeshConfig, from_config_dict, layer
from gatedjax.data import Batch
from gatedjax.sharding import AXES, RULES, across_slices, global_batch, make_mesh, my_rows
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.state import init_params, param_axes
from gatedjax.training.step import jit_train_step

# between any two meshes, of the loss and of the gradient's norm: float32 sums in another order
TOLERANCE = 2e-5
STEPS, ROWS, LENGTH = 3, 8, 32
ALL = [
    shape for shape in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if math.prod(shape) == 8
]
FEW = [(2, 4, 1, 1, 1), (1, 2, 2, 1, 2)]


def config(shape):
    """Eight of everything, so that each axis divides it: heads, hidden units, experts, vocabulary,
    tokens.

    One layer: it compiles 35 times. `test_sharding.py` has linear attention on five of these
    meshes.
    """
    return from_config_dict(
        {
            "model": {
                "vocab_size": 64,
                "width": 32,
                "num_layers": 1,
                "mixers": {
                    "attention": layer("gated_attention", num_heads=8, num_kv_heads=8, head_dim=8)
                },
                "ffns": {"mlp": layer("sparse_moe", num_experts=8, hidden=32, shared_hidden=32)},
                "init_std": 0.05,
                "dtype": "float32",
            },
            "data": {"seq_len": LENGTH},
            "optim": {"warmup_steps": 1},
            "train": {"batch_size": ROWS, "steps": 10},
            "mesh": dict(zip(AXES, shape)),
        }
    )


def batch_of(seed: int) -> Batch:
    """Two documents a row, a pattern to learn, some targets masked."""
    rng = np.random.default_rng(seed)
    tokens = ((rng.integers(0, 7, (ROWS, 1)) + 3 * np.arange(LENGTH + 1)) % 64).astype(np.int32)
    place, cut = np.arange(LENGTH)[None], rng.integers(5, LENGTH - 5, (ROWS, 1))
    mask = ((place != cut - 1) & (rng.random((ROWS, LENGTH)) < 0.9)).astype(np.float32)
    segments, positions = np.where(place < cut, 1, 2), np.where(place < cut, place, place - cut)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], segments.astype(np.int32), positions.astype(np.int32), mask
    )


@functools.cache
def first_state():
    """On one device, in host memory: every mesh starts from it."""
    return jax.device_get(fresh_state(prepare(config((1,) * len(AXES)), jax.devices()[:1])))


def compiled(shape):
    run = prepare(config(shape))
    with jax.set_mesh(run.mesh):
        step = jit_train_step(run.config, run.tx, run.shardings)
        return run, step.lower(run.abstract, abstract_batch(run)).compile()


def losses(run, step) -> list[float]:
    log, state = [], jax.device_put(first_state(), run.shardings)
    check_bytes(run, state)
    for i in range(STEPS):
        state, metrics = step(state, global_batch(run.mesh, batch_of(i), ROWS))
        log += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return log


def check_bytes(run, state) -> None:
    """Each device holds what the rules leave it of each parameter, and as much of its optimizer
    state.
    """
    rules = dict(RULES)
    boxed = jax.eval_shape(lambda key: init_params(run.config.model, key), jax.random.key(0))
    is_names = lambda x: isinstance(x, tuple)
    names = jax.tree.leaves(param_axes(boxed), is_leaf=is_names)
    local_bytes = total = 0
    for leaf, axes in zip(jax.tree.leaves(state.params), names):
        cut = {a for name in axes if name for a in np.atleast_1d(rules[name]) if a}
        local_bytes += leaf.nbytes // math.prod(run.mesh.shape[a] for a in cut)
        total += leaf.nbytes
    scalars = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim == 0)
    for device in jax.devices():
        assert held(state.params, device) == local_bytes
        assert held(state.opt_state, device) == 2 * local_bytes + scalars, (
            "AdamW's moments lie where their parameters lie"
        )
    if run.mesh.shape["fsdp"] == 8:
        assert local_bytes < 1.05 * total / 8, "all but norms and biases is cut in eight"


def held(tree, device) -> int:
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


def check_pairs(shapes, capfd) -> None:
    # Compiled two at a time, run one after another: programs on the same devices would wait for
    # each other.
    with ThreadPoolExecutor(2) as pool:
        found = {shape: losses(*ready) for shape, ready in zip(shapes, pool.map(compiled, shapes))}
    for a, b in itertools.combinations(found, 2):
        np.testing.assert_allclose(
            found[a], found[b], rtol=TOLERANCE, err_msg=f"{AXES}: {a} and {b}"
        )
    # XLA's partitioner says "Involuntary full rematerialization" when it replicates an array to
    # move it.
    assert "rematerialization" not in capfd.readouterr().err.lower()


@pytest.mark.slow
def test_two_products_give_the_same_losses(capfd):
    check_pairs(FEW, capfd)


@pytest.mark.slow
def test_every_pair_of_meshes_gives_the_same_losses(capfd):
    assert len(ALL) == 35
    check_pairs(ALL, capfd)


# ---- who reads which rows
# -------------------------------------------------------------------------------------------


class Device:
    """A device of a slice that is not here."""

    def __init__(self, slice_index):
        self.slice_index = slice_index


@pytest.mark.parametrize(
    ("slices", "mesh", "expected"),
    [
        (1, dict(data=4, fsdp=2), {}),
        (2, dict(data=4, fsdp=2), {"data": 2}),
        (4, dict(data=2, fsdp=4), {"data": 2, "fsdp": 2}),
        (2, dict(data=1, fsdp=8), {"fsdp": 2}),
        (2, dict(expert=2, tensor=4), {"expert": 2}),
        (2, dict(tensor=8), {"tensor": 2}),
    ],
)
def test_slices_are_joined_along_the_axes_that_talk_least(slices, mesh, expected):
    shape = dict.fromkeys(AXES, 1) | mesh
    devices = [Device(i * slices // 8) for i in range(8)]
    assert {axis: n for axis, n in across_slices(shape, devices).items() if n > 1} == expected


def test_hosts_of_a_pod_hold_squares_of_chips_and_read_scattered_rows():
    """Rows go over a TPU slice by lines, hosts own squares of it: their rows are theirs, not a
    range.
    """
    pytest.importorskip("libtpu")
    from gatedjax.aot import parse_slice, slice_devices

    mesh = make_mesh(MeshConfig(), slice_devices(parse_slice("v5e:4x4")))
    processes = sorted({d.process_index for d in mesh.devices.flat})
    rows = [my_rows(mesh, 32, process) for process in processes]
    assert len(processes) == 4 and sorted(itertools.chain(*rows)) == list(range(32))
    assert any(r != tuple(range(r[0], r[-1] + 1)) for r in rows), rows


def test_tensor_and_context_peers_hold_the_same_rows():
    for shape in (dict(tensor=8), dict(context=4, tensor=2)):
        assert my_rows(make_mesh(MeshConfig(**shape)), 8) == tuple(range(8))
