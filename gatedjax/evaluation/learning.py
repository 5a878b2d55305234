"""What commands share that teach a trained model something small: its text, and Adam."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gatedjax.data import Batch, batches, make_dataset
from gatedjax.errors import require
from gatedjax.sharding import my_rows
from gatedjax.training.run import Run


def training_text(run: Run) -> Iterator[Batch]:
    """Batches of what a run trains on, in its order."""
    data = run.config.data
    rows = run.config.train.batch_size
    dataset = make_dataset(
        data, "train", batch_size=rows, rows=my_rows(run.mesh, rows), seed=data.seed
    )
    return batches(dataset)


def held_out_text(run: Run, most: int, least: int = 1) -> Iterator[Batch]:
    """The first batches of a run's validation text.

    Args:
      run: whose.
      most: so many batches at most.
      least: so many at least.

    Raises:
      InputError: there are fewer.
    """
    data = run.config.data
    rows = run.config.train.batch_size
    dataset = make_dataset(
        data, "validation", batch_size=rows, rows=my_rows(run.mesh, rows), seed=data.seed
    )
    require(
        len(dataset) >= least,
        "--checkpoint",
        f"{len(dataset)} batches of validation text",
        f"at least {least}",
    )
    return batches(dataset[: min(most, len(dataset))])


def followed(
    loss: Callable[..., Array],
    start: Any,
    stream: Iterator[Batch],
    steps: int,
    rate: float,
    *fixed: Any,
) -> tuple[Any, float]:
    """Adam's result and the last loss, of `loss(learning, *fixed, batch)`.

    Args:
      loss: of what learns.
      start: what learns, a tree of arrays.
      stream: the batches.
      steps: how many of them.
      rate: of Adam.
      fixed: further trees of arrays.
    """
    tx = optax.adam(rate)

    @jax.jit
    def step(learning: Any, state: Any, fixed: Any, batch: Batch):
        value, gradient = jax.value_and_grad(loss)(learning, *fixed, batch)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(learning, updates), state, value

    learning = start
    state = tx.init(start)
    value = jnp.float32(0.0)
    for _ in range(steps):
        learning, state, value = step(learning, state, fixed, next(stream))
    return learning, float(value)
