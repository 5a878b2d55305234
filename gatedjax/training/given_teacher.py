"""The teacher of a run out of the checkpoint of another one: `train.teacher.run`."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
from jax.sharding import NamedSharding

from gatedjax.config import (
    Config,
    GatedAttentionConfig,
    GatedMemoryConfig,
    MixerConfig,
    ModelConfig,
    OptimConfig,
    TeacherConfig,
    from_config_dict,
)
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, require
from gatedjax.layers import MIXERS
from gatedjax.layers.tree import unflatten_dict
from gatedjax.paths import expand_place
from gatedjax.training import given_weights
from gatedjax.training.checkpoint import read_config
from gatedjax.training.run import Run, prepare
from gatedjax.training.step_folders import named_step
from gatedjax.training.teacher import Teacher, compared_layers

KEY = "config.train.teacher.run"
# Mixers that see the values of the first of them.
_SHARE_VALUES = {kind for kind, module in MIXERS.items() if module.shares_values}


def load(
    run: Run,
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
) -> Teacher | None:
    """The teacher that the configuration names, on the run's mesh; None where it names none.

    Args:
      run: that learns from it.
      tokenizer: of its text; None for a task without text.
      report: called with a line that says which teacher it is.

    Raises:
      InputError: no checkpoint there, or one of another vocabulary, tokenizer or shape.
    """
    of_teacher = _run_of_teacher(run)
    if of_teacher is None:
        return None
    with _of_this_key():
        weights = given_weights.find(of_teacher, tokenizer, lambda line: None)
        assert weights is not None
        with jax.set_mesh(run.mesh):
            by_path = given_weights.read(of_teacher, weights)
    report(f"teacher: step {weights.step} of {weights.run_dir}")
    return Teacher(unflatten_dict(by_path), of_teacher.config.model)


def with_teacher(run: Run) -> Run:
    """The run with the shapes and shardings of the teacher that its configuration names, if any."""
    of_teacher = _run_of_teacher(run)
    if of_teacher is None:
        return run
    shapes = given_weights.parameters(of_teacher)
    return run._replace(teacher=Teacher(unflatten_dict(shapes), of_teacher.config.model))


def _run_of_teacher(run: Run) -> Run | None:
    """The teacher's own run on the same devices, of which nothing is allocated."""
    name = run.config.train.teacher.run
    if not name:
        return None
    with _of_this_key():
        run_dir, step = named_step(expand_place(name, KEY))
        try:
            saved = from_config_dict({**read_config(run_dir, step), "mesh": {}})
        except InputError as error:
            raise InputError(f"{KEY}: {error}") from None
    require_fits(run.config, saved.model)
    settings = with_model(run.config, saved.model)
    train = dataclasses.replace(settings.train, init_from=name)
    config = dataclasses.replace(settings, train=train)
    prepared = prepare(config, list(run.mesh.devices.flat))

    def on_this_mesh(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert isinstance(x.sharding, NamedSharding)
        # The same axes; of the same devices in the same order, whatever they were given in.
        placed = NamedSharding(run.mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    abstract_state = jax.tree.map(on_this_mesh, prepared.abstract)
    return prepared._replace(mesh=run.mesh, abstract=abstract_state)


def with_model(config: Config, model: ModelConfig) -> Config:
    """A configuration that runs another model, which starts from nothing and has no teacher."""
    train = dataclasses.replace(
        config.train,
        init_from="",
        init_rename=(),
        init_fresh=(),
        teacher=TeacherConfig(),
    )
    return dataclasses.replace(
        config,
        model=model,
        optim=OptimConfig(warmup_steps=0),
        train=train,
    )


def require_fits(config: Config, teacher: ModelConfig) -> None:
    """InputError unless a run can learn from a teacher.

    Args:
      config: of the run.
      teacher: the teacher's model.
    """
    model = config.model
    require(
        teacher.vocab_size == model.vocab_size,
        KEY,
        f"a vocabulary of {teacher.vocab_size}",
        f"that of this model, {model.vocab_size}",
    )
    for of_model, whose in ((model, "this model"), (teacher, "the teacher")):
        expected = f"'lm' in {whose}, with a teacher"
        require(of_model.task == "lm", "config.model.task", of_model.task, expected)
        kind = of_model.output.kind
        expected = f"'softmax' in {whose}, with a teacher"
        require(kind == "softmax", "config.model.output.kind", kind, expected)
    if not config.train.teacher.mse:
        return
    for name in ("num_layers", "width"):
        value = getattr(teacher, name)
        own = getattr(model, name)
        require(value == own, KEY, f"{name} {value}", f"{own}, as in this model, with mse")
    key = "config.train.teacher.mse"
    require(model.lora.rank == 0, key, "low-rank updates (model.lora)", "none")
    for layer in compared_layers(model, teacher):
        for mixer in (model.layer(layer)[0], teacher.layer(layer)[0]):
            reason = _not_alone(mixer)
            require(reason is None, key, f"{reason} in layer {layer}", "layers that work alone")
    if config.train.teacher.activation == "heads_output":
        for layer in compared_layers(model, teacher):
            shapes = [_heads(m.layer(layer)[0]) for m in (model, teacher)]
            is_same = shapes[0] is not None and shapes[0] == shapes[1]
            key = "config.train.teacher.activation"
            expected = f"mixer_output: layer {layer} has no heads like the teacher's"
            require(is_same, key, "heads_output", expected)


def _not_alone(mixer: MixerConfig) -> str | None:
    """Why the mixer cannot be computed without the layers before it, or None."""
    if mixer.kind in _SHARE_VALUES:
        return f"values of another layer ({mixer.kind})"
    if isinstance(mixer, GatedMemoryConfig):
        return "memory of another layer"
    for name in ("shares_weights", "shares_cache", "value_bank"):
        if getattr(mixer, name, False):
            return name
    if getattr(mixer, "decay_floor", "none") != "none":
        return "decay_floor by depth"
    return None


def _heads(mixer: MixerConfig) -> tuple[int, int] | None:
    """Heads and channels of what comes before the output matrix, where that is recorded."""
    if isinstance(mixer, GatedAttentionConfig):
        return mixer.num_heads, mixer.head_dim
    return None


@contextlib.contextmanager
def _of_this_key() -> Iterator[None]:
    """What is wrong with the checkpoint is wrong with the key that names the teacher."""
    try:
        yield
    except InputError as error:
        raise type(error)(str(error).replace(given_weights.KEY, KEY)) from None
