"""8 devices = 1 device, on every kind of mesh; parameters are spread as the rules say; bad meshes
are named.
"""

import ast
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import slow
from tiny_run import ROOT, run_steps, tiny

from gatedjax.config import MeshConfig
from gatedjax.errors import InputError
from gatedjax.model import LanguageModel, init_caches
from gatedjax.sharding import AXES, make_mesh, my_rows, narrow_shards
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.state import init_params

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "data x fsdp x tensor": dict(data=2, fsdp=2, tensor=2),
    "expert x tensor": dict(expert=4, tensor=2),
    "context x fsdp": dict(context=2, fsdp=4),
}


def losses(mesh: dict, devices=None):
    _, _, log = run_steps(tiny(**{f"mesh__{k}": v for k, v in mesh.items()}), 3, devices=devices)
    return [[m["loss"], m["grad_norm"], m["balance_loss"]] for m in log]


@pytest.fixture(scope="module")
def alone():
    """One device of the eight; train.py always takes them all."""
    return losses({}, jax.devices()[:1])


@pytest.mark.parametrize(
    "name",
    [name if name == "expert x tensor" else slow(name) for name in MESHES],
)
def test_eight_devices_equal_one(name, alone, capfd):
    for sharded, single in zip(losses(MESHES[name]), alone):
        assert sharded == pytest.approx(single, rel=1e-4)
    # XLA's partitioner says "Involuntary full rematerialization" when it replicates an array to
    # move it.
    assert "rematerialization" not in capfd.readouterr().err.lower()


def test_state_is_spread_as_the_rules_say():
    run = prepare(tiny(mesh__fsdp=4, mesh__tensor=2))
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
    kernel = state.params["periods"]["layer_1"]["mixer"]["query"][
        "kernel"
    ]  # [layers, embed, heads, head_dim]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    momentum = state.opt_state[1][0].mu["periods"]["layer_1"]["mixer"]["query"]["kernel"]
    assert momentum.sharding == kernel.sharding
    spread = sum(p.addressable_shards[0].data.size for p in jax.tree.leaves(state.params))
    assert spread < 0.2 * sum(p.size for p in jax.tree.leaves(state.params)), (
        "most parameters should be cut in 8"
    )


def test_a_row_that_no_axis_cuts_has_a_state_on_any_mesh():
    """A sample at the end of a run: its state was said to vary over mesh axes of one device."""
    model = tiny(model__pattern=("gla",)).model
    tokens = jnp.zeros((1, 5), jnp.int32)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))

    def prefill(params):
        return LanguageModel(model).apply(
            {"params": params}, tokens, caches=init_caches(model, 1, 8)
        )[0]

    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        assert jax.eval_shape(prefill, nn.meta.unbox(params)).shape == (1, 5, model.width)


def test_rows_come_from_the_sharding():
    assert my_rows(make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)), 8) == tuple(range(8))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mesh__fsdp=3), r"config.mesh: .*fsdp=3.* does not divide the 8 device"),
        (dict(mesh__data=4), r"data=4.* does not divide the 8 device"),
        (
            dict(mesh__tensor=8),
            r"'?tensor'? = 8 does not divide an axis of 4 of parameter periods.layer_0.mixer",
        ),
    ],
)
def test_bad_mesh_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        prepare(tiny(**changes))


def test_batch_that_does_not_divide_is_named():
    with pytest.raises(
        InputError, match="batch_size: got 6, expected a multiple of data x fsdp x expert = 8"
    ):
        my_rows(make_mesh(MeshConfig()), 6)


@pytest.mark.parametrize(
    "width, fsdp, context, better",
    [
        (2048, 64, 1, "--config.mesh.fsdp=16 --config.mesh.data=8"),
        (2048, 16, 2, "--config.mesh.fsdp=8 --config.mesh.data=4"),
        (2048, 16, 1, None),
        (64, 1, 8, None),  # no other fsdp would help
        (64, 4, 1, "--config.mesh.fsdp=1 --config.mesh.data=8"),
    ],
)
def test_shards_that_are_too_narrow_for_a_tpu(width, fsdp, context, better):
    shape = dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": fsdp, "context": context}
    warning = narrow_shards(width, shape)
    assert warning is None if better is None else warning.endswith(f"{better} sends less")


def test_mesh_axes_are_named_in_one_file():
    """ "data" and "expert" are words of other meanings too; the other three are not."""
    names = set(AXES) - {"data", "expert"}
    found = set()
    for path in (ROOT / "gatedjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"gatedjax/sharding.py"}
    sizes = {field.name for field in dataclasses.fields(MeshConfig) if field.type is not bool}
    assert set(AXES) == sizes
