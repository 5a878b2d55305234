"""The mathematics of one chunk as Triton can do it: whole tiles of a power of two, no slices, no
concatenation.

The vector decay is `tile.vector_decay`'s halving in another form. Blocks of h = 1, 2, 4, ... tokens
are merged in pairs. At each level the rows of later blocks only read, those of earlier blocks only
write, and one operand does both:

    y = where(later, q, k) exp(where(later, F, R));   scores += y y^T on pairs that meet at this level
    F += the sibling's total log where later;         R += the sibling's total log where earlier

F_i is the sum of logs from the start of i's block to i's read, R_j that after j to the end of j's
block: sums of the very logs that are met, all <= 0, never differences. Only the sibling's total has
to come from other rows: it is loaded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.linear_scan.tile import LOG_ZERO

SUBTOTAL = 8  # logs are also given as sums of 8 neighbors


class Tile(NamedTuple):
    """What the functions here need of a plan."""

    operand: jnp.dtype  # of what is multiplied
    precision: object  # of a matmul of float32 operands
    inclusive: bool


def matmul(tile: Tile, a: Array, b: Array, trans_a: bool = False, trans_b: bool = False) -> Array:
    """float32, from operands as the tensor core takes them."""
    a, b = a.astype(tile.operand), b.astype(tile.operand)
    precision = None if tile.operand == jnp.bfloat16 else tile.precision
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def rows_and_columns(C: int) -> tuple[Array, Array]:
    return lax.broadcasted_iota(jnp.int32, (C, C), 0), lax.broadcasted_iota(jnp.int32, (C, C), 1)


def diagonal(own: Array) -> Array:
    """[C] -> [C, C]."""
    i, j = rows_and_columns(own.shape[0])
    return jnp.where(i == j, own[:, None], 0.0)


# --- vector decay


class Logs(NamedTuple):
    """Of one chunk and a block of K."""

    read: Array  # [C, K]: what a token's own read meets of its own log
    at: Callable  # rows of the chunk [C] -> their logs [C, K]
    subtotals_at: Callable  # the same of sums of SUBTOTAL rows


def _climb(C: int, logs: Logs, visit: Callable, carry) -> tuple[Array, tuple[Array, Array]]:
    """Runs `carry = visit(h, later [C, K], factors [C, K], carry)` over the levels h = 1, 2, 4,
    ..., C/2.

    Returns (carry, (exp(F), exp(R)) of the whole chunk). Loops, not unrolled: else every level's
    loads are in flight at once, and registers spill.
    """
    row, width = lax.iota(jnp.int32, C), logs.read.shape

    def over(at, unit, levels, state):
        def level(t, state):
            F, R, carry = state
            h = jnp.int32(1) << t
            later = (((row // unit) & h) != 0)[:, None]
            carry = visit(h * unit, later, jnp.exp(jnp.where(later, F, R)), carry)
            first = ((row // unit) ^ h) & ~(h - 1)
            total = lax.fori_loop(
                0, h, lambda m, total: total + at(first + m), jnp.zeros(width, jnp.float32)
            )
            return F + jnp.where(later, total, 0.0), R + jnp.where(later, 0.0, total), carry

        return lax.fori_loop(0, levels, level, state)

    levels, fine = C.bit_length() - 1, SUBTOTAL.bit_length() - 1
    state = logs.read, jnp.zeros(width, jnp.float32), carry
    F, R, carry = over(logs.subtotals_at, SUBTOTAL, levels - fine, over(logs.at, 1, fine, state))
    return carry, (jnp.exp(F), jnp.exp(R))


def _meet(h: int, C: int) -> Array:
    """Pairs of rows, both ways, that lie in the two blocks of one merge."""
    i, j = rows_and_columns(C)
    return ((i ^ j) >= h) & ((i ^ j) < 2 * h)


def vector_scores(tile: Tile, q: Array, k: Array, logs: Logs) -> tuple[Array, Array, Array]:
    """(scores [C, C] without the own ones and with rubbish where j > i, reads, writes [C, K])."""
    C = q.shape[0]

    def visit(h, later, factors, scores):
        y = (jnp.where(later, q, k) * factors).astype(tile.operand)
        return jnp.where(_meet(h, C), matmul(tile, y, y, trans_b=True), scores)

    scores, (read_factors, write_factors) = _climb(C, logs, visit, jnp.zeros((C, C), jnp.float32))
    return scores, q * read_factors, k * write_factors


class Cotangents(NamedTuple):
    """[C, K] each; of_*: what the logs met by pairs, reads and writes receive, still to be summed
    over rows.
    """

    dq: Array
    dk: Array
    of_readers: Array  # q_i dq_i of pairs and of reads: for the logs up to i
    of_writers: Array  # k_j dk_j of pairs: not for the logs after i that lie before j
    of_writes: Array  # writes_j dwrites_j: for the logs after j


def vector_cotangents(
    tile: Tile, q: Array, k: Array, logs: Logs, dscores: Array, from_states: Callable
) -> Cotangents:
    """dscores [C, C] is symmetric, the scores' cotangent in both triangles. from_states() ->
    (dreads, dwrites).
    """
    C = q.shape[0]

    def visit(h, later, factors, carry):
        dq, dk = carry
        y = jnp.where(later, q, k) * factors
        dy = matmul(tile, jnp.where(_meet(h, C), dscores, jnp.zeros_like(dscores)), y) * factors
        return dq + jnp.where(later, dy, 0.0), dk + jnp.where(later, 0.0, dy)

    (dq, dk), (read_factors, write_factors) = _climb(
        C, logs, visit, (jnp.zeros_like(q), jnp.zeros_like(k))
    )
    dreads, dwrites = from_states()  # not earlier: registers are short
    from_reads, from_writes = read_factors * dreads, write_factors * dwrites
    met = (q * (dq + from_reads), k * dk, k * from_writes)
    return Cotangents(dq + from_reads, dk + from_writes, *met)


def vector_dlogs(tile: Tile, c: Cotangents, dlog_total: Array) -> Array:
    """[C, K]: what each log receives.

    A log at t is met by the reads and pairs of i >= t (exclusive: i > t), unless the pair's j >= t
    too, by the writes of j < t, and by the chunk's total, dlog_total [K].
    """
    balance = c.of_readers - c.of_writers
    i, j = rows_and_columns(balance.shape[0])
    sums = _rows_summed(tile, j > i, balance) + _rows_summed(tile, j < i, c.of_writes)
    return dlog_total[None, :] + sums + (balance if tile.inclusive else -c.of_writers)


def _rows_summed(tile: Tile, which: Array, x: Array) -> Array:
    """which [C, C] @ x, with 16 of x's bits or all: Triton has no reverse cumsum."""
    if tile.operand != jnp.bfloat16:
        return matmul(tile, which.astype(jnp.float32), x)
    high = x.astype(jnp.bfloat16)
    return matmul(tile, which, high) + matmul(tile, which, x - high.astype(jnp.float32))


# --- scalar decay, or none


def scalar_mask(C: int, sums: tuple[Array, ...] | None) -> Array:
    """Decays j -> i [C, C], 0 unless j < i. `sums`: of `tile.running_sums`, coarse and fine of
    reads, then of ends.
    """
    i, j = rows_and_columns(C)
    if sums is None:
        return jnp.where(j < i, 1.0, 0.0)
    read_coarse, read_fine, end_coarse, end_fine = sums
    between = (read_coarse[:, None] - end_coarse[None, :]) + (
        read_fine[:, None] - end_fine[None, :]
    )
    return jnp.exp(jnp.where(j < i, between, LOG_ZERO))


def scalar_cotangents(
    tile: Tile, q: Array, k: Array, dproducts: Array, dread_q: Array, dwrite_k: Array
) -> Cotangents:
    """dproducts [C, C]: of q k^T, off the diagonal; dread_q, dwrite_k [C, K]: of q and k through
    the state.
    """
    dq, dk = matmul(tile, dproducts, k), matmul(tile, dproducts, q, trans_a=True)
    met = (q * (dq + dread_q), k * dk, k * dwrite_k)
    return Cotangents(dq + dread_q, dk + dwrite_k, *met)
