"""Attention of exponentials as recurrences, one for each order of the exponential (2507.23632).

    exp(scale q k) = sum_n (scale q k)^n / n!,   (q k)^n = q^(n) k^(n)

where x^(n) is the n-th Kronecker power of x, of K^n channels: a sum of linear attentions without
decay, whose states grow with the order. For studies of what softmax has and linear attention, its
first order, has not; K^n is soon too large for anything else.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.linear_scan import linear_scan


def kronecker_power(x: Float[Array, "... K"], order: int) -> Float[Array, "... _"]:
    """All products of `order` channels of x: K^order of them, a single 1 for order 0."""
    power = jnp.ones_like(x[..., :1])
    for _ in range(order):
        products = power[..., :, None] * x[..., None, :]
        power = products.reshape(*x.shape[:-1], -1)
    return power


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    order: int,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """sum_j exp(scale q_i k_j) v_j over the keys up to i, its series cut behind `order`.

    The limit is `attention(q, k, v, normalizer=Exp(cap))` with logits below the cap.

    Args:
      q, k, v: queries, keys and values.
      order: the highest power, 0 or more.
      scale: of the logits; K**-0.5 if None.
      segment_ids: documents, as of `linear_scan`.

    Raises:
      ValueError: an order below 0.
    """
    if order < 0:
        raise ValueError(f"taylor_attention: order: got {order}, expected 0 or more")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    total = jnp.zeros_like(v)
    for n in range(order + 1):
        of_order: Any = linear_scan(
            kronecker_power(q, n),
            kronecker_power(k, n),
            v,
            scale=scale**n / math.factorial(n),
            segment_ids=segment_ids,
        )
        total = total + of_order
    return total
