"""A run that learns from a frozen second model: the terms of the loss in float64, what the step
keeps and what not, and what is refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import plain, random_batch, replace

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    RADRWKV7Config,
    RWKV7Config,
    TeacherConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers.block import block_layers
from gatedjax.layers.tree import flatten_dict
from gatedjax.sharding import global_batch
from gatedjax.training import given_teacher, memory
from gatedjax.training.conversion import parsed_stage
from gatedjax.training.digests import named_leaves
from gatedjax.training.eval_step import batch_losses
from gatedjax.training.flops import forward_flops_per_token
from gatedjax.training.run import describe, flops_per_token, fresh_state, prepare
from gatedjax.training.step import jit_train_step
from gatedjax.training.teacher import Teacher, compared_layers, divergence

RNG = np.random.default_rng(5)
ROWS, LENGTH, WIDTH, VOCAB = 2, 5, 4, 7


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("chunk", [0, 4])
def test_divergence(chunk):
    """Values and gradients of t^2 KL, weighted; what has no weight may hold anything."""
    hidden, of_teacher = RNG.normal(size=(2, ROWS, LENGTH, WIDTH))
    weights, weights_of_teacher = RNG.normal(size=(2, VOCAB, WIDTH))
    mask = np.array([[1, 0, 0.5, 1, 1], [0, 1, 1, 1, 0]])
    temperature = 2.5
    teachers = log_softmax(of_teacher @ weights_of_teacher.T / temperature)
    own = log_softmax(hidden @ weights.T / temperature)
    by_token = (np.exp(teachers) * (teachers - own)).sum(axis=-1)
    right = temperature**2 * (by_token * mask).sum()
    # d KL / d logits = (softmax(own) - softmax(teacher)) / t
    dlogits = temperature * mask[..., None] * (np.exp(own) - np.exp(teachers))
    gradients = (dlogits @ weights, np.einsum("btx,btm->xm", dlogits, hidden))
    hidden[mask == 0] = np.nan
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, weights, of_teacher)]

    def loss(hidden, weights):
        return divergence(
            hidden,
            weights,
            arrays[2],
            jnp.asarray(weights_of_teacher, jnp.float32),
            jnp.asarray(mask, jnp.float32),
            temperature,
            chunk,
        )

    value, found = jax.value_and_grad(loss, argnums=(0, 1))(*arrays[:2])
    assert abs(float(value) - right) < 1e-5 * right
    for one, other in zip(found, gradients):
        assert rel_rms(one, other) < 1e-5


def test_layers_that_are_compared():
    model = plain(model__num_layers=2).model
    converted = RADRWKV7Config(num_heads=4, num_kv_heads=4, head_dim=8)
    mixers = FrozenDict({**model.mixers, "new": converted})
    student = replace(model, mixers=mixers, pattern=("attention", "new"))
    assert compared_layers(student, model) == [1]
    assert compared_layers(model, model) == [0, 1]


def config_with(**teacher):
    return plain(train__teacher=TeacherConfig(run="runs/teacher", **teacher))


@pytest.mark.parametrize(
    ("config", "changes", "line"),
    [
        (
            config_with(kl=1.0),
            {"vocab_size": 96},
            "config.train.teacher.run: got 'a vocabulary of 96', expected that of this model, 64",
        ),
        (config_with(mse=1.0), {"num_layers": 3}, "num_layers 3.*expected 1"),
        (config_with(mse=1.0), {"width": 48}, "width 48.*expected 32"),
        (
            config_with(mse=1.0),
            {"mixers__attention": RWKV7Config(num_heads=4, head_dim=8)},
            "values of another layer",
        ),
        (
            config_with(mse=1.0, activation="heads_output"),
            {"mixers__attention": GatedAttentionConfig(num_heads=2, head_dim=16)},
            "teacher.activation: got 'heads_output'",
        ),
    ],
)
def test_teachers_that_do_not_fit(config, changes, line):
    with pytest.raises(InputError, match=line):
        given_teacher.require_fits(config, replace(config.model, **changes))


def test_a_teacher_that_is_not_there(tmp_path):
    run = prepare(
        plain(train__teacher=TeacherConfig(run=str(tmp_path / "none"), kl=1.0)),
        jax.devices()[:1],
    )
    with pytest.raises(InputError, match=r"^config\.train\.teacher\.run: ") as error:
        given_teacher.load(run, None, print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"kl": 1.0}, "kl"),
        ({"mse": 1.0}, "mse"),
        ({"cross_entropy": 0.5}, "cross_entropy"),
        ({"run": "runs/a", "cross_entropy": 0.0}, "cross_entropy"),
    ],
)
def test_settings_that_say_nothing(values, key):
    with pytest.raises(InputError, match=f"^{key}: got"):
        TeacherConfig(**values)


def test_the_stages_of_a_conversion():
    def parse(arg):
        return tuple(parsed_stage(arg, stages=3, with_teacher=(1, 2), key="config"))

    assert parse("1=runs/a") == (1, "runs/a", "runs/a")
    assert parse("2=runs/a,runs/b") == (2, "runs/a", "runs/b")
    assert parse("3=runs/a") == (3, "runs/a", "")
    for wrong in ("", "1", "4=runs/a", "2=runs/a", "3=runs/a,runs/b", "1=runs/a,runs/b"):
        with pytest.raises(InputError, match="1=RUN or 2=RUN,TEACHER or 3=RUN"):
            parse(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["mixer_output", "heads_output"])
def test_a_step(activation):
    """The loss is what its parts say; the teacher is no part of the state, and only what trains
    moves; micro-batches and a mesh change nothing.
    """
    teacher_config = plain(train__seed=7)
    settings = TeacherConfig(
        run="runs/teacher", cross_entropy=0.5, kl=2.0, mse=3.0, activation=activation
    )
    converted = RADRWKV7Config(num_heads=4, num_kv_heads=4, head_dim=8, gate_position="sdpa")
    config = plain(
        model__mixers__attention=converted,
        train__teacher=settings,
        optim__trainable=("*.mixer.*",),
        optim__eps=1e-3,
    )
    results = []
    for steps, devices in ((1, 1), (2, 4)):
        one = replace(config, train__accumulation_steps=steps)
        run = prepare(one, jax.devices()[:devices])
        of_teacher = prepare(teacher_config, jax.devices()[:devices])
        with jax.set_mesh(run.mesh):
            state = fresh_state(run)
            teachers = fresh_state(of_teacher)
            teacher = Teacher(teachers.params, teacher_config.model)
            before = jax.device_get(state.params)
            kept = jax.device_get(teacher.params)
            batch = global_batch(run.mesh, random_batch(0), config.train.batch_size)
            step = jit_train_step(one, run.tx, run.shardings)
            state, metrics = step(state, batch, teacher)
            # Not donated: it is there for the next step.
            for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(teacher.params)):
                np.testing.assert_array_equal(x, y)
        after = flatten_dict(jax.device_get(state.params))
        for path, x in flatten_dict(before).items():
            moved = not np.array_equal(x, after[path])
            assert moved == ("mixer" in path), path
        assert not [name for name in named_leaves(state) if "teacher" in name]
        results.append((after, {k: float(metrics[k]) for k in metrics if "teacher" in k}))
        assert (
            abs(
                results[-1][1]["teacher_loss"]
                - 2.0 * results[-1][1]["teacher_kl"]
                - 3.0 * results[-1][1]["teacher_mse"]
            )
            < 1e-5
        )
        losses = jax.jit(batch_losses, static_argnums=0)(config.model, before, random_batch(0))
        assert abs(float(metrics["loss"]) - float(losses.cross_entropy / losses.count)) < 1e-4
    for name, value in results[0][1].items():
        assert abs(value - results[1][1][name]) < 1e-4 * abs(value), name
    for path, x in results[0][0].items():
        assert rel_rms(results[1][0][path], x) < 1e-3, path


@pytest.mark.slow
def test_the_same_model_is_at_distance_zero():
    config = plain()
    settings = TeacherConfig(run="runs/teacher", kl=1.0, mse=1.0)
    config = replace(config, train__teacher=settings)
    run = prepare(config, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
        teacher = Teacher(jax.tree.map(jnp.copy, state.params), config.model)
        batch = global_batch(run.mesh, random_batch(0), config.train.batch_size)
        step = jit_train_step(config, run.tx, run.shardings)
        _, metrics = step(state, batch, teacher)
    assert abs(float(metrics["teacher_kl"])) < 1e-5
    assert float(metrics["teacher_mse"]) < 1e-10


def test_flops_and_memory_count_a_teacher(monkeypatch):
    """Its forward pass, logits only for predictions; layers that are compared three times more."""
    of_teacher = prepare(plain(model__num_layers=2), jax.devices()[:1])
    forward = forward_flops_per_token(of_teacher.config.model, 32)
    head = 2 * of_teacher.config.model.width * of_teacher.config.model.vocab_size

    def told(**settings):
        config = replace(config_with(**settings), model=of_teacher.config.model)
        run = prepare(config, jax.devices()[:1])
        assert config.data.seq_len == 32
        return run, run._replace(teacher=Teacher(of_teacher.abstract.params, run.config.model))

    alone, run = told(kl=1.0)
    assert flops_per_token(run) == flops_per_token(alone) + forward
    first, second = describe(run).split("\n")
    assert f"{(4 * forward) / 1e6:.1f} MFLOP per token" in first
    assert second.startswith("teacher: 0.0") and f"{forward / 1e6:.1f} of these MFLOP" in second
    alone, run = told(mse=1.0)
    mixer, _ = block_layers(run.config.model, run.config.model.blocks[0])
    again = 3 * 2 * mixer.forward_flops_per_token(32, 32)
    assert flops_per_token(run) == flops_per_token(alone) + forward - head + again

    bytes_of = lambda tree: sum(memory.bytes_on_a_device(x) for x in jax.tree.leaves(tree))
    state = bytes_of(run.abstract)
    monkeypatch.setattr(memory.jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(memory, "device_memory", lambda device: state + 1000)
    with pytest.raises(InputError, match=r"parameters and optimizer state of .* GiB and a teach"):
        memory.require_memory(run)


def test_a_step_asks_for_its_teacher():
    config = config_with(kl=1.0)
    run = prepare(config, jax.devices()[:1])
    step = jit_train_step(config, run.tx, run.shardings)
    with pytest.raises(ValueError, match="teacher: got none"):
        step.trace(run.abstract, dataclasses.replace(random_batch(0)))
