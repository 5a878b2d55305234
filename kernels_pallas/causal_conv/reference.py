"""`causal_conv` by its formula, tap by tap: slow, plain, exact."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.causal_conv.inputs import ConvInputs
from kernels_pallas.common.precision import accumulator_dtype


def causal_conv(inputs: ConvInputs, is_activated: bool) -> Float[Array, "B T F"]:
    """`y_t = silu(bias + sum_lag kernel[W-1-lag] x_{t-lag})` over the inputs of t's own segment.

    In float32 (or float64), rounded once.
    """
    x, kernel, bias, segment_ids = inputs
    dtype = accumulator_dtype(x.dtype)
    T, W = x.shape[1], kernel.shape[0]
    token = jnp.arange(T)
    y = jnp.zeros(x.shape, dtype)
    for lag in range(W):
        source = token - lag
        exists = source >= 0
        source = jnp.maximum(source, 0)
        is_seen = jnp.broadcast_to(exists, x.shape[:2])
        if segment_ids is not None:
            is_seen = is_seen & (segment_ids[:, source] == segment_ids)
        # Zeros before the product: NaN times 0 is NaN.
        seen = jnp.where(is_seen[..., None], x[:, source].astype(dtype), 0.0)
        y = y + seen * kernel[W - 1 - lag, None, None].astype(dtype)
    if bias is not None:
        y = y + bias[None, None].astype(dtype)
    return (jax.nn.silu(y) if is_activated else y).astype(x.dtype)
