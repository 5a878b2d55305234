"""The mathematics of a tile as the GPU kernels want it: logits and masks, of queries by keys or turned over.

In the kernel of dk and dv keys run down and queries along a row, so that what is multiplied again is never transposed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention.gpu.plan import Plan


def matmul(p: Plan, x: Array, y: Array, trans_y: bool = False) -> Array:
    """Float32 sums of products, as the tensor core takes them. Inputs of 16 bits are multiplied as such."""
    if p.interpret or x.dtype != y.dtype or x.dtype.itemsize > 2:
        x, y = x.astype(p.operand), y.astype(p.operand)
    precision = p.precision if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, trans_b=trans_y, precision=precision)


class Places(NamedTuple):
    """Of queries and keys in a tile, int32: one [R, 1], the other [1, C]. Segments as they do, or None."""

    queries: Array
    keys: Array
    query_segments: Array | None = None
    key_segments: Array | None = None


def seen(p: Plan, at: Places, masks: bool) -> Array | None:
    """The mask of a tile; None if everything is seen. Without `masks` only segments decide."""
    found = []
    if masks:
        distance = at.queries - at.keys
        found.append(distance >= 0 if p.causal else jnp.broadcast_to(at.keys < p.T, distance.shape))
        if p.window is not None:
            found.append((distance if p.causal else jnp.abs(distance)) < p.window)
    if at.query_segments is not None:
        found.append(at.query_segments == at.key_segments)
    if not found:
        return None
    result = found[0]
    for other in found[1:]:
        result = result & other
    return result


class Logits(NamedTuple):
    """A tile of them before the mask, and before slopes."""

    s: Array
    capped: Array
    distance: Array | None


def logits(p: Plan, x: Array, y: Array, slope, distance) -> Logits:
    """Of queries by keys or keys by queries, as x and y come; `distance` of each pair, where there is a slope."""
    s = matmul(p, x, y, trans_y=True) * p.scale
    if p.logits_soft_cap is not None:
        s = p.logits_soft_cap * jnp.tanh(s * (1 / p.logits_soft_cap))
    if slope is None:
        return Logits(s, s, None)
    distance = distance.astype(jnp.float32)
    return Logits(s - slope * distance, s, distance)


def through_cap(p: Plan, s: Logits, ds: Array) -> Array:
    """The gradient of logits before the soft cap."""
    return ds if p.logits_soft_cap is None else ds * (1 - (s.capped * (1 / p.logits_soft_cap)) ** 2)
