"""Schedule, optax chain, decay mask. Which parameters are matrices is read off their logical axes."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon, schedule_free, schedule_free_eval_params

from gatedjax.config import OptimConfig
from gatedjax.errors import InputError

# A parameter with one of these axes is a matrix; norms, biases, sinks and decays have none of them.
MATRIX_AXES = {"embed", "embed_vocab", "rank", "mlp"}
# A parameter of this name is never changed.
FROZEN = "frozen"
# Axes along which a stack of matrices is stacked.
STACK_AXES = {"layers", "expert"}

Axes = tuple[str | None, ...]


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up to `lr`, then constant, linear, cosine, or warm-up-stable-decay.

    All but constant end at `final_lr_fraction` of the peak at the last step. WSD (arXiv 2404.06395) holds the peak and
    decays linearly over the last `decay_fraction` of the steps.
    """
    peak, warmup = config.lr, config.warmup_steps
    if warmup >= steps:
        raise InputError(
            f"config.optim.warmup_steps: got {warmup}, expected fewer than config.train.steps = {steps}"
        )
    rest, final = steps - warmup, peak * config.final_lr_fraction
    decay = max(1, int(steps * config.decay_fraction))
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_lr_fraction),
        "wsd": lambda: optax.linear_schedule(peak, final, min(decay, rest), max(rest - decay, 0)),
    }[config.schedule]()
    if warmup == 0:
        return after
    # One past zero, so that the first step already moves.
    return optax.join_schedules(
        [optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup]
    )


def make_optimizer(config: OptimConfig, steps: int, axes) -> optax.GradientTransformation:
    """The chain: clip by global norm, then the optimizer by name with decoupled weight decay on matrices.

    Args:
      axes: for each parameter the tuple of its logical axes (`step.param_axes`), same tree as the parameters.
    """
    rate = make_schedule(config, steps)
    is_axes = lambda x: isinstance(x, tuple)
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == FROZEN, axes, is_leaf=is_axes
    )
    has_frozen = any(jax.tree.leaves(frozen))
    decay_mask = jax.tree.map(
        lambda a, is_frozen: is_matrix(a) and not is_frozen, axes, frozen, is_leaf=is_axes
    )
    decay = dict(weight_decay=config.weight_decay, mask=decay_mask)
    adam = dict(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if config.name == "adamw":
        tx = optax.adamw(rate, **adam, **decay)
    elif config.name == "lion":
        tx = optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
    elif config.name == "adabelief":
        # optax.adabelief takes no weight decay.
        belief = optax.scale_by_belief(**adam)
        tx = optax.chain(
            belief, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)
        )
    elif config.name == "muon":
        dims = jax.tree.map(muon_dimensions, axes, is_leaf=is_axes)
        # consistent_rms 0.2 makes a matrix update as large as Adam's (arXiv 2502.16982), so one rate serves both.
        tx = muon(
            rate,
            beta=0.95,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=dims,
            consistent_rms=0.2,
        )
    else:
        tx = _schedule_free(config, rate, decay)
    tx = optax.chain(tx, optax.transforms.freeze(frozen)) if has_frozen else tx
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx) if config.clip_norm else tx


def _schedule_free(
    config: OptimConfig, rate: optax.Schedule, decay: dict
) -> optax.GradientTransformation:
    if config.schedule != "constant":
        raise InputError(
            f"config.optim.schedule: got {config.schedule!r}, expected 'constant' with schedule_free"
        )
    # Its averaging takes the place of Adam's first moment (arXiv 2405.15682).
    base = optax.adamw(rate, b1=0.0, b2=config.beta2, eps=config.eps, **decay)
    return schedule_free(base, rate, b1=config.beta1)


def evaluation_params(opt_state, params):
    """The parameters to evaluate: schedule-free's average where the optimizer keeps one, else `params`."""
    has_average = lambda s: hasattr(s, "z") and hasattr(s, "b1")
    averages = [s for s in jax.tree.leaves(opt_state, is_leaf=has_average) if has_average(s)]
    return schedule_free_eval_params(averages[0], params) if averages else params


def is_matrix(axes: Axes) -> bool:
    """Whether weight decay applies to a parameter with these logical axes."""
    return bool(MATRIX_AXES.intersection(axes))


def muon_dimensions(axes: Axes) -> MuonDimensionNumbers | None:
    """Which axes Muon contracts and which it produces; None sends the parameter (tables, vectors) to Adam.

    Left to itself, optax would send every stack of matrices to Adam: layers under scan, and experts.
    """
    if not is_matrix(axes) or "embed_vocab" in axes:
        return None
    matrix = [i for i, name in enumerate(axes) if name not in STACK_AXES]
    split = len(matrix) - 1 if axes[matrix[-1]] == "embed" else 1
    return MuonDimensionNumbers(tuple(matrix[:split]), tuple(matrix[split:]))
