"""Kernelized attention with relative positions in n log n steps (arXiv 2106.12566).

    o_i = sum_j e^{b_{j-i}} q_i k_j v_j / sum_j e^{b_{j-i}} q_i k_j

The weights of positions are a Toeplitz matrix. It multiplies k_j^T v_j, of K V channels a token, by
three Fourier transforms of twice the length.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last


def toeplitz_product(
    x: Float[Array, "B T H *channels"],
    weights: Float[Array, "H _"],
) -> Float[Array, "B T H *channels"]:
    """y_i = sum_j w_{j-i} x_j.

    Args:
      x: one array of channels a token and head.
      weights: w_{-(T-1)} ... w_{T-1} of every head, 2 T - 1 of them.
    """
    T = x.shape[1]
    size = 1 << (2 * T - 2).bit_length()
    # As a circular convolution: w_d is at place -d.
    offsets = jnp.arange(-(T - 1), T)
    kernel = jnp.zeros((size, weights.shape[0]), weights.dtype)
    kernel = kernel.at[-offsets % size].set(weights.T)
    kernel = kernel.reshape(1, size, weights.shape[0], *[1] * (x.ndim - 3))
    spectrum = jnp.fft.rfft(x, n=size, axis=1) * jnp.fft.rfft(kernel, axis=1)
    return jnp.fft.irfft(spectrum, n=size, axis=1)[:, :T]


def relative_linear_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T H F"],
    v: Float[Array, "B T H V"],
    bias: Float[Array, "H _"],
) -> Float[Array, "B T H V"]:
    """Normalized linear attention whose weights are multiplied by e^{b_{j-i}}.

    Args:
      q, k: features; their products are not negative. The paper makes vectors of length 1 of them.
      v: values.
      bias: b_{-(T-1)} ... b_{T-1} of every head.

    Returns:
      o, in v's dtype; computed in float32 or better.
    """
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    bias = bias.astype(dtype)
    # The largest weight is 1: the rest is divided out.
    weights = jnp.exp(bias - jax.lax.stop_gradient(jnp.max(bias, axis=1, keepdims=True)))
    with_ones = append_ones(v.astype(dtype))
    products = k.astype(dtype)[..., :, None] * with_ones[..., None, :]
    sums = toeplitz_product(products, weights)
    o = jnp.einsum("bthf,bthfv->bthv", q.astype(dtype), sums, precision="highest")
    return divide_by_last(o).astype(v.dtype)
