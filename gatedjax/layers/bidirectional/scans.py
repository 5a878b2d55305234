"""Linear attention with decays in both directions: two scans.

    LION (arXiv 2502.16249)     o_i = sum_j m_ij q_i k_j v_j / sum_j m_ij q_i k_j
                                m_ij = product of a_l over l = min(i, j) + 1 ... max(i, j)
    ViG (arXiv 2405.18425)      the mean of a forward and a backward scan, each with its own decays,
                                and with the token itself in both

LION's matrix is a forward scan plus a backward one that reads the state before the token's own
write: there the key of token j is multiplied by a_j and decays by what lies between, so nothing is
subtracted. On a column of ones beside the values the same two scans give the sum of weights.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.linear_scan import linear_scan
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last

Decay = Float[Array, "H"] | Float[Array, "B T H"] | Float[Array, "B T H F"]
Order = Int[np.ndarray, " T"]


def both_directions(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T Hk F"],
    v: Float[Array, "B T Hk V"],
    log_decay: Decay | None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T H V"]:
    """sum_j m_ij q_i k_j v_j over the document, where m_ij is LION's product of decays.

    Args:
      q, k, v: features and values.
      log_decay: log a; None for 1.
      segment_ids, chunk_size, implementation: as of `linear_scan`.
    """
    options: dict[str, Any] = dict(
        scale=1.0,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    forward = _scan(q, k, v, log_decay, **options)
    later = k
    if log_decay is not None:
        if k.shape[2] != q.shape[2]:
            # Heads of a group have decays of their own.
            later = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        decay = jnp.exp(log_decay.astype(jnp.promote_types(k.dtype, jnp.float32)))
        if decay.ndim < 4:
            decay = decay[..., None]
        later = (later * decay).astype(k.dtype)
    backward = _scan(q, later, v, log_decay, inclusive=False, reverse=True, **options)
    return forward + backward


def lion(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T Hk F"],
    v: Float[Array, "B T Hk V"],
    log_decays: Sequence[Decay | None],
    *,
    orders: Sequence[Order | None] = (None,),
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T H V"]:
    """Normalized linear attention with decays by distance, along one order of tokens or several.

    Args:
      q, k: features; their products are not negative.
      v: values.
      log_decays: log a for each order, of the tokens as they stand in q.
      orders: which token comes first, second ...; None as they stand. The weights of several orders
        are averaged before they are normalized.
      segment_ids: documents; only with tokens as they stand.
      chunk_size, implementation: as of `linear_scan`.

    Returns:
      o, in v's dtype.
    """
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    with_ones = append_ones(v.astype(dtype))
    total = jnp.zeros((), dtype)
    for log_decay, order in zip(log_decays, orders, strict=True):
        q_in_order, k_in_order, v_in_order = q, k, with_ones
        if order is not None:
            q_in_order, k_in_order, v_in_order = (x[:, order] for x in (q, k, with_ones))
            if log_decay is not None and log_decay.ndim > 1:
                log_decay = log_decay[:, order]
        sums = both_directions(
            q_in_order,
            k_in_order,
            v_in_order,
            log_decay,
            segment_ids=segment_ids,
            chunk_size=chunk_size,
            implementation=implementation,
        )
        if order is not None:
            sums = sums[:, np.argsort(order)]
        total = total + sums
    # A mean over orders, numerator and denominator alike.
    return divide_by_last(total / len(orders)).astype(v.dtype)


def vision_gla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    forward_log_decay: Float[Array, "B T H K"],
    backward_log_decay: Float[Array, "B T H K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T H V"]:
    """The mean of GLA forward and GLA backward, with the same queries, keys and values.

    Args:
      q, k, v: of the tokens.
      forward_log_decay, backward_log_decay: of each direction.
      segment_ids, chunk_size, implementation: as of `linear_scan`.

    Returns:
      o, in v's dtype, scaled by K^-0.5.
    """
    options: dict[str, Any] = dict(
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    forward = _scan(q, k, v, forward_log_decay, **options)
    backward = _scan(q, k, v, backward_log_decay, reverse=True, **options)
    return (forward + backward) / 2


def _scan(q: Array, k: Array, v: Array, log_decay: Array | None, **options: Any) -> Array:
    """The outputs of a scan, without its last state."""
    o: Any = linear_scan(q, k, v, log_decay, **options)
    return o
