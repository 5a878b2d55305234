"""Parameters with logical axis names, and who gets to see the names."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

_boxed = contextvars.ContextVar("boxed", default=False)


@contextlib.contextmanager
def boxed_parameters() -> Iterator[None]:
    """Inside this block, `init` returns parameters in boxes that carry their logical axis names.

    Sharding and optimizers need the names (`training.state.init_params`); everybody else gets plain
    arrays.
    """
    token = _boxed.set(True)
    try:
        yield
    finally:
        _boxed.reset(token)


def parameter(
    module: nn.Module,
    name: str,
    axes: Sequence[str | None],
    shape: Sequence[int],
    init: Callable[..., Array],
) -> Array:
    """A float32 parameter of `module`.

    Args:
      module: who owns the parameter.
      name: its name within the module.
      axes: the logical name of every axis (`sharding.RULES`); None for an axis that is never cut.
      shape: the size of every axis.
      init: the initializer, `(key, shape, dtype) -> Array`.

    Returns:
      The parameter's value, without its box.
    """
    boxed_init: Any = init
    if _boxed.get():
        boxed_init = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(
        name,
        boxed_init,
        tuple(shape),
        jnp.float32,
    )
