"""One chunk with one decay per head and token, or none, inside the TPU kernels: one [C, C] mask.

The kernels get running sums of logs, made by `../tile.py:running_sums` outside of them: each sum is
two rows of C, a coarse and a fine part.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.common.finite import cleaned, poisoned
from kernels_pallas.linear_scan import nonfinite
from kernels_pallas.linear_scan.tile import LOG_ZERO
from kernels_pallas.linear_scan.tpu.tile import (
    NT,
    ROWS,
    TN,
    ChunkCotangents,
    ChunkTerms,
    TileOptions,
    matmul,
)


class Factors(NamedTuple):
    """The decays of a chunk.

    Attributes:
      mask: from the write of j to the read of i. 0 where j is later, and 1 on the diagonal for
        inclusive reads (0 for exclusive ones).
      read: from the chunk's start to the read of i, the same for all channels.
      write: from the write of j to the chunk's end.
      total: of the whole chunk.
    """

    mask: Float[Array, "C C"]
    read: Float[Array, "C K"] | float
    write: Float[Array, "C K"] | float
    total: Float[Array, "1 1"] | float


class _Sums(NamedTuple):
    """Running sums of logs, coarse and fine part: rows [1, C], or columns [C, lanes]."""

    coarse: Array
    fine: Array


def undecayed(options: TileOptions, levels: Int[Array, "C C"]) -> Factors:
    """The factors of linear attention without decay: a causal mask."""
    is_visible = levels >= 0 if options.inclusive else levels > 0
    return Factors(is_visible.astype(jnp.float32), 1.0, 1.0, 1.0)


def decayed(
    options: TileOptions,
    levels: Int[Array, "C C"],
    rows: Float[Array, "R C"],
    K: int,
) -> Factors:
    """The factors of a chunk with decays.

    Broadcasting a column over lanes is what this path spends most of its time on: each is made
    once, before the exponentials.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      rows: two rows of running sums to the state after each token; then for exclusive reads two
        rows of sums to each read. Inclusive reads see the decays that the state does. The last row
        is none of the sums.
      K: the lanes of reads and writes.

    Returns:
      The factors.
    """
    C = rows.shape[1]
    num_rows = rows.shape[0] - 1
    # Only whole registers can be transposed: fill them up with zeros.
    padding = jnp.zeros((ROWS - num_rows, C), rows.dtype)
    columns = jnp.transpose(jnp.concatenate([rows[:num_rows], padding]))

    def broadcast_columns(first: int, lanes: int) -> _Sums:
        coarse = jnp.broadcast_to(columns[:, first : first + 1], (C, lanes))
        fine = jnp.broadcast_to(columns[:, first + 1 : first + 2], (C, lanes))
        return _Sums(coarse, fine)

    # Where each pair of rows (columns now) begins; the same pair for inclusive reads.
    first_of_ends = 0
    first_of_reads = num_rows - 2
    sums_at_ends = _Sums(rows[:1], rows[1:2])
    mask = _mask(
        options,
        levels,
        broadcast_columns(first_of_reads, C),
        sums_at_ends,
    )

    # The chunk's last token, in the order of the recurrence, has the sum of all its logs.
    last = slice(0, 1) if options.reverse else slice(C - 1, C)
    total_coarse = rows[0:1, last]
    total_fine = rows[1:2, last]
    at_reads = broadcast_columns(first_of_reads, K)
    at_ends = broadcast_columns(first_of_ends, K)
    # Differences part by part: coarse ones are exact, fine ones small.
    log_write = (total_coarse - at_ends.coarse) + (total_fine - at_ends.fine)
    write = jnp.exp(log_write)
    return Factors(
        mask=mask,
        read=jnp.exp(at_reads.coarse + at_reads.fine),
        write=write,
        total=jnp.exp(total_coarse + total_fine),
    )


def _mask(
    options: TileOptions,
    levels: Int[Array, "C C"],
    at_reads: _Sums,
    at_ends: _Sums,
) -> Float[Array, "C C"]:
    """`Factors.mask`, from sums up to the read of row i and up to the state after column j."""
    # Row i, column j: the logs after the write of j up to the read of i.
    between = (at_reads.coarse - at_ends.coarse) + (at_reads.fine - at_ends.fine)
    # An inclusive read of the token's own write has no log in between, a difference of exactly 0.
    is_visible = levels >= 0 if options.inclusive else levels > 0
    # Select before the exponential: a later j has a positive difference, which may overflow.
    return jnp.exp(jnp.where(is_visible, between, LOG_ZERO))


def chunk_terms(
    options: TileOptions,
    levels: Int[Array, "C C"],
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    factors: Factors,
    diagonal: Float[Array, "C 1"] | None,
) -> ChunkTerms:
    """The terms of a chunk.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      q, k: queries (scaled) and keys.
      factors: the decays of the chunk.
      diagonal: what the diagonal of the scores is replaced by, where there is a bonus.

    Returns:
      The terms.
    """
    products = matmul(options, q, k, NT)
    # Selected first: the product of tokens that do not see each other may overflow.
    scores = jnp.where(factors.mask > 0, products, 0.0) * factors.mask
    if diagonal is not None:
        scores = jnp.where(levels == 0, diagonal, scores)
    return ChunkTerms(
        scores=scores,
        reads=q * factors.read,
        writes=k * factors.write,
        total=factors.total,
    )


def backward(
    options: TileOptions,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    factors: Factors,
    cotangents: ChunkCotangents,
) -> tuple[Float[Array, "C K"], Float[Array, "C K"]]:
    """dq and dk, without the part of a diagonal that was replaced."""
    # scores = (q k^T) mask;  reads = q read;  writes = k write.
    dproducts = cotangents.dscores * factors.mask
    dq = matmul(options, dproducts, k) + cotangents.dreads * factors.read
    dk = matmul(options, dproducts, q, TN) + cotangents.dwrites * factors.write
    return dq, dk


def dlog_decay(
    options: TileOptions,
    levels: Int[Array, "C C"],
    terms: ChunkTerms,
    cotangents: ChunkCotangents,
    careful: bool = False,
) -> Float[Array, "1 C"]:
    """The cotangents of the logs: what each receives from the products that it is part of."""
    # d/dlog of a decayed product is the product itself.
    weights = cotangents.dscores * terms.scores
    of_reads = _sum_over_keys(terms.reads, cotangents.dreads)
    of_writes = _sum_over_keys(terms.writes, cotangents.dwrites)
    inside = dlog_decay_of_pairs(
        options,
        levels,
        weights,
        of_reads,
        of_writes,
        careful,
    )
    # Every log is part of the chunk's total.
    of_keys = jnp.sum(cotangents.dlog_total, axis=0, keepdims=True)
    of_total = jnp.sum(of_keys, axis=1, keepdims=True)
    return inside + of_total


def _sum_over_keys(x: Array, dx: Array) -> Float[Array, "C 1"]:
    return jnp.sum(x * dx, axis=1, keepdims=True)


def dlog_decay_of_pairs(
    options: TileOptions,
    levels: Int[Array, "C C"],
    weights: Float[Array, "C C"],
    of_reads: Float[Array, "C 1"],
    of_writes: Float[Array, "C 1"],
    careful: bool = False,
) -> Float[Array, "1 C"]:
    """What each token's log decay receives from the pairs, reads and writes of the chunk.

    A pair (i, j) contains the logs after j up to i (exclusive: before i), a read those up to it, a
    write those after it. Each product is added where it belongs: no difference of running sums.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      weights: scores times their cotangents, 0 where j is later than i.
      of_reads: reads times their cotangents, summed over K.
      of_writes: writes times their cotangents, summed over K.
      careful: whether a weight may be infinite, or NaN.

    Returns:
      One row: the cotangents of the logs, without that of the total.
    """
    row = lax.broadcasted_iota(jnp.int32, levels.shape, 0)
    token = lax.broadcasted_iota(jnp.int32, levels.shape, 1)
    # 1 where the token of the column comes after the row's.
    is_after = token < row if options.reverse else token > row
    after_row = is_after.astype(jnp.float32)

    # Row i, column t: the pairs (i, j) with t after j, and the read of i ...
    if careful:
        # A product of gradients may have overflowed: 0 times that is not 0.
        is_bad = nonfinite.bad_elements(weights)
        inside = matmul(options, cleaned(weights), after_row)
        inside = poisoned(matmul(options, is_bad, after_row) > 0, inside)
    else:
        inside = matmul(options, weights, after_row)
    received = inside + of_reads
    # ... count if t is at most i (exclusive: before i).
    is_contained = levels >= 0 if options.inclusive else levels > 0
    received = jnp.where(is_contained, received, 0.0)
    # The write of row j contains the logs of the tokens t after it.
    received = received + jnp.where(is_after, of_writes, 0.0)
    return jnp.sum(received, axis=0, keepdims=True)
