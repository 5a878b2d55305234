"""Gradient descent on data that is drawn anew for every step: how the small layers are trained."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array


def trained_on_fresh_data[Params: tuple[Any, ...] | dict[str, Any]](
    tx: optax.GradientTransformation,
    loss: Callable[[Params, Any], Array],
    draw: Callable[[Array], Any],
    start: Params,
    keys: Array,
) -> Params:
    """The parameters after a step for each key; to be called inside `jax.jit`.

    Args:
      tx: the optimizer.
      loss: of parameters and a batch.
      draw: a batch, from a key.
      start: the parameters before, by name.
      keys: of the steps.
    """

    def step(carry: tuple[Params, optax.OptState], key: Array) -> tuple:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, draw(key)), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), keys)
    return params
