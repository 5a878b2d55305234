"""The norm that layers and ops share."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from kernels_pallas.common.precision import accumulator_dtype

# For `jax.checkpoint` policies: a number for each vector, which a backward pass would read all
# vectors for.
ROOT_NAME = "rms_norm_inverse_root"


def rms_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    eps: float,
) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (or float64).

    Returns x's dtype (arXiv 1910.07467).
    """
    dtype = accumulator_dtype(x.dtype)
    wide = x.astype(dtype)
    scale = jnp.expand_dims(scale.astype(dtype), range(x.ndim - 1))
    return (wide * _inverse_root(wide, eps) * scale).astype(x.dtype)


def _named_inverse_root(x: Float[Array, "... D"], eps: float) -> Float[Array, "... 1"]:
    """`1 / sqrt(mean(x^2) + eps)`."""
    # Not centered: RMSNorm leaves the mean alone.
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return checkpoint_name(lax.rsqrt(mean_square + eps), ROOT_NAME)


# Its derivative asks for the named result, where that of rsqrt would ask for the mean too.
_inverse_root = jax.custom_jvp(_named_inverse_root, nondiff_argnums=(1,))


@_inverse_root.defjvp
def _inverse_root_jvp(eps: float, primals: tuple[Array], tangents: tuple[Array]):
    (x,), (dx,) = primals, tangents
    r = _named_inverse_root(x, eps)
    return r, -(r * r * r) * jnp.mean(x * dx, axis=-1, keepdims=True)
