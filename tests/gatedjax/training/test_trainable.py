"""What trains and what is frozen: a step against numpy, bits, sizes, FLOPs, averages, bad names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import plain, random_batch, replace, run_steps, tiny

from gatedjax.aot.step import abstract_batch
from gatedjax.config import (
    FrozenDict,
    LoRAConfig,
    LoRAMixtureConfig,
    OptimConfig,
    SoftAdaptersConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers.tree import flatten_dict, unflatten_dict, united
from gatedjax.training import trainable
from gatedjax.training.digests import named_leaves
from gatedjax.training.eval_step import batch_losses
from gatedjax.training.flops import forward_flops_per_token, train_flops_per_token
from gatedjax.training.optim import evaluation_params, is_matrix, make_optimizer
from gatedjax.training.run import describe, flops_per_token, fresh_state, prepare
from gatedjax.training.state import init_params, param_axes, params_for_evaluation
from gatedjax.training.step import jit_train_step

LORA = LoRAConfig(rank=2, alpha=6.0, targets=("*.mixer.query", "*.mixer.out", "*.ffn.*"))
# Low-rank updates, a norm and the head beside them; two of them with rates of their own.
CONFIG = plain(
    model__lora=LORA,
    optim__trainable=("final_norm.*", "embedding"),
    optim__lr_by_name=("*.lora.b -> 16", "*.lora.* -> 1", "embedding -> 0.5"),
    optim__clip_norm=0.01,
    # Adam's first steps turn rounding of tiny gradients into whole steps: not with this one.
    optim__eps=1e-3,
    optim__ema_decay=0.9,
)


TRAINED_BESIDE = ("embedding", "final_norm.scale")


def names(params) -> dict:
    return {".".join(path): x for path, x in flatten_dict(params).items()}


@pytest.fixture(scope="module")
def two_steps():
    """The parameters before, the run, and its state after two steps."""
    run = prepare(CONFIG, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        start = jax.device_get(names(fresh_state(run).params))
    _, state, _ = run_steps(CONFIG, 2, devices=jax.devices()[:1])
    return start, run, state


def numpy_steps(start: dict, trained: list[str], steps: int) -> list[dict]:
    """AdamW on the parameters that train, in float64 numpy: the parameters after each step. The
    gradients are jax's, of all parameters.
    """
    optim = CONFIG.optim
    boxed = jax.eval_shape(lambda key: init_params(CONFIG.model, key), jax.random.key(0))
    axes = names(param_axes(boxed))
    factors = {name: 16.0 for name in trained if name.endswith(".lora.b")} | {"embedding": 0.5}

    @jax.jit
    def gradient(flat: dict, batch) -> dict:
        def loss(flat):
            params = unflatten_dict({tuple(name.split(".")): x for name, x in flat.items()})
            losses = batch_losses(CONFIG.model, params, batch)
            return losses.cross_entropy / losses.count

        return jax.grad(loss)(flat)

    params = {name: np.asarray(x, np.float64) for name, x in start.items()}
    first = dict.fromkeys(trained, 0.0)
    second = dict.fromkeys(trained, 0.0)
    history = []
    for step in range(1, steps + 1):
        rounded = {name: x.astype(np.float32) for name, x in params.items()}
        grads = jax.device_get(gradient(rounded, random_batch(step - 1)))
        norm = math.sqrt(sum(np.sum(grads[name].astype(np.float64) ** 2) for name in trained))
        rate = optim.lr * step / (optim.warmup_steps + 1)
        for name in trained:
            g = grads[name].astype(np.float64) * min(1.0, optim.clip_norm / norm)
            first[name] = optim.beta1 * first[name] + (1 - optim.beta1) * g
            second[name] = optim.beta2 * second[name] + (1 - optim.beta2) * g**2
            mean = first[name] / (1 - optim.beta1**step)
            size = np.sqrt(second[name] / (1 - optim.beta2**step))
            decay = optim.weight_decay if is_matrix(axes[name]) else 0.0
            update = mean / (size + optim.eps) + decay * params[name]
            params[name] = params[name] - rate * factors.get(name, 1.0) * update
        history.append(dict(params))
    return history


def test_a_step_is_that_of_numpy_on_what_trains(two_steps):
    start, _, state = two_steps
    trained = [name for name in start if ".lora." in name or name in TRAINED_BESIDE]
    history = numpy_steps(start, trained, 2)
    after = jax.device_get(names(state.params))
    average = jax.device_get(names(params_for_evaluation(state)))
    assert len(trained) == 2 + 2 * 5 and after.keys() == start.keys() == average.keys()
    for name, x in start.items():
        if name not in trained:
            # To the bit: weight decay and the average included.
            assert after[name].tobytes() == average[name].tobytes() == x.tobytes(), name
            continue
        assert rel_rms(after[name] - x, history[1][name] - x) < 1e-3, name
        expected = (0.9 * history[0][name] + history[1][name]) / 1.9
        assert rel_rms(average[name] - x, expected - x) < 1e-3, name


def test_only_what_trains_has_optimizer_state(two_steps):
    _, run, state = two_steps
    sizes = {name: x.size for name, x in names(run.abstract.params).items()}
    trained = {name: n for name, n in sizes.items() if ".lora." in name or name in TRAINED_BESIDE}
    of_optimizer = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert of_optimizer == 2 * sum(trained.values())
    assert sum(x.size for x in jax.tree.leaves(state.ema)) == sum(trained.values())
    # Of all that is kept, what a run that trains everything keeps for the frozen rest is missing.
    whole = prepare(dataclasses.replace(CONFIG, optim=OptimConfig(trainable=("*",))))
    saved = _bytes(whole.abstract.opt_state) - _bytes(run.abstract.opt_state)
    assert saved == 2 * 4 * (sum(sizes.values()) - sum(trained.values()))
    for x, a in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract), strict=True):
        assert x.sharding.is_equivalent_to(a.sharding, x.ndim)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_gradients_of_what_is_frozen_are_not_counted():
    """Everything but a norm frozen: what is left are the forward pass and the gradients of
    activations, and both of the updates.
    """
    frozen = tiny(optim__trainable=("final_norm.*",))
    run = prepare(frozen, jax.devices()[:1])
    forward = forward_flops_per_token(frozen.model, 32)
    flat = names(run.abstract.params)
    dense = sum(p.size for name, p in flat.items() if name.endswith("kernel"))
    # Two of the four experts of a token.
    experts = sum(flat[f"periods.layer_1.ffn.{name}"].size for name in ("gate", "up", "down")) / 2
    matrices = dense + experts + flat["embedding"].size
    assert flops_per_token(run) == 3 * forward - 2 * matrices
    assert "0.00M of which train" in describe(run)

    whole = prepare(tiny(), jax.devices()[:1])
    assert flops_per_token(whole) == train_flops_per_token(whole.config.model, 32) == 3 * forward

    with_updates = prepare(
        tiny(model__lora=LORA, optim__trainable=("*",)),
        jax.devices()[:1],
    )
    sizes = [p.size for name, p in names(with_updates.abstract.params).items() if ".lora." in name]
    assert flops_per_token(with_updates) == 3 * (forward + 2 * sum(sizes))


def test_the_frozen_weights_of_a_mixture_have_no_optimizer_state():
    mixture = LoRAMixtureConfig(hidden=16, num_experts=2, rank=2)
    run = prepare(
        plain(model__ffns=FrozenDict(mlp=mixture)),
        jax.devices()[:1],
    )
    kept = named_leaves(run.abstract.opt_state)
    assert not any("frozen" in name for name in kept)
    assert sum("lora_a" in name for name in kept) == 2 * 3


def x_lora(*trained: str):
    mixture = LoRAMixtureConfig(hidden=16, num_experts=2, rank=2, gate="xlora", first_pass=True)
    return plain(model__ffns=FrozenDict(mlp=mixture), optim__trainable=trained)


def soft_moa(*trained: str):
    one = plain()
    attention = replace(one.model.mixers["attention"], causal=False)
    feed_forward = replace(one.model.ffns["mlp"], adapters=SoftAdaptersConfig(number=2, hidden=4))
    return replace(
        one,
        model__task="masked_lm",
        model__mixers=FrozenDict(attention=attention),
        model__ffns=FrozenDict(mlp=feed_forward),
        optim__trainable=trained,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, trained",
    [
        (x_lora, ("lora_a", "lora_b")),
        (x_lora, ("lora_classifier",)),
        (soft_moa, ("ffn.adapters",)),
    ],
    ids=["x_lora experts", "x_lora classifier", "soft_moa"],
)
def test_what_is_frozen_beside_experts_stays_to_the_bit(make, trained):
    config = make(*(f"*{name}*" for name in trained))
    run = prepare(config, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        start = jax.device_get(names(fresh_state(run).params))
    _, state, _ = run_steps(config, 4, devices=jax.devices()[:1])
    after = jax.device_get(names(state.params))
    trains = {name for name in start if any(part in name for part in trained)}
    assert trains and trains != start.keys() == after.keys()
    for name, x in start.items():
        is_same = after[name].tobytes() == x.tobytes()
        assert is_same == (name not in trains), name


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adabelief", "schedule_free"])
def test_a_factor_multiplies_every_optimizers_step(name):
    """The first step, decay included; the second state of the optimizer has the same structure with
    and without factors.
    """
    values = dict(name=name, lr=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0)
    axes = {"a": {"w": ("embed", "mlp")}, "b": {"w": ("embed", "mlp")}}
    params = {key: {"w": jnp.ones((3, 4))} for key in axes}
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    grads = {key: {"w": gradient} for key in axes}
    rules = ("b.* -> 3", "*.w -> 1")
    plain_tx = make_optimizer(OptimConfig(**values), 10, axes)
    tx = make_optimizer(OptimConfig(**values, lr_by_name=rules), 10, axes)
    expected, plain_state = plain_tx.update(grads, plain_tx.init(params), params)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["w"], expected["a"]["w"], rtol=1e-5)
    np.testing.assert_allclose(updates["b"]["w"], 3 * expected["b"]["w"], rtol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(plain_state)


def test_schedule_free_averages_what_trains_alone():
    axes = {"a": {"w": ("embed", "mlp")}}
    config = OptimConfig(name="schedule_free", schedule="constant", warmup_steps=0)
    tx = make_optimizer(config, 10, axes)
    trained = {"a": {"w": jnp.ones((3, 4))}}
    frozen = {"a": {"v": jnp.full(3, 0.1)}, "c": {"w": jnp.full(3, 0.3)}}
    state = tx.init(trained)
    moved = trained
    # After the first step the average is that step's: two.
    for gradient in (1.0, -0.5):
        grads = {"a": {"w": jnp.full((3, 4), gradient)}}
        updates, state = tx.update(grads, state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
    whole = united(moved, frozen)
    alone = evaluation_params(state, moved)
    evaluated = evaluation_params(state, whole)
    np.testing.assert_array_equal(evaluated["a"]["w"], alone["a"]["w"])
    assert rel_rms(moved["a"]["w"], alone["a"]["w"]) > 1e-5
    assert evaluated["a"]["v"] is frozen["a"]["v"] and evaluated["c"]["w"] is frozen["c"]["w"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(optim__trainable=("*.mixer.*", "*.nothing")),
            "config.optim.trainable: got '*.nothing', expected a pattern of parameters that train",
        ),
        (
            dict(optim__lr_by_name=("nothing* -> 2",)),
            "config.optim.lr_by_name: got 'nothing*', expected a pattern of parameters that train",
        ),
        (
            # What does not train has no rate.
            dict(optim__trainable=("*.mixer.*",), optim__lr_by_name=("*.ffn.* -> 2",)),
            "config.optim.lr_by_name: got '*.ffn.*', expected a pattern of parameters that train",
        ),
        (
            dict(model__lora=LoRAConfig(rank=2, targets=("*.query", "*.qurey"))),
            "config.model.lora.targets: got '*.qurey', expected a pattern of projections, such as "
            "periods.layer_0.",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(changes, message):
    with pytest.raises(InputError) as error:
        prepare(plain(**changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRAConfig(targets=("*",)), "rank: got 0, expected at least 1 with targets"),
        (lambda: LoRAConfig(rank=4), r"targets: got \(\), expected at least one pattern"),
        (lambda: LoRAConfig(rank=-1, targets=("*",)), "rank: got -1, expected at least 0"),
        (lambda: OptimConfig(lr_by_name=("a: 2",)), "lr_by_name: got 'a: 2', expected 'PATTERN ->"),
        (lambda: OptimConfig(lr_by_name=("a -> 0",)), "lr_by_name: got 'a -> 0', expected"),
        (lambda: OptimConfig(lr_by_name=("a -> nan",)), "lr_by_name: got 'a -> nan', expected"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.slow
def test_a_frozen_base_costs_less_than_training_it():
    """What the compiler counts and holds: gradients of frozen matrices are not computed, also under
    scan, and what only they would need is not kept.
    """
    sizes = dict(model__width=64, model__scan_layers=True, model__num_layers=4)
    whole = _compiled(plain(**sizes))
    updates = LoRAConfig(rank=2, targets=("*.mixer.*", "*.ffn.*"))
    lora = _compiled(plain(**sizes, model__lora=updates))
    assert lora.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]
    memory = whole.memory_analysis(), lora.memory_analysis()
    assert memory[1].argument_size_in_bytes < 0.5 * memory[0].argument_size_in_bytes
    assert memory[1].temp_size_in_bytes < memory[0].temp_size_in_bytes


def _compiled(config):
    run = prepare(config, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        step = jit_train_step(config, run.tx, run.shardings)
        return step.lower(run.abstract, abstract_batch(run)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_mesh_and_micro_batches_train_the_same(scan):
    """Frozen base, updates and micro-batches, cut over eight devices, against one."""
    config = tiny(
        model__scan_layers=scan,
        model__num_layers=4,
        model__lora=LORA,
        optim__trainable=("final_norm.*",),
        optim__eps=1e-3,
    )
    _, alone, first = run_steps(config, 2, devices=jax.devices()[:1])
    mesh = replace(config, mesh__fsdp=2, mesh__tensor=2, train__accumulation_steps=2)
    _, cut, second = run_steps(mesh, 2)
    assert second[-1]["loss"] == pytest.approx(first[-1]["loss"], rel=1e-4)
    trained, frozen = trainable.split(config, cut.params)
    expected, same = trainable.split(config, alone.params)
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(expected), strict=True):
        assert rel_rms(x, y) < 2e-3
    for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(x, y)
