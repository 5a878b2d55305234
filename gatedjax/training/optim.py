"""Schedule, optax chain, decay mask. Logical axes tell which parameters are matrices."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree
from optax.contrib import MuonDimensionNumbers, schedule_free, schedule_free_eval_params

from gatedjax.config import OptimConfig
from gatedjax.config.patterns import factor, matches, sides
from gatedjax.errors import require
from gatedjax.layers.tree import divided, flatten_dict, united
from gatedjax.training.muon import GateChannels, Matrices, scale_by_muon
from gatedjax.training.optim_memory import scale_by_adam_memory, scale_by_memory
from gatedjax.training.optim_noise import scale_by_lanton
from gatedjax.training.optim_refined import refined_factors
from gatedjax.training.optim_rules import batch_factor, perpendicular, width_factors

# A parameter with one of these axes is a matrix; norms, biases, sinks and decays have none of them.
MATRIX_AXES = {"embed", "embed_vocab", "rank", "router_in", "mlp"}
# Axes along which a stack of matrices is stacked.
STACK_AXES = {"layers", "expert", "constant_expert"}
# Axes along which a query and its gate lie side by side, and how many channels are the gate's.
FUSED_GATES: dict[str | None, GateChannels] = {
    "query_and_gate": "half",
    "query_and_headwise_gate": "one",
}

# The logical axes of a parameter.
Axes = tuple[str | None, ...]


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimizer steps done before: the first step sees rate(0), the last of the
    run rate(steps - 1).

    Warm-up rises by equal amounts from `lr / (warmup_steps + 1)` at the first step, so that it
    already moves; step `warmup_steps + 1` is the first with all of `lr`. From there `linear` and
    `cosine` fall to `final_lr_fraction` of it at the last step; `wsd` (warm-up, stable, decay;
    arXiv 2404.06395) holds it and falls linearly over the last `decay_fraction` of the steps.
    `refined` follows the gradient norms of an earlier run (`optim_refined.py`).
    """
    config.check_schedule(steps, prefix="config.optim.")
    warmup = config.warmup_steps
    peak = config.lr
    final = peak * config.final_lr_fraction
    last = steps - 1
    if config.schedule == "refined":
        return _from_table(peak * refined_factors(config.refined_from, steps))
    # The step before the first that is lower than the peak.
    start = warmup
    if config.schedule == "wsd":
        start = last - config.decay_steps(steps)
    # A run that ends as it reaches the peak ends with the final rate all the same.
    length = max(last - start, 1)

    def rate(count: ArrayLike) -> Array:
        done = jnp.asarray(count, jnp.float32)
        warming = peak * (done + 1.0) / (warmup + 1.0)
        if config.schedule == "constant":
            return jnp.minimum(warming, peak)
        # 1 at `start` and before, 0 at the last step and after.
        left = jnp.clip((last - done) / length, 0.0, 1.0)
        if config.schedule == "cosine":
            left = 0.5 - 0.5 * jnp.cos(jnp.pi * left)
        decaying = final + (peak - final) * left
        return jnp.where(done < warmup, warming, decaying)

    return rate


def _from_table(rates: Float[np.ndarray, " steps"]) -> optax.Schedule:
    """A schedule that is a list of rates; past its end the last one."""
    table = jnp.asarray(rates, jnp.float32)

    def rate(count: ArrayLike) -> Array:
        return table[jnp.clip(jnp.asarray(count, jnp.int32), 0, len(rates) - 1)]

    return rate


def make_optimizer(
    config: OptimConfig,
    steps: int,
    axes: PyTree,
    width: int = 0,
    batch_size: int = 0,
) -> optax.GradientTransformation:
    """The chain: clip by global norm, then the optimizer with decoupled weight decay.

    One rule for all optimizers: matrices decay, embedding table and head included (`is_matrix`).
    Norms, biases, sinks, decay rates and convolutions do not. A factor of `lr_by_name` multiplies
    the rate of a parameter, and with it its decay.

    Args:
      config: the optimizer's name and numbers.
      steps: optimizer steps of the run.
      axes: for each parameter that trains the tuple of its logical axes (`state.param_axes`), same
        tree as those parameters.
      width: of the model; needed with `base_width`.
      batch_size: rows of a step; needed with `base_batch_size`.
    """
    config = for_batch(config, batch_size)
    rate = make_schedule(config, steps)
    tx = _optimizer(config, rate, axes, width)
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    if config.perpendicular:
        tx = optax.chain(perpendicular(jax.tree.map(_stacked, axes, is_leaf=_is_axes)), tx)
    return tx


def for_batch(config: OptimConfig, batch_size: int) -> OptimConfig:
    """The configuration with the rate for this size of batch (`base_batch_size`)."""
    if not config.base_batch_size:
        return config
    require(batch_size > 0, "batch_size", batch_size, "1 or more with base_batch_size")
    factor = batch_factor(config.name, batch_size, config.base_batch_size)
    return dataclasses.replace(config, lr=config.lr * factor)


def _optimizer(
    config: OptimConfig,
    rate: optax.Schedule,
    axes: PyTree,
    width: int = 0,
) -> optax.GradientTransformation:
    """The optimizer of `config.name`, with weight decay and the factors of rates."""
    mask = jax.tree.map(is_matrix, axes, is_leaf=_is_axes)
    weight_decay = config.weight_decay
    factors = None
    if config.lr_by_name:
        factors = _rate_factors(config.lr_by_name, axes)
    if config.base_width:
        require(width > 0, "width", width, "that of the model, with base_width")
        of_matrices, of_decay = width_factors(width, config.base_width)
        # Tables count as vectors: they neither decay nor change their rate.
        mask = jax.tree.map(_is_inner_matrix, axes, is_leaf=_is_axes)
        by_width = jax.tree.map(lambda inner: of_matrices if inner else 1.0, mask)
        factors = by_width if factors is None else jax.tree.map(operator.mul, factors, by_width)
        weight_decay *= of_decay
    decay = {"weight_decay": weight_decay, "mask": mask}
    adam = {"b1": config.beta1, "b2": config.beta2, "eps": config.eps}
    if config.name == "schedule_free":
        return _schedule_free(config, rate, decay, factors)
    if config.name == "adamw":
        return _scaled(optax.adamw(rate, **adam, **decay), factors)
    if config.name == "lion":
        lion = optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
        return _scaled(lion, factors)
    if config.name == "am_adamw":
        decays = jax.tree.map(lambda is_decaying: weight_decay * is_decaying, mask)
        stacked = jax.tree.map(_stacked, axes, is_leaf=_is_axes)
        # Its weight decay is part of the step that it looks back on.
        memory = scale_by_adam_memory(config.beta2, config.eps, rate, decays, stacked)
        return _scaled(optax.chain(memory, optax.scale_by_learning_rate(rate)), factors)
    if config.name == "am_msgd":
        scaled = scale_by_memory()
    elif config.name == "adabelief":
        scaled = optax.scale_by_belief(**adam)
    else:
        scaled = _muon_and_adam(axes, adam, config)
    # optax.adabelief takes no weight decay, and optax's muon gives none to what Adam updates.
    with_decay = optax.chain(
        scaled,
        optax.add_decayed_weights(**decay),
        optax.scale_by_learning_rate(rate),
    )
    return _scaled(with_decay, factors)


def _rate_factors(rules: Sequence[str], axes: PyTree) -> PyTree:
    """For each parameter the factor of the first rule `PATTERN -> FACTOR` that holds for it."""

    def factor_of(path: tuple[Any, ...], _: Axes) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for rule in rules:
            if matches(sides(rule)[0], name):
                return factor(rule)
        return 1.0

    return jax.tree_util.tree_map_with_path(factor_of, axes, is_leaf=_is_axes)


def _scaled(
    tx: optax.GradientTransformation,
    factors: PyTree | None,
) -> optax.GradientTransformation:
    """`tx` with its updates multiplied.

    Its state is that of `tx`, so that factors may be given, changed or taken away between runs.
    """
    if factors is None:
        return tx

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(jnp.multiply, updates, factors), state

    return optax.GradientTransformation(tx.init, update)


def _muon_and_adam(
    axes: PyTree,
    adam: Mapping[str, Any],
    config: OptimConfig,
) -> optax.GradientTransformation:
    """Muon, or LANTON over it, on matrices, Adam on tables and vectors.

    Not optax.contrib.muon: its Adam has Nesterov momentum, and Muon's eps.
    """

    def label(axes: Axes) -> str:
        return "adam" if muon_dimensions(axes) is None else "muon"

    def matrices(axes: Axes) -> Matrices | optax.MaskedNode:
        dimensions: Any = muon_dimensions(axes)
        if dimensions is None:
            return optax.MaskedNode()
        return Matrices(dimensions[0], dimensions[1], FUSED_GATES.get(axes[-1], "none"))

    held = jax.tree.map(matrices, axes, is_leaf=_is_axes)
    of_matrices = scale_by_muon(held)
    if config.name == "lanton":
        of_matrices = scale_by_lanton(held, config.beta2, config.lanton_alpha)
    return optax.partition(
        {
            "muon": of_matrices,
            "adam": optax.scale_by_adam(**adam),
        },
        jax.tree.map(label, axes, is_leaf=_is_axes),
    )


def _schedule_free(
    config: OptimConfig,
    rate: optax.Schedule,
    decay: Mapping[str, Any],
    factors: PyTree | None,
) -> optax.GradientTransformation:
    # Its averaging takes the place of Adam's first moment (arXiv 2405.15682).
    adam = optax.adamw(rate, b1=0.0, b2=config.beta2, eps=config.eps, **decay)
    # Inside: what is averaged are the steps as they were taken.
    base = _scaled(adam, factors)

    def rate_of_average(count: ArrayLike) -> ArrayLike:
        # optax counts the average's steps from 1 and Adam's from 0. A step must weigh in the
        # average what its own rate says.
        return rate(jnp.asarray(count) - 1)

    return schedule_free(base, rate_of_average, b1=config.beta1)


def evaluation_params(opt_state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters to evaluate: schedule-free's average if the optimizer keeps one.

    It keeps one of the parameters that train; of the others there is nothing to average.
    """
    states: Any = jax.tree.leaves(opt_state, is_leaf=_keeps_average)
    for state in states:
        if _keeps_average(state):
            averaged = flatten_dict(state.z)
            trained, frozen = divided(params, averaged.__contains__)
            return united(schedule_free_eval_params(state, trained), frozen)
    return params


def schedule_free_average(
    y: Float[Array, "..."],
    z: Float[Array, "..."],
    beta: Float[Array, ""],
) -> Float[Array, "..."]:
    """The average x of one parameter, from what schedule-free keeps: `y = beta x + (1 - beta) z`.

    It is `evaluation_params` for arrays that are not in a state.
    """
    state: Any = _Averaging(beta, z)
    return schedule_free_eval_params(state, y)


class _Averaging(NamedTuple):
    """What `schedule_free_eval_params` asks of a state."""

    b1: Array
    z: Array


def is_matrix(axes: Axes) -> bool:
    """Whether weight decay applies to a parameter with these logical axes."""
    return not MATRIX_AXES.isdisjoint(axes)


def _is_inner_matrix(axes: Axes) -> bool:
    """A matrix that is no table."""
    return is_matrix(axes) and "embed_vocab" not in axes


def _stacked(axes: Axes) -> tuple[int, ...]:
    """The axes along which a parameter is many tensors."""
    return tuple(i for i, name in enumerate(axes) if name in STACK_AXES)


def muon_dimensions(axes: Axes) -> MuonDimensionNumbers | None:
    """Which axes Muon contracts and which it produces; the others count matrices.

    None sends the parameter (tables, vectors) to Adam. Left to itself, optax would send every stack
    of matrices to Adam: layers under scan, and experts.
    """
    if not is_matrix(axes) or "embed_vocab" in axes:
        return None
    matrix = [i for i, name in enumerate(axes) if name not in STACK_AXES]
    # Behind an input axis "router" is the output of a router, one column for each expert. In front
    # of a whole matrix it counts experts that every device has (LoRA).
    if axes[matrix[0]] == "router" and len(matrix) > 2:
        matrix = matrix[1:]
    # An output projection [heads, head_dim, embed] contracts all axes but the last, and so does its
    # A [heads, head_dim, rank]; every other matrix [embed, ...] contracts its first.
    is_output = axes[matrix[-1]] in ("embed", "rank")
    split = len(matrix) - 1 if is_output else 1
    return MuonDimensionNumbers(tuple(matrix[:split]), tuple(matrix[split:]))


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _keeps_average(state: Any) -> bool:
    """Whether it is the state of `schedule_free`."""
    return hasattr(state, "z") and hasattr(state, "b1")
