"""The mathematics of one chunk as Triton can do it: whole power-of-two tiles, no slices.

Triton cannot slice or concatenate values, so the halving of `linear_scan.tile.vector_decay` takes
another form here. Blocks of h = 1, 2, 4, ... tokens are merged in pairs. At each level the rows of
later blocks are only read from, those of earlier blocks only written to, so that one operand
serves as both factors of the product:

    y = where(later, q, k) exp(where(later, F, R))
    products += y y^T, on the pairs of rows that this level merges
    F += the sibling block's total log, where later
    R += the sibling block's total log, where earlier

F_i is the sum of logs from the start of i's block up to i's read, R_j the sum after j up to the
end of j's block. Both are sums of exactly the logs between two tokens, all <= 0, never differences
of running sums. Only the sibling's total comes from other rows: it is loaded from memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import LOG2_E, exp2

# Logs are also given as sums of 8 neighbors: a block's total is then few loads.
SUBTOTAL = 8


class Tile(NamedTuple):
    """What the functions here need of a plan.

    Attributes:
      operand: the dtype of what the tensor core multiplies.
      precision: of a product of float32 operands.
      fast_exp: as in `Plan`.
    """

    operand: Any
    precision: Any
    inclusive: bool
    fast_exp: bool

    def exp(self, x: Array) -> Array:
        return exp2(x * LOG2_E) if self.fast_exp else jnp.exp(x)


def matmul(
    tile: Tile,
    a: Array,
    b: Array,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Array:
    """A float32 product of operands rounded as the tensor core takes them."""
    a = a.astype(tile.operand)
    b = b.astype(tile.operand)
    precision = None if tile.operand == jnp.bfloat16 else tile.precision
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def rows_and_columns(C: int) -> tuple[Array, Array]:
    """The row and the column of every entry of a [C, C] tile."""
    rows = lax.broadcasted_iota(jnp.int32, (C, C), 0)
    columns = lax.broadcasted_iota(jnp.int32, (C, C), 1)
    return rows, columns


def diagonal(values: Float[Array, "C"]) -> Float[Array, "C C"]:
    """A [C, C] tile with `values` on its diagonal."""
    i, j = rows_and_columns(values.shape[0])
    return jnp.where(i == j, values[:, None], 0.0)


# --- vector decay


class Logs(NamedTuple):
    """The logs of one chunk, for a block of channels.

    Attributes:
      read: the part of its own log that a token's read includes.
      at: rows of the chunk [C] -> their logs [C, K].
      subtotals_at: the same for sums of SUBTOTAL rows.
    """

    read: Float[Array, "C K"]
    at: Callable
    subtotals_at: Callable


def over_levels(
    tile: Tile,
    C: int,
    logs: Logs,
    level: Callable,
    carry,
) -> tuple[Any, tuple[Array, Array]]:
    """Runs `carry = level(h, later [C, 1], factors [C, K], carry)` for h = 1, 2, 4, ..., C / 2.

    Loops are not unrolled: else the loads of all levels would be in flight at once, and registers
    spill.

    Returns:
      carry, and (exp(F), exp(R)) of the whole chunk: start of the chunk -> read, write -> its end.
    """
    row = lax.iota(jnp.int32, C)
    width = logs.read.shape
    num_levels = C.bit_length() - 1
    num_fine_levels = SUBTOTAL.bit_length() - 1

    def levels(total_at: Callable, unit: int, count: int, state):
        """`count` levels from blocks of `unit` rows on; `total_at` gives logs of a unit's rows."""
        unit_of_row = row // unit

        def step(t, state):
            F, R, carry = state
            # Units in a block of this level: bit t of a unit's number tells later from earlier.
            h = jnp.int32(1) << t
            later = ((unit_of_row & h) != 0)[:, None]
            carry = level(
                h * unit,
                later,
                tile.exp(jnp.where(later, F, R)),
                carry,
            )
            # The sibling block: flip bit t, then go to the block's first unit.
            first = (unit_of_row ^ h) & ~(h - 1)

            def add(m, total):
                return total + total_at(first + m)

            total = lax.fori_loop(0, h, add, jnp.zeros(width, jnp.float32))
            F = F + jnp.where(later, total, 0.0)
            R = R + jnp.where(later, 0.0, total)
            return F, R, carry

        return lax.fori_loop(0, count, step, state)

    state = (logs.read, jnp.zeros(width, jnp.float32), carry)
    # Blocks below SUBTOTAL rows add single logs, larger ones add sums of SUBTOTAL rows.
    state = levels(logs.at, 1, num_fine_levels, state)
    state = levels(logs.subtotals_at, SUBTOTAL, num_levels - num_fine_levels, state)
    F, R, carry = state
    return carry, (tile.exp(F), tile.exp(R))


def merged(h, C: int) -> Array:
    """Pairs of rows, in both orders, that the level of blocks of h rows merges."""
    i, j = rows_and_columns(C)
    # Rows lie in sibling blocks of h rows exactly if h is the highest bit that tells them apart.
    difference = i ^ j
    return (difference >= h) & (difference < 2 * h)


def vector_products(
    tile: Tile, q: Float[Array, "C K"], k: Float[Array, "C K"], logs: Logs
) -> tuple[Array, Array, Array]:
    """The decayed products of a chunk, and its reads and writes.

    Returns:
      products [C, C]: right where j < i only. The diagonal is missing, and what stands at j > i is
        meaningless: the caller masks it.
      reads, writes [C, K]: q decayed from the chunk's start, k decayed to its end.
    """
    C = q.shape[0]

    def level(h, later, factors, products):
        y = (jnp.where(later, q, k) * factors).astype(tile.operand)
        return jnp.where(
            merged(h, C),
            matmul(
                tile,
                y,
                y,
                trans_b=True,
            ),
            products,
        )

    zeros = jnp.zeros((C, C), jnp.float32)
    products, (read_factors, write_factors) = over_levels(tile, C, logs, level, zeros)
    return products, q * read_factors, k * write_factors


class Cotangents(NamedTuple):
    """Cotangents of a chunk, [C, K] each.

    The last three are what the logs receive, before it is summed over the rows that include them:

    Attributes:
      of_readers: q_i dq_i of pairs and of reads: belongs to the logs up to i.
      of_writers: k_j dk_j of pairs: to be taken off again for the logs up to j.
      of_writes: writes_j dwrites_j: belongs to the logs after j.
    """

    dq: Array
    dk: Array
    of_readers: Array
    of_writers: Array
    of_writes: Array


def vector_cotangents(
    tile: Tile,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    logs: Logs,
    dproducts: Float[Array, "C C"],
    from_states: Callable[[], tuple[Array, Array]],
) -> Cotangents:
    """The way back through `vector_products`.

    Args:
      dproducts: the products' cotangent, symmetric: the lower triangle mirrored into the upper.
      from_states: returns (dreads, dwrites) [C, K]. A function, so that it is called late.
    """
    C = q.shape[0]

    def level(h, later, factors, carry):
        dq, dk = carry
        y = jnp.where(later, q, k) * factors
        of_level = jnp.where(merged(h, C), dproducts, jnp.zeros_like(dproducts))
        dy = matmul(tile, of_level, y) * factors
        return dq + jnp.where(later, dy, 0.0), dk + jnp.where(later, 0.0, dy)

    zeros = (jnp.zeros_like(q), jnp.zeros_like(k))
    (dq, dk), (read_factors, write_factors) = over_levels(tile, C, logs, level, zeros)
    # Not before the levels: registers are short, and these would stay alive through all of them.
    dreads, dwrites = from_states()
    from_reads = read_factors * dreads
    from_writes = write_factors * dwrites
    return Cotangents(
        dq=dq + from_reads,
        dk=dk + from_writes,
        of_readers=q * (dq + from_reads),
        of_writers=k * dk,
        of_writes=k * from_writes,
    )


def vector_dlogs(tile: Tile, c: Cotangents, dlog_total: Float[Array, "K"]) -> Float[Array, "C K"]:
    """What each log receives.

    The log at t is part of the reads and pairs of i >= t (exclusive: i > t) unless the pair's
    j >= t too, of the writes of j < t, and of the chunk's total, whose cotangent is dlog_total.
    """
    balance = c.of_readers - c.of_writers
    i, j = rows_and_columns(balance.shape[0])
    sums = _rows_summed(tile, j > i, balance) + _rows_summed(tile, j < i, c.of_writes)
    # The token's own row: its read includes its own log only where reads are inclusive.
    own = balance if tile.inclusive else -c.of_writers
    return dlog_total[None, :] + sums + own


def _rows_summed(tile: Tile, which: Array, x: Array) -> Array:
    """which [C, C] @ x: Triton has no cumulative sum in reverse.

    bfloat16 operands would round x to 8 bits; its high and its low part together have 16.
    """
    if tile.operand != jnp.bfloat16:
        return matmul(tile, which.astype(jnp.float32), x)
    high = x.astype(jnp.bfloat16)
    low = x - high.astype(jnp.float32)
    return matmul(tile, which, high) + matmul(tile, which, low)


# --- scalar decay, or none


def scalar_masked(
    tile: Tile,
    products: Float[Array, "C C"],
    sums: tuple[Array, ...] | None,
) -> Float[Array, "C C"]:
    """Products of tokens times the decay from j to i, 0 unless j < i.

    Selected, not only multiplied: the product of two tokens that do not see each other may
    overflow.

    Args:
      tile: how exponentials are taken.
      products: of every pair of tokens.
      sums: of `linear_scan.tile.running_sums`: the coarse and the fine part of the sums up to a
        read, then those up to a token's end; None where nothing decays.
    """
    i, j = rows_and_columns(products.shape[0])
    zeros = jnp.zeros_like(products)
    if sums is None:
        return jnp.where(j < i, products, zeros)
    read_coarse, read_fine, end_coarse, end_fine = sums
    # Coarse parts are exact multiples of a power of two: their difference loses nothing.
    coarse = read_coarse[:, None] - end_coarse[None, :]
    fine = read_fine[:, None] - end_fine[None, :]
    mask = tile.exp(coarse + fine)
    # NaN decays are visible: the comparison is false for them.
    is_hidden = (j >= i) | (mask == 0)
    return jnp.where(is_hidden, zeros, products * mask)


def scalar_cotangents(
    tile: Tile,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    dproducts: Float[Array, "C C"],
    dread_q: Float[Array, "C K"],
    dwrite_k: Float[Array, "C K"],
) -> Cotangents:
    """The way back through a chunk with one decay a token.

    Args:
      dproducts: the cotangent of q k^T, zero on the diagonal and above.
      dread_q, dwrite_k: what q and k receive through the state.
    """
    dq = matmul(tile, dproducts, k)
    dk = matmul(tile, dproducts, q, trans_a=True)
    return Cotangents(
        dq=dq + dread_q,
        dk=dk + dwrite_k,
        of_readers=q * (dq + dread_q),
        of_writers=k * dk,
        of_writes=k * dwrite_k,
    )
