"""The largest eigenvalue of a loss's Hessian by Lanczos, from products with vectors alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PRNGKeyArray, PyTree

# A new direction that is shorter than this part of the last one is rounding: the space is used up.
LEAST_RESIDUAL = 1e-6
# Along a vector of length 1, to either side.
STEP = 1e-2


def largest_eigenvalue(
    loss: Callable[..., Float[Array, ""]],
    params: PyTree,
    key: PRNGKeyArray,
    iterations: int = 20,
    batch: tuple[Any, ...] = (),
) -> float:
    """Of the Hessian of `loss` at `params`.

    Args:
      loss: a function of the parameters, and of `batch`.
      params: where.
      key: of the first vector.
      iterations: products with the Hessian; each costs about two gradients.
      batch: further arguments of the loss. As constants of it, every batch would be compiled.
    """
    flat, unravel = ravel_pytree(params)

    def of_flat(flat: Array, *batch: Any) -> Array:
        return loss(unravel(flat), *batch)

    @jax.jit
    def product(flat: Array, vector: Array, *batch: Any) -> Array:
        # A difference of gradients: kernels with a gradient of their own have no forward mode.
        ahead = jax.grad(of_flat)(flat + STEP * vector, *batch)
        behind = jax.grad(of_flat)(flat - STEP * vector, *batch)
        return (ahead - behind) / (2.0 * STEP)

    start = jax.random.normal(key, flat.shape, flat.dtype)
    values = lanczos(lambda vector: product(flat, vector, *batch), start, iterations)
    return float(values[-1])


def lanczos(
    product: Callable[[Any], Any],
    start: Float[Array, " N"],
    iterations: int,
) -> Float[np.ndarray, " k"]:
    """Ritz values of a symmetric matrix, ascending: the outermost are its eigenvalues first.

    Every direction is made orthogonal to all before it, twice: in float32 the three-term recurrence
    alone finds the largest eigenvalue again and again.

    Args:
      product: the matrix times a vector.
      start: any vector that is not 0.
      iterations: at most so many products.
    """
    basis = jnp.zeros((iterations, start.size), start.dtype)
    vector = start / jnp.linalg.norm(start)
    diagonal = []
    beside = []
    for count in range(iterations):
        basis = basis.at[count].set(vector)
        moved = product(vector)
        diagonal.append(float(jnp.vdot(vector, moved)))
        rest, residual, length = _across(basis, moved)
        if count + 1 == iterations or float(residual) <= LEAST_RESIDUAL * float(length):
            break
        beside.append(float(residual))
        vector = rest / residual
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return np.linalg.eigvalsh(matrix)


@jax.jit
def _across(
    basis: Float[Array, "k N"],
    moved: Float[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, ""], Float[Array, ""]]:
    """What of a vector is orthogonal to all directions so far, its length, and the vector's."""
    rest = moved
    for _ in range(2):
        rest = rest - basis.T @ (basis @ rest)
    return rest, jnp.linalg.norm(rest), jnp.linalg.norm(moved)
