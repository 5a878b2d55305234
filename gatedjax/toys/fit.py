"""A short training run of a toy."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from jaxtyping import Float, PyTree


def fitted(
    loss: Callable[[PyTree, Any], Float[Array, ""]],
    params: PyTree,
    batch: Callable[[Array], Any],
    *,
    steps: int,
    rate: float,
    seed: int = 0,
) -> PyTree:
    """The parameters after some steps of Adam, a batch of new examples each.

    Args:
      loss: of parameters and a batch.
      params: at the start.
      batch: draws one, by a random key.
      steps: how many.
      rate: of learning.
      seed: of the batches.
    """
    tx = optax.adam(rate)

    def step(carry: tuple[PyTree, Any], key: Array) -> tuple[tuple[PyTree, Any], None]:
        params, state = carry
        gradient = jax.grad(loss)(params, batch(key))
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))
    return params
