"""One tile of the Mosaic GPU kernel: 64 queries against a block of keys, as a warp group has them.

As `attention/tile.py` and `Softmax` in `normalizers/base.py`, in the form that a warp group can
compute: a number by row is a vector [R] and no column [R, 1], an array knows how it lies in the
threads' registers (its layout), and logits are in the unit of `exp2`, log2(e) times their own. A
vector can be broadcast to a tile only if its layout is a reduced one of the tile's.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float

from kernels_pallas.attention.mosaic_gpu.plan import ROWS, Plan
from kernels_pallas.common.gpu import LOG2_E

# How accumulators of matrix instructions lie in registers, and sums over their columns.
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)


class Rows(NamedTuple):
    """What 64 rows have seen so far.

    Attributes:
      largest: the largest logit, in the unit of `exp2`; -inf before the first.
      total: of weights.
      sum: of weighted values.
    """

    largest: Float[Array, "R"]
    total: Float[Array, "R"]
    sum: Float[Array, "R D"]


class Weighted(NamedTuple):
    """What a tile does to its rows."""

    largest: Float[Array, "R"]
    total: Float[Array, "R"]
    # What the sum so far is multiplied by.
    keep: Float[Array, "R"]
    weights: Float[Array, "R C"]


def start(plan: Plan) -> Rows:
    """Rows that have seen nothing."""
    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    empty = plgpu.layout_cast(jnp.zeros((ROWS, plan.D), jnp.float32), TILE)
    return Rows(
        largest=plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW),
        total=zero,
        sum=empty,
    )


def by_row(x: Float[Array, "R"], columns: int) -> Float[Array, "R columns"]:
    """The number of a row in every column."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def logits(plan: Plan, products: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """From the products q k, in the unit of `exp2`."""
    scale = plan.options.scale
    cap = plan.options.logits_soft_cap
    if cap is None:
        return products * (scale * LOG2_E)
    return jnp.tanh(products * (scale / cap)) * (cap * LOG2_E)


def visible(plan: Plan, first_query: Array, first_key: Array) -> Bool[Array, "R C"]:
    """Which keys a row may see.

    Args:
      plan: the static arguments.
      first_query: the position of the tile's first row.
      first_key: that of its first column.

    Returns:
      The mask; no token of padding is seen.
    """
    shape = (ROWS, plan.config.block_k)
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
    columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
    keys = columns + first_key
    # How far back a key is; negative for later ones.
    distance = rows + first_query - keys
    mask = keys < plan.T
    if plan.causal:
        mask = mask & (distance >= 0)
    if plan.window is not None:
        mask = mask & (distance < plan.window)
    if plan.window is not None and not plan.causal:
        mask = mask & (distance > -plan.window)
    return mask


def weigh(
    largest: Float[Array, "R"],
    total: Float[Array, "R"],
    logits: Float[Array, "R C"],
    mask: Bool[Array, "R C"] | None,
) -> Weighted:
    """The weights of a tile, relative to the largest logit so far.

    Args:
      largest: of the rows before this tile.
      total: of the rows before this tile.
      logits: of the tile, in the unit of `exp2`.
      mask: which of them count; None for all.

    Returns:
      The rows after the tile, and its weights.
    """
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
    # A row that has seen nothing yet would subtract -inf from -inf.
    subtracted = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
    keep = jnp.exp2(largest - subtracted)
    weights = jnp.exp2(logits - by_row(subtracted, logits.shape[1]))
    new_total = keep * total + jnp.sum(weights, axis=1)
    return Weighted(new_largest, new_total, keep, weights)


def log_sum_exp(rows: Rows) -> Float[Array, "R"]:
    """In the unit of the natural logarithm; -inf for a row that has seen nothing."""
    return (rows.largest + jnp.log2(rows.total)) * (1 / LOG2_E)


def gate(gate_logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sigmoid(gate_logits), in float32."""
    return 1 / (1 + jnp.exp2(gate_logits.astype(jnp.float32) * -LOG2_E))
