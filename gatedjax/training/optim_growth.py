"""What the state of an optimizer says of batches that grow (`growing.py`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


def doublings(opt_state: optax.OptState) -> int:
    """How often the batch has doubled before this state."""
    assert isinstance(opt_state, GrowthState)
    return int(opt_state.doublings)


class GrowthState(NamedTuple):
    """An optimizer's state, and how often the batch has doubled: it is kept with checkpoints."""

    doublings: Any
    inner: Any


def growing(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose state says how far batches have grown."""

    def init(params: Any) -> GrowthState:
        return GrowthState(jnp.int32(0), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, GrowthState]:
        updates, inner = tx.update(updates, state.inner, params)
        return updates, GrowthState(state.doublings, inner)

    return optax.GradientTransformation(init, update)


def with_doublings(opt_state: Any, doublings: int) -> GrowthState:
    """The state after batches have doubled so often."""
    # Where the old number was: the program's inputs keep their places.
    placed = jax.device_put(np.int32(doublings), opt_state.doublings.sharding)
    return GrowthState(placed, opt_state.inner)
