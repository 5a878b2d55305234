"""Schedules step by step, who decays, what Muon sees as one matrix, both kinds of averages."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from helpers import rel_rms, slow
from optax.contrib import muon
from tiny_run import plain, random_batch

from gatedjax.config import (
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    LoRAMixtureConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    SparseMoEConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers.moe import state as router_state
from gatedjax.sharding import global_batch
from gatedjax.training.guard import Guard
from gatedjax.training.muon import Matrices, orthogonal_update
from gatedjax.training.optim import (
    FUSED_GATES,
    evaluation_params,
    is_matrix,
    make_optimizer,
    make_schedule,
    muon_dimensions,
)
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.state import init_params, param_axes, params_for_evaluation
from gatedjax.training.step import _updated_average, jit_train_step
from gatedjax.training.trainable import FROZEN

OPTIMIZERS = (
    *("adamw", "muon", "lion", "adabelief", "schedule_free"),
    *map(slow, ("lanton", "am_msgd", "am_adamw")),
)


def expected_rate(config: OptimConfig, steps: int, count: int) -> float:
    """The rate of the step before which `count` were done, from the words of `make_schedule`."""
    if count < config.warmup_steps:
        return config.lr * (count + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    falling = steps - 1 - config.warmup_steps
    done = count - config.warmup_steps
    if config.schedule == "wsd":
        falling = max(1, round(steps * config.decay_fraction))
        done = max(0, falling - (steps - 1 - count))
    fraction = 1.0 if falling == 0 else done / falling
    if config.schedule == "cosine":
        fraction = 0.5 - 0.5 * math.cos(math.pi * fraction)
    return config.lr * (1 - fraction + config.final_lr_fraction * fraction)


SCHEDULES = [
    *itertools.product(("constant", "linear", "cosine", "wsd"), (1, 2, 10, 100), (0,), (0.2,)),
    *itertools.product(("linear", "cosine"), (10, 100), (1, 9), (0.2,)),
    *[("wsd", 100, 20, 0.01), ("wsd", 100, 20, 0.29), ("wsd", 100, 80, 0.2), ("wsd", 7, 3, 0.0)],
    *[("linear", 100, 99, 0.2), ("cosine", 100, 98, 0.2), ("wsd", 100, 0, 1.0)],
]


@pytest.mark.parametrize("name, steps, warmup, decay", SCHEDULES)
def test_every_step_has_its_rate(name, steps, warmup, decay):
    config = OptimConfig(lr=2.0, schedule=name, warmup_steps=warmup, decay_fraction=decay)
    counts = np.arange(steps)
    rates = np.asarray(jax.vmap(make_schedule(config, steps))(counts))
    expected = [expected_rate(config, steps, int(count)) for count in counts]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)
    # The last step of the run, whatever the schedule: 0.1 of the peak, the peak if it is constant.
    assert rates[-1] == pytest.approx(2.0 if name == "constant" else 0.2)
    beyond = float(make_schedule(config, steps)(steps + 5))
    assert beyond == pytest.approx(rates[-1])


def test_the_step_uses_the_rate_of_its_place():
    """Steps of descent by 1 are the rates themselves."""
    config = OptimConfig(name="lion", lr=1.0, warmup_steps=2, weight_decay=0.0, clip_norm=0.0)
    tx = make_optimizer(config, 6, {"w": ("embed", "mlp")})
    params = {"w": jnp.zeros((2, 2))}
    state = tx.init(params)
    for count in range(6):
        updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
        rate = expected_rate(config, 6, count)
        np.testing.assert_allclose(updates["w"], -rate, rtol=1e-5)


def test_schedules_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="warmup_steps: got 100, expected fewer than"):
        make_schedule(OptimConfig(warmup_steps=100), 100)
    with pytest.raises(InputError, match="warmup_steps: got 81, expected at most 80"):
        make_schedule(OptimConfig(schedule="wsd", warmup_steps=81), 100)
    with pytest.raises(InputError, match="schedule: got 'cosine', expected 'constant' with"):
        OptimConfig(name="schedule_free")
    with pytest.raises(InputError, match=r"beta1: got 0\.0, expected at least 0\.1 with"):
        OptimConfig(name="schedule_free", schedule="constant", beta1=0.0)


def all_parameters():
    """Name and logical axes of every sort of parameter there is."""
    attention, linear = GatedAttentionConfig, GatedLinearAttentionConfig
    mixers = [
        attention(fused_gate=True, sinks=True, alibi="learned"),
        attention(fused_gate=True, gate_granularity="headwise"),
        attention(gate_position="output", query_scale="selective"),
        attention(gate_input="constant"),
        attention(qk_norm_kind="l2", logit_scale="learned", normalizer_length=8),
        linear(conv_width=4),
        linear(decay="scalar", decay_form="softplus"),
    ]
    router = RouterConfig(residual=True, affine=True)
    ffns = [
        SparseMoEConfig(constant_experts=2, zero_experts=1, shared_hidden=8, router=router),
        LoRAMixtureConfig(gate="phatgoose"),
        LoRAMixtureConfig(first_pass=True),
    ]
    models = [dict(mixers=FrozenDict(m=m), pattern=("m",)) for m in mixers]
    models += [dict(ffns=FrozenDict(f=f), ffn_pattern=("f",)) for f in ffns]
    found = {}
    for values in models:
        config = ModelConfig(vocab_size=32, width=16, num_layers=1, tie_embeddings=False, **values)
        boxed = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
        trained, _ = router_state.split(boxed)
        for path, axes in flatten_dict(param_axes(trained)).items():
            found["/".join([*path[-2:], *map(str, axes)])] = (path[-1], axes)
    return found


PARAMETERS = all_parameters()
# Whatever is no matrix, by the last part of its name.
NO_MATRICES = {
    "scale",
    "sink_logits",
    "alibi_slopes",
    "length_weight",
    "length_scale",
    "logit_scale",
    "decay_bias",
    "dt_bias",
    "a_log",
    "conv",
    "constant",
    "router_bias",
}


def test_what_is_a_matrix():
    for path, (name, axes) in PARAMETERS.items():
        assert is_matrix(axes) == (name not in NO_MATRICES), (path, axes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rule_of_decay_for_every_optimizer(name):
    """Without gradients an update is what decays: -lr * weight_decay of each matrix. What is frozen
    is no optimizer's matter (`test_trainable.py`).
    """
    config = OptimConfig(
        name=name, lr=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant", clip_norm=0.0
    )
    axes, params = {}, {}
    for path, (leaf, names) in PARAMETERS.items():
        if leaf == FROZEN:
            continue
        axes[path] = {leaf: names}
        params[path] = {leaf: jnp.full([2] * len(names), 2.0)}
    tx = make_optimizer(config, 10, axes)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for path, update in updates.items():
        ((leaf, value),) = update.items()
        expected = -0.1 * 0.5 * 2.0 if leaf not in NO_MATRICES else 0.0
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-7, err_msg=path)


# Logical axes, sizes, and how to take out one matrix [inputs, outputs] after the other.
STACKS = {
    "plain": (("embed", "mlp"), (6, 4), lambda x: [x]),
    "layers": (("layers", "embed", "mlp"), (3, 4, 6), list),
    "experts": (
        ("layers", "expert", "embed", "mlp"),
        (2, 3, 4, 6),
        lambda x: [m for layer in x for m in layer],
    ),
    "experts down": (("expert", "mlp", "embed"), (3, 6, 4), list),
    "LoRA in": (("layers", "router", "embed", "rank"), (2, 3, 8, 4), lambda x: [*x[0], *x[1]]),
    "LoRA in, hidden": (("router", "mlp", "rank"), (3, 8, 4), list),
    "LoRA out": (("router", "rank", "mlp"), (3, 4, 8), list),
    "LoRA out, width": (
        ("layers", "router", "rank", "embed"),
        (2, 3, 4, 8),
        lambda x: [*x[0], *x[1]],
    ),
    "router": (("layers", "embed", "router"), (2, 8, 5), list),
    "residual of a router": (("layers", "router_in", "router"), (2, 5, 5), list),
    "constant experts": (
        ("layers", "embed", "constant_expert", None),
        (2, 8, 3, 2),
        lambda x: [layer[:, e] for layer in x for e in range(3)],
    ),
    "heads": (
        ("layers", "embed", "heads", "head_dim"),
        (2, 8, 2, 3),
        lambda x: list(x.reshape(2, 8, 6)),
    ),
    "heads out": (
        ("layers", "heads", "head_dim", "embed"),
        (2, 2, 3, 8),
        lambda x: list(x.reshape(2, 6, 8)),
    ),
    "query and gate": (
        ("embed", "heads", "query_and_gate"),
        (8, 2, 6),
        lambda x: [x[:, :, :3].reshape(8, 6), x[:, :, 3:].reshape(8, 6)],
    ),
    "query and headwise gate": (
        ("layers", "embed", "heads", "query_and_headwise_gate"),
        (2, 8, 2, 4),
        lambda x: [
            *[layer[:, :, :3].reshape(8, 6) for layer in x],
            *[layer[:, :, 3].reshape(8, 2) for layer in x],
        ],
    ),
}


@pytest.mark.parametrize("case", STACKS)
def test_muon_sees_each_matrix_by_itself(case):
    """Two steps of a stack, against optax's Muon on every matrix of it alone. The matrices are of
    very different sizes: whatever were taken together would show.
    """
    axes, shape, split = STACKS[case]
    rng = np.random.default_rng(0)
    config = OptimConfig(
        name="muon", lr=0.1, weight_decay=0.0, warmup_steps=0, schedule="constant", clip_norm=0.0
    )
    tx = make_optimizer(config, 10, {"w": axes})
    sizes = 10.0 ** rng.integers(-2, 3, (*shape[:-2], 1, 1))
    if "query" in case:
        sizes = np.where(np.arange(shape[-1]) < 3, 1.0, 100.0)
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    alone = muon(0.1, consistent_rms=0.2)
    update_alone = jax.jit(alone.update)
    matrices = [jnp.asarray(m) for m in split(np.zeros(shape, np.float32))]
    states = [alone.init(m) for m in matrices]
    for _ in range(2):
        gradient = (rng.normal(size=shape) * sizes).astype(np.float32)
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        for i, (part, actual) in enumerate(zip(split(gradient), split(np.asarray(updates["w"])))):
            expected, states[i] = update_alone(jnp.asarray(part), states[i], matrices[i])
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-4, err_msg=case)


def test_every_matrix_of_a_model_is_one_of_those_cases():
    known = {tuple(a for a in axes if a != "layers") for axes, _, _ in STACKS.values()}
    like = {"kv_heads": "heads", "shared_gate": "router", "embed_act": "router"}
    for path, (_, axes) in PARAMETERS.items():
        if muon_dimensions(axes) is None:
            continue
        named = tuple(like.get(a, a) for a in axes if a != "layers")
        shown = (path, named)
        is_matrix_of_two = len(named) == 2 or named == ("rank", "heads", "head_dim")
        assert named in known or is_matrix_of_two, shown


def test_tables_and_vectors_have_plain_adam_under_muon():
    values = dict(lr=0.1, warmup_steps=0, schedule="constant", clip_norm=0.0, weight_decay=0.0)
    values |= dict(beta1=0.8, beta2=0.9, eps=0.01)
    axes = {"table": ("vocab", "embed_vocab"), "norm": ("embed_act",), "w": ("embed", "mlp")}
    params = {"table": jnp.ones((4, 3)), "norm": jnp.ones(3), "w": jnp.ones((3, 3))}
    tx = make_optimizer(OptimConfig(name="muon", **values), 10, axes)
    adam = optax.adam(0.1, b1=0.8, b2=0.9, eps=0.01)
    state, expected_state = tx.init(params), adam.init(params)
    for i in range(3):
        rng = np.random.default_rng(i)
        grads = {name: jnp.asarray(rng.normal(size=p.shape)) for name, p in params.items()}
        updates, state = tx.update(grads, state, params)
        expected, expected_state = adam.update(grads, expected_state, params)
        for name in ("table", "norm"):
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)


def test_an_orthogonal_update_has_adams_size():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 32)), jnp.float32)
    update = orthogonal_update(x, Matrices((0,), (1, 2)))
    assert 0.15 < float(jnp.sqrt(jnp.mean(update**2))) < 0.25
    assert set(FUSED_GATES) == {"query_and_gate", "query_and_headwise_gate"}


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_free_evaluates_its_average(beta, warmup):
    """arXiv 2405.15682, section 4, in float64 numpy: z by Adam without momentum, x the average of
    all z weighted by their squared rates, y between them where gradients are taken.
    """
    config = OptimConfig(
        name="schedule_free",
        schedule="constant",
        lr=0.05,
        warmup_steps=warmup,
        beta1=beta,
        beta2=0.9,
        weight_decay=0.1,
        clip_norm=0.0,
    )
    target = np.random.default_rng(0).normal(size=(3, 4))
    tx = make_optimizer(config, 30, {"w": ("embed", "mlp")})
    update = jax.jit(tx.update)
    params = {"w": jnp.zeros((3, 4))}
    state = tx.init(params)
    x, z, second, weights = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), 0.0
    for count in range(30):
        grads = {"w": params["w"] - target}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        y = beta * x + (1 - beta) * z
        gradient = y - target
        second = 0.9 * second + 0.1 * gradient**2
        corrected = second / (1 - 0.9 ** (count + 1))
        rate = expected_rate(config, 30, count)
        z = z - rate * (gradient / (np.sqrt(corrected) + config.eps) + 0.1 * y)
        weights += rate**2
        x = x + rate**2 / weights * (z - x)
    # The average is recovered from y and z: rounding errors grow as 1 / beta.
    bound = 1e-4 / beta
    assert rel_rms(evaluation_params(state, params)["w"], x) < bound
    assert rel_rms(params["w"], beta * x + (1 - beta) * z) < bound


def average_of(decay: float, history: list) -> np.ndarray:
    """The bias-corrected exponential average, float64."""
    n = len(history)
    weights = [(1 - decay) * decay ** (n - t) for t in range(1, n + 1)]
    return sum(w * np.asarray(p, np.float64) for w, p in zip(weights, history)) / (1 - decay**n)


@pytest.mark.parametrize("decay", [1e-3, 0.5, 0.99, 0.9999, 0.9999999])
def test_the_average_does_not_know_its_start(decay):
    config = plain(optim__ema_decay=decay)
    zero = jnp.int32(0)
    guard = Guard(jnp.float32(0), zero, zero, zero)
    ema = jnp.full(3, 1e6)  # a random start, far away
    history = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for step, params in enumerate(history, start=1):
        guard = guard.replace(accepted=jnp.int32(step))
        ema = _updated_average(config, ema, jnp.asarray(params), guard)
        np.testing.assert_allclose(ema, average_of(decay, history[:step]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", slow("schedule_free")])
def test_the_average_of_a_run(name):
    """With micro-batches, and a step in between that is skipped: it is not averaged. Beside
    schedule-free, what is averaged is what would be evaluated without.
    """
    config = plain(
        optim__name=name,
        optim__schedule="constant",
        optim__lr=1e-2,
        optim__ema_decay=0.9,
        train__accumulation_steps=2,
    )
    run = prepare(config, jax.devices()[:1])
    history = []
    with jax.set_mesh(run.mesh):
        state, step = fresh_state(run), jit_train_step(config, run.tx, run.shardings)
        for i in range(4):
            batch = random_batch(i)
            if i == 1:
                batch = batch.replace(loss_mask=batch.loss_mask * np.float32(np.nan))
            state, metrics = step(state, global_batch(run.mesh, batch, 8))
            if i != 1:
                evaluated = evaluation_params(state.opt_state, state.params)
                history.append(np.asarray(evaluated["embedding"]))
    assert float(metrics["skipped_steps"]) == 1
    average = params_for_evaluation(state)["embedding"]
    assert rel_rms(average, average_of(0.9, history)) < 1e-5
