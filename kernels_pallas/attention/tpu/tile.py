"""The mathematics of a tile on TPU: logits and masks in both orientations, and softmax in the registers' own shape.

Rows of a tile are queries in the forward pass and keys in the backward pass, where statistics of queries then run along
lanes and are broadcast over sublanes for nothing.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.attention.normalizers.base import Added, Normalizer, Softmax, finite, masked
from kernels_pallas.attention.tpu.plan import LANES, Plan

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # what is summed over: x y, x y^T, x^T y


def matmul(plan: Plan, x: Array, y: Array, dims=NN) -> Array:
    """Float32 sums of products: of bfloat16, or of float32 that keep their bits."""
    dtype, precision = (jnp.bfloat16, None) if plan.rounds else (jnp.float32, "highest")
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (dims, ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


class Positions(NamedTuple):
    """Of queries and keys in a tile, int32: one runs down, the other along lanes. Segments as they do, or None."""

    queries: Array
    keys: Array
    query_segments: Array | None = None
    key_segments: Array | None = None


def positions(first_query, queries: int, first_key, keys: int, turned: bool) -> Positions:
    """[R, 1] and [1, C]; `turned`, [1, R] and [C, 1]."""
    along = lambda first, n, axis: (
        first + lax.broadcasted_iota(jnp.int32, (n, 1) if axis == 0 else (1, n), axis)
    )
    return Positions(
        along(first_query, queries, int(turned)), along(first_key, keys, int(not turned))
    )


def seen(plan: Plan, at: Positions, masks: bool) -> Array | None:
    """The mask of a tile; None if everything is seen. Without `masks` only segments decide."""
    found = []
    if masks:
        distance = at.queries - at.keys
        if plan.causal:
            found.append(distance >= 0)
        elif plan.T % plan.forward.block or plan.T % plan.backward.block:
            found.append(jnp.broadcast_to(at.keys < plan.T, distance.shape))
        if plan.slopes:
            found.append(jnp.broadcast_to(at.queries < plan.T, distance.shape))
        if plan.window is not None:
            found.append((distance if plan.causal else jnp.abs(distance)) < plan.window)
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


def logits(plan: Plan, x: Array, y: Array, slope, at: Positions) -> Logits:
    """Of queries by keys or keys by queries, as x and y come."""
    s = matmul(plan, x, y, NT) * plan.scale
    if plan.logits_soft_cap is not None:
        s = plan.logits_soft_cap * jnp.tanh(s * (1 / plan.logits_soft_cap))
    if slope is None:
        return Logits(s, s, None)
    distance = jnp.abs(at.queries - at.keys).astype(jnp.float32)
    return Logits(s - slope * distance, s, distance)


@dataclass(frozen=True)
class LaneSoftmax(Softmax):
    """`Softmax` whose rows of statistics are [R, 128]: the maximum in every lane, the sum spread over lanes.

    A column [R, 1] would be broadcast over lanes in every tile, and a sum along lanes taken, where here one is taken at
    the end: a quarter of the time of v6e.
    """

    lanes: ClassVar[int] = LANES

    def start(self, zero, known=(), sink=None):
        if sink is None:
            return zero - jnp.inf, zero
        first = lax.broadcasted_iota(jnp.int32, zero.shape, 1) == 0
        return sink, jnp.where(first & (sink > -jnp.inf), 1.0, zero)

    def add(self, row, s, seen, keys):
        before, total = row
        s = masked(s, seen)
        m = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
        shift = finite(m)
        p, keep = jnp.exp(s - across(shift, s.shape[1])), jnp.exp(before - shift)
        folded = sum(p[:, n : n + LANES] for n in range(0, p.shape[1], LANES))
        return Added((m, keep * total + folded), keep, (p,))

    def finish(self, row, sums):
        m, total = row
        total = jnp.sum(total, axis=-1, keepdims=True)
        return super().finish((m[:, :1], total), sums)


def on_tpu(normalizer: Normalizer) -> Normalizer:
    """The normalizer in the form that is quickest here."""
    return LaneSoftmax() if type(normalizer) is Softmax else normalizer


def lanes(normalizer: Normalizer) -> int:
    """Of a row's statistics."""
    return getattr(normalizer, "lanes", 1)


def across(x: Array, width: int) -> Array:
    """[R, 128] with equal lanes as [R, width]; a column as it is."""
    return x if x.shape[1] in (1, width) else jnp.tile(x, (1, width // LANES))


def as_row(column: Array) -> Array:
    """[R, 1] -> [1, R]."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]


def as_column(row: Array) -> Array:
    """[1, R] -> [R, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def open_gate(gate: Array) -> Array:
    """The sigmoid, in float32: by tanh, one instruction here, where 1 / (1 + exp) is a dozen and nothing hides them."""
    return 0.5 * jnp.tanh(0.5 * gate.astype(jnp.float32)) + 0.5
