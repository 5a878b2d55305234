"""From a configuration to all that a step needs besides data: mesh, optimizer, the state's shape and placement."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gatedjax import sharding
from gatedjax.config import Config
from gatedjax.errors import InputError
from gatedjax.layers.moe import state as router_state
from gatedjax.training.flops import train_flops_per_token
from gatedjax.training.optim import make_optimizer
from gatedjax.training.step import TrainState, init_params, init_state, param_axes

# A vocabulary that the tensor axis divides; the entries past the tokenizer's are never targets.
VOCAB_MULTIPLE = 32


class Run(NamedTuple):
    """A configuration, made concrete on the devices at hand. `abstract`: the state's shapes, dtypes and shardings."""

    config: Config
    mesh: Mesh
    tx: optax.GradientTransformation
    abstract: TrainState

    @property
    def shardings(self):
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def with_vocab(config: Config, tokenizer) -> Config:
    """The configuration with `model.vocab_size` settled: the tokenizer's, rounded up, if it was 0.

    Raises:
      InputError: a given size is too small for the tokenizer.
    """
    size = config.model.vocab_size or -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if size < tokenizer.vocab_size:
        raise InputError(
            f"config.model.vocab_size: got {size}, expected at least the {tokenizer.vocab_size} entries of the "
            f"tokenizer {config.data.tokenizer!r}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def prepare(config: Config, devices: Sequence[jax.Device] | None = None) -> Run:
    """Mesh (over all devices, or those given), optimizer and the placement of the state. Allocates nothing.

    Raises:
      InputError: the mesh does not divide the devices, the batch or a parameter.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    boxed = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    sharding.check_divides(mesh, boxed)
    trained, _ = router_state.split(boxed)
    tx = make_optimizer(config.optim, config.train.steps, param_axes(trained))
    shapes = jax.eval_shape(lambda key: init_state(config, tx, key), jax.random.key(0))
    params = sharding.param_shardings(mesh, trained)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=replicated,
        params=params,
        opt_state=sharding.optimizer_shardings(mesh, shapes.opt_state, shapes.params, params),
        ema=params if config.optim.ema_decay else None,
        guard=jax.tree.map(lambda _: replicated, shapes.guard),
        routers=jax.tree.map(lambda _: replicated, shapes.routers),
    )
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return Run(config, mesh, tx, placed)


def describe(run: Run) -> str:
    """One line: devices, mesh, parameters, FLOPs."""
    c, devices = run.config, run.mesh.devices.flat
    count = sum(p.size for p in jax.tree.leaves(run.abstract.params))
    flops = train_flops_per_token(c.model, c.data.seq_len)
    mesh = (
        " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
        or "one device"
    )
    across = sharding.across_slices(run.mesh.shape, list(devices))
    slices = "".join(f", {n} slices along {axis}" for axis, n in across.items() if n > 1)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{len(devices)} {devices[0].device_kind} device(s){processes}, mesh {mesh}{slices}; jax {jax.__version__}; "
        f"{count / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per token of training"
    )


def fresh_state(run: Run) -> TrainState:
    """The state before the first step, made in place: no device ever holds more than its shards."""
    make = jax.jit(lambda key: init_state(run.config, run.tx, key), out_shardings=run.shardings)
    return make(jax.random.key(run.config.train.seed))
