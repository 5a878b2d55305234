"""Second derivatives of an op whose gradient is a program that cannot be differentiated.

A kernel's backward pass has no derivative, and neither has a loop whose length is not known. What
it computes is still the gradient of a function that a slow and plain program computes as well: the
derivative of the gradient is taken of that one, and so are all higher ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def kept[Inputs](inputs: Inputs) -> Inputs:
    """A call's own arrays, to be residuals of a forward pass that is differentiated itself.

    The barrier makes them other arrays than the arguments. jax (0.11.2, 0.12) leaves arguments out
    of the residuals and puts them back later; under a second derivative inside of `lax.scan` it
    puts them back in other places.

    Args:
      inputs: a pytree of arrays.
    """
    return jax.lax.optimization_barrier(inputs)


def differentiable_gradient[Inputs, Result](
    gradient: Callable[[Any, Result], Inputs],
    plain: Callable[[Inputs], Result],
    residuals: Any,
    inputs: Inputs,
    dy: Result,
) -> Inputs:
    """gradient(residuals, dy), whose derivatives are those of the gradient of `plain`.

    Args:
      gradient: the op's backward pass: the gradient of every float in `inputs`, None for the rest.
      plain: the op as a program that reverse mode can differentiate, of the same inputs.
      residuals: what the forward pass saved. Its derivative is taken through `inputs` alone.
      inputs: a pytree of the arrays of the call.
      dy: the gradient of the op's result, a pytree as that.

    Returns:
      As `gradient`.
    """
    leaves, tree = jax.tree.flatten(inputs)
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    floats = [x for x, is_one in zip(leaves, is_float) if is_one]
    others = [x for x, is_one in zip(leaves, is_float) if not is_one]

    def plain_gradient(floats: list[Array], others: list[Array], dy: Result) -> list[Array]:
        def of_floats(floats: list[Array]) -> Result:
            in_order = [iter(others), iter(floats)]
            merged = [next(in_order[is_one]) for is_one in is_float]
            return plain(tree.unflatten(merged))

        _, pullback = jax.vjp(of_floats, floats)
        return pullback(dy)[0]

    @jax.custom_vjp
    def first(residuals: Any, floats: list[Array], others: list[Array], dy: Result) -> Inputs:
        return gradient(residuals, dy)

    def first_forward(residuals: Any, floats: list[Array], others: list[Array], dy: Result):
        return gradient(residuals, dy), (floats, others, dy)

    def first_backward(saved: tuple, cotangent: Inputs):
        floats, others, dy = saved

        def of_floats(floats: list[Array], dy: Result) -> list[Array]:
            return plain_gradient(floats, others, dy)

        _, pullback = jax.vjp(of_floats, floats, dy)
        # Nothing but floats has a gradient, so these are all leaves, in the order of the inputs.
        dfloats, ddy = pullback(jax.tree.leaves(cotangent))
        return None, dfloats, None, ddy

    first.defvjp(first_forward, first_backward)
    return first(residuals, floats, others, dy)
