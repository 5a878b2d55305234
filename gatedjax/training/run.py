"""From a configuration to all that a step needs besides data: mesh, optimizer, placed state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gatedjax import sharding
from gatedjax.compiler_options import quick_on_cpus
from gatedjax.config import Config
from gatedjax.data import image_corpora, mask_id
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import require
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.tree import Path, divided, flatten_dict
from gatedjax.training import trainable
from gatedjax.training.flops import (
    frozen_flops_per_token,
    low_rank_flops_per_token,
    teacher_flops_per_token,
    train_flops_per_token,
)
from gatedjax.training.optim import make_optimizer
from gatedjax.training.optim_growth import growing
from gatedjax.training.state import TrainState, init_state, param_axes, traced_params
from gatedjax.training.teacher import Teacher, compared_layers

# A vocabulary that the tensor axis divides; the entries past the tokenizer's are never targets.
VOCAB_MULTIPLE = 32


class Run(NamedTuple):
    """A configuration, made concrete on the devices at hand.

    tx: the optimizer.
    abstract: the state's shapes, dtypes and shardings.
    teacher: that it learns from, as shapes; None for none (`given_teacher.with_teacher`).
    """

    config: Config
    mesh: Mesh
    tx: optax.GradientTransformation
    abstract: TrainState
    teacher: Teacher | None = None

    @property
    def shardings(self) -> PyTree:
        """The sharding of each array of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def with_vocab(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with `model.vocab_size` settled: the tokenizer's, rounded up, if it was 0.

    Of a classifier it is the number of classes, not rounded.

    Raises:
      InputError: a given size is too small for the tokenizer.
    """
    size = config.model.vocab_size
    if config.model.task == "classify":
        if size == 0:
            size = max(len(corpus.classes) for corpus in image_corpora(config.data).values())
        return _with_vocab_size(config, size)
    needed = tokenizer.vocab_size
    entries = f"the {needed} entries of the tokenizer {config.data.tokenizer!r}"
    if config.model.task == "masked_lm":
        needed = mask_id(tokenizer) + 1
        entries += " and the mask"
    if size == 0:
        multiples = -(-needed // VOCAB_MULTIPLE)
        size = multiples * VOCAB_MULTIPLE
    require(
        size >= needed,
        "config.model.vocab_size",
        size,
        f"at least {entries}",
    )
    return _with_vocab_size(config, size)


def _with_vocab_size(config: Config, size: int) -> Config:
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model)


def prepare(config: Config, devices: Sequence[jax.Device] | None = None) -> Run:
    """Mesh (over all devices, or those given), optimizer and the placement of the state.

    Allocates nothing.

    Raises:
      InputError: the mesh does not divide the devices, the batch or a parameter; a pattern of
        parameter names holds for none.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    make_params = functools.partial(traced_params, config.model)
    boxed_params = _shapes(mesh, make_params)
    sharding.check_divides(mesh, boxed_params)
    params, _ = router_state.split(boxed_params)
    trainable.require_names(config, params)
    trained, _ = trainable.split(config, params)
    axes = param_axes(trained)
    tx = make_optimizer(
        config.optim,
        config.train.steps,
        axes,
        width=config.model.width,
        batch_size=config.train.batch_size,
    )
    if config.train.grow_batches:
        tx = growing(tx)
    make_state = functools.partial(init_state, config, tx)
    shapes = _shapes(mesh, make_state)
    shardings = _state_shardings(mesh, params, shapes)
    abstract = jax.tree.map(_placed, shapes, shardings)
    return Run(config, mesh, tx, abstract)


def _shapes(mesh: Mesh, make: Callable[[Array], PyTree]) -> PyTree:
    """Those of `make(key)`, traced as the run's programs are, which find it traced."""
    with jax.set_mesh(mesh):
        # The devices may be absent: no key is made.
        dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.eval_shape(make, jax.ShapeDtypeStruct((), dtype, sharding=everywhere))


def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _state_shardings(mesh: Mesh, boxed_params: PyTree, shapes: TrainState) -> TrainState:
    """For each array of the state its sharding."""
    # Any: the result has the state's structure, with a sharding in the place of each array.
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    params = sharding.param_shardings(mesh, boxed_params)
    opt_state = sharding.optimizer_shardings(mesh, shapes.opt_state, shapes.params, params)
    ema: Any = None
    if shapes.ema is not None:
        averaged = flatten_dict(shapes.ema)
        ema, _ = divided(params, averaged.__contains__)
    return dataclasses.replace(
        shapes,
        step=replicated,
        params=params,
        opt_state=opt_state,
        ema=ema,
        guard=jax.tree.map(lambda _: replicated, shapes.guard),
        routers=jax.tree.map(lambda _: replicated, shapes.routers),
    )


def flops_per_token(run: Run) -> float:
    """FLOPs of a train step per token, of this run's parameters and its teacher's (`flops.py`)."""
    config = run.config
    _, frozen = trainable.split(config, run.abstract.params)
    whole = train_flops_per_token(config.model, config.data.seq_len)
    updates = 3.0 * low_rank_flops_per_token(run.abstract.params)
    of_model = whole + updates - frozen_flops_per_token(config.model, frozen)
    return of_model + flops_of_teacher(run)


def flops_of_teacher(run: Run) -> float:
    """Those of a train step per token that a teacher adds; 0 without one."""
    if run.teacher is None:
        return 0.0
    model = run.config.model
    settings = run.config.train.teacher
    layers = compared_layers(model, run.teacher.model) if settings.mse else []
    return teacher_flops_per_token(
        model,
        run.teacher.model,
        run.config.data.seq_len,
        with_logits=settings.kl > 0,
        layers=layers,
    )


def describe(run: Run) -> str:
    """A line: devices, mesh, parameters, FLOPs; one of a teacher, one of a mesh that is unwise."""
    trained, frozen = trainable.split(run.config, run.abstract.params)
    size = _size(trained)
    what = f"{size / 1e6:.2f}M parameters"
    if frozen:
        all_sizes = size + _size(frozen)
        what = f"{all_sizes / 1e6:.2f}M parameters, {size / 1e6:.2f}M of which train"
    parts = [
        _devices_text(run.mesh),
        f"jax {jax.__version__}",
        f"{what}, {flops_per_token(run) / 1e6:.1f} MFLOP per token of training",
    ]
    lines = ["; ".join(parts)]
    if run.teacher is not None:
        count = f"{_size(run.teacher.params) / 1e6:.2f}M parameters"
        passes = "its forward pass"
        if run.config.train.teacher.mse:
            passes += " and the layers that are compared with it"
        lines.append(
            f"teacher: {count} without gradients or optimizer state; "
            f"{flops_of_teacher(run) / 1e6:.1f} of these MFLOP are {passes}"
        )
    warning = sharding.narrow_shards(run.config.model.width, run.mesh.shape)
    if warning is not None and run.mesh.devices.flat[0].platform == "tpu":
        lines.append(f"warning: {warning}")
    return "\n".join(lines)


def _size(params: PyTree) -> int:
    return sum(p.size for p in jax.tree.leaves(params))


def _devices_text(mesh: Mesh) -> str:
    devices = list(mesh.devices.flat)
    text = f"{len(devices)} {devices[0].device_kind} device(s)"
    if jax.process_count() > 1:
        text += f" of {jax.process_count()} processes"
    axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    text += f", mesh {' x '.join(axes) or 'one device'}"
    for axis, slices in sharding.across_slices(mesh.shape, devices).items():
        if slices > 1:
            text += f", {slices} slices along {axis}"
    return text


def fresh_state(
    run: Run,
    given: Mapping[Path, Array] | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> TrainState:
    """The state before the first step, made in place: no device holds more than its shards.

    Args:
      run: of which it is the state.
      given: parameters that are not made here, by path, placed as the run has them. Their memory is
        taken over.
      meanwhile: is called while the program that makes it is compiled, such as to compile another.
    """
    key = jax.random.key(run.config.train.seed)
    given = given or {}
    paths = list(given)

    def make_state(key: Array, given: list[Array]) -> TrainState:
        of_path = dict(zip(paths, given))
        return init_state(run.config, run.tx, key, of_path)

    make = jax.jit(
        make_state,
        out_shardings=run.shardings,
        donate_argnums=1,
        compiler_options=quick_on_cpus(run.mesh) or None,
    )
    arguments = (key, list(given.values()))
    if meanwhile is None:
        return make(*arguments)
    # Traced before, not beside: what traces leave is one for all threads (`dispatch.choices`).
    lowered = make.lower(*arguments)
    # XLA compiles without Python's lock.
    with ThreadPoolExecutor(1) as beside:
        compiled = beside.submit(lowered.compile)
        meanwhile()
    return compiled.result()(*arguments)
