"""The guard against bad steps: which are taken, and what it remembers of them."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float

from gatedjax.config import Config

# Steps before the spike test trusts its running mean.
GUARD_WARMUP = 20

# The running mean of gradient norms looks back over about this many steps.
GUARD_MEMORY = 100

# A number in the state: an array of shape [], or its shape or sharding in a tree of those.
Scalar = Any


@struct.dataclass
class Guard:
    """What the guard against bad steps remembers: a float32 mean, int32 counts of steps."""

    mean_grad_norm: Scalar
    accepted: Scalar
    skipped: Scalar
    skipped_in_a_row: Scalar


def guarded(
    config: Config,
    guard: Guard,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to take this step, and the guard's new memory."""
    is_good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.optim.skip_factor:
        limit = config.optim.skip_factor * guard.mean_grad_norm
        is_known = guard.accepted >= GUARD_WARMUP
        is_spike = is_known & (grad_norm > limit)
        is_good &= ~is_spike
    accepted = guard.accepted + is_good
    # A plain mean at first, then an exponential one.
    count = jnp.clip(accepted, 1, GUARD_MEMORY)
    weight = 1.0 / count.astype(jnp.float32)
    change = grad_norm - guard.mean_grad_norm
    mean = guard.mean_grad_norm + weight * change
    new_guard = Guard(
        mean_grad_norm=jnp.where(is_good, mean, guard.mean_grad_norm),
        accepted=accepted,
        skipped=guard.skipped + (~is_good).astype(jnp.int32),
        skipped_in_a_row=jnp.where(is_good, 0, guard.skipped_in_a_row + 1),
    )
    return is_good, new_guard
