"""SOFT (arXiv 2110.11945): attention by a Gaussian kernel and landmarks, without softmax.

    kernel(x, y) = exp(-|x - y|^2 / 2)
    o = kernel(q, m) A kernel(m, q) v        A near the inverse of kernel(m, m)

Queries are the keys. The inverse is made by Newton's iteration, of matrix products alone, and has a
backward pass of its own, which does not go through the iteration.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# Added to the diagonal, and what of the largest safe start is taken, as the published code.
DIAGONAL = 0.01
START = 0.9


def gaussian_kernel(
    x: Float[Array, "... n D"],
    y: Float[Array, "... m D"],
) -> Float[Array, "... n m"]:
    """exp(-|x_i - y_j|^2 / 2)."""
    products = jnp.einsum("...nd,...md->...nm", x, y, precision="highest")
    x_square = jnp.sum(x * x, axis=-1)[..., :, None]
    y_square = jnp.sum(y * y, axis=-1)[..., None, :]
    # Rounding may leave a distance below 0.
    distance = jnp.maximum(x_square + y_square - 2.0 * products, 0.0)
    return jnp.exp(-distance / 2)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def newton_inverse(
    matrix: Float[Array, "... m m"],
    iterations: int = 20,
) -> Float[Array, "... m m"]:
    """The inverse of P = matrix + 0.01 I by `iterations` steps A <- 2 A - A P A.

    The error of an eigenvalue squares at every step, from 1 - 1.8 (eigenvalue / largest sum of a
    row)^2: small eigenvalues need more steps, and count as larger ones until then.

    Args:
      matrix: symmetric, positive, of numbers that are not negative.
      iterations: how many steps.

    Returns:
      The inverse. Its gradient is that of the exact inverse, -A^T dA A^T.
    """
    size = matrix.shape[-1]
    largest_sum = jnp.max(jnp.sum(matrix, axis=-1), axis=-1)[..., None, None]
    shifted = matrix + DIAGONAL * jnp.eye(size, dtype=matrix.dtype)

    def step(inverse: Array, _: None) -> tuple[Array, None]:
        product = jnp.matmul(shifted, inverse, precision="highest")
        return 2.0 * inverse - jnp.matmul(inverse, product, precision="highest"), None

    start = START * 2.0 / largest_sum**2 * shifted
    inverse, _ = jax.lax.scan(step, start, None, length=iterations)
    return inverse


def _newton_forward(matrix: Array, iterations: int) -> tuple[Array, Array]:
    inverse = newton_inverse(matrix, iterations)
    return inverse, inverse


def _newton_backward(iterations: int, inverse: Array, gradient: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    half = jnp.matmul(transposed, gradient, precision="highest")
    return (-jnp.matmul(half, transposed, precision="highest"),)


newton_inverse.defvjp(_newton_forward, _newton_backward)


def softmax_free_attention(
    q: Float[Array, "B T H D"],
    landmarks: Float[Array, "B m H D"],
    v: Float[Array, "B T H V"],
    *,
    iterations: int = 20,
) -> Float[Array, "B T H V"]:
    """What tokens see of each other through the landmarks. Linear in T.

    Args:
      q: queries, which are the keys too, scaled.
      landmarks: a few vectors that stand for all queries.
      v: values.
      iterations: of `newton_inverse`.

    Returns:
      o, in v's dtype; computed in float32 or better.
    """
    dtype = jnp.promote_types(jnp.result_type(q, v), jnp.float32)

    def heads_first(x: Array) -> Array:
        return jnp.swapaxes(x.astype(dtype), 1, 2)

    queries, points, values = heads_first(q), heads_first(landmarks), heads_first(v)
    to_landmarks = gaussian_kernel(queries, points)
    inverse = newton_inverse(gaussian_kernel(points, points), iterations)
    gathered = jnp.einsum("bhtm,bhtv->bhmv", to_landmarks, values, precision="highest")
    spread = jnp.matmul(inverse, gathered, precision="highest")
    o = jnp.matmul(to_landmarks, spread, precision="highest")
    return jnp.swapaxes(o, 1, 2).astype(v.dtype)
