"""Schedule, optax chain, decay mask. Logical axes tell which parameters are matrices."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon, schedule_free, schedule_free_eval_params

from gatedjax.config import OptimConfig
from gatedjax.errors import InputError, require

# A parameter with one of these axes is a matrix; norms, biases, sinks and decays have none of them.
MATRIX_AXES = {"embed", "embed_vocab", "rank", "mlp"}
# A parameter of this name is never changed.
FROZEN = "frozen"
# Axes along which a stack of matrices is stacked.
STACK_AXES = {"layers", "expert"}

# The logical axes of a parameter.
Axes = tuple[str | None, ...]


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up to `lr`, then what `config.schedule` names.

    All schedules but constant end at `final_lr_fraction` of the peak at the last step. wsd
    (warm-up, stable, decay; arXiv 2404.06395) holds the peak and decays linearly over the last
    `decay_fraction` of the steps.
    """
    warmup = config.warmup_steps
    require(
        warmup < steps,
        "config.optim.warmup_steps",
        warmup,
        f"fewer than config.train.steps = {steps}",
    )
    after_warmup = _schedule_after_warmup(config, steps)
    if warmup == 0:
        return after_warmup
    # Starts one step above zero, so that the first step already moves.
    start = config.lr / (warmup + 1)
    ramp = optax.linear_schedule(start, config.lr, warmup)
    return optax.join_schedules([ramp, after_warmup], [warmup])


def _schedule_after_warmup(config: OptimConfig, steps: int) -> optax.Schedule:
    peak = config.lr
    final = peak * config.final_lr_fraction
    rest = steps - config.warmup_steps
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "linear":
        return optax.linear_schedule(peak, final, rest)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, rest, config.final_lr_fraction)
    decay_steps = max(1, int(steps * config.decay_fraction))
    decay_steps = min(decay_steps, rest)
    return optax.linear_schedule(peak, final, decay_steps, transition_begin=rest - decay_steps)


def make_optimizer(
    config: OptimConfig,
    steps: int,
    axes: PyTree,
) -> optax.GradientTransformation:
    """The chain: clip by global norm, then the optimizer with decoupled weight decay on matrices.

    Args:
      config: the optimizer's name and numbers.
      steps: optimizer steps of the run.
      axes: for each parameter the tuple of its logical axes (`step.param_axes`), same tree as the
        parameters.
    """
    rate = make_schedule(config, steps)
    frozen = jax.tree_util.tree_map_with_path(_is_frozen, axes, is_leaf=_is_axes)
    tx = _optimizer(config, rate, axes, frozen)
    if any(jax.tree.leaves(frozen)):
        tx = optax.chain(tx, optax.transforms.freeze(frozen))
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return tx


def _optimizer(
    config: OptimConfig,
    rate: optax.Schedule,
    axes: PyTree,
    frozen: PyTree,
) -> optax.GradientTransformation:
    """The optimizer of `config.name`, with weight decay."""

    def decays(axes: Axes, is_frozen: bool) -> bool:
        return is_matrix(axes) and not is_frozen

    mask = jax.tree.map(decays, axes, frozen, is_leaf=_is_axes)
    decay = {"weight_decay": config.weight_decay, "mask": mask}
    adam = {"b1": config.beta1, "b2": config.beta2, "eps": config.eps}
    if config.name == "adamw":
        return optax.adamw(rate, **adam, **decay)
    if config.name == "lion":
        return optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
    if config.name == "adabelief":
        # optax.adabelief takes no weight decay.
        return optax.chain(
            optax.scale_by_belief(**adam),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    if config.name == "muon":
        return muon(
            rate,
            beta=0.95,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=jax.tree.map(muon_dimensions, axes, is_leaf=_is_axes),
            # Makes a matrix update as large as Adam's (arXiv 2502.16982), so one rate serves both.
            consistent_rms=0.2,
        )
    return _schedule_free(config, rate, decay)


def _schedule_free(
    config: OptimConfig,
    rate: optax.Schedule,
    decay: Mapping[str, Any],
) -> optax.GradientTransformation:
    if config.schedule != "constant":
        expected = "expected 'constant' with schedule_free"
        raise InputError(f"config.optim.schedule: got {config.schedule!r}, {expected}")
    # Its averaging takes the place of Adam's first moment (arXiv 2405.15682).
    base = optax.adamw(rate, b1=0.0, b2=config.beta2, eps=config.eps, **decay)
    return schedule_free(base, rate, b1=config.beta1)


def evaluation_params(opt_state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters to evaluate: schedule-free's average if the optimizer keeps one."""
    states = jax.tree.leaves(opt_state, is_leaf=_keeps_average)
    for state in states:
        if _keeps_average(state):
            return schedule_free_eval_params(state, params)
    return params


def is_matrix(axes: Axes) -> bool:
    """Whether weight decay applies to a parameter with these logical axes."""
    return not MATRIX_AXES.isdisjoint(axes)


def muon_dimensions(axes: Axes) -> MuonDimensionNumbers | None:
    """Which axes Muon contracts and which it produces.

    None sends the parameter (tables, vectors) to Adam. Left to itself, optax would send every stack
    of matrices to Adam: layers under scan, and experts.
    """
    if not is_matrix(axes) or "embed_vocab" in axes:
        return None
    matrix = [i for i, name in enumerate(axes) if name not in STACK_AXES]
    # An output projection [heads, head_dim, embed] contracts all axes but the last; every other
    # matrix [embed, ...] contracts its first.
    is_output = axes[matrix[-1]] == "embed"
    split = len(matrix) - 1 if is_output else 1
    return MuonDimensionNumbers(tuple(matrix[:split]), tuple(matrix[split:]))


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _is_frozen(path: tuple[Any, ...], axes: Axes) -> bool:
    return path[-1].key == FROZEN


def _keeps_average(state: Any) -> bool:
    """Whether it is the state of `schedule_free`."""
    return hasattr(state, "z") and hasattr(state, "b1")
