"""One chunk with one decay per head and token, or none, inside the TPU kernels: one [C, C] mask.

The kernels get running sums of logs, made by `linear_scan/tile.py:running_sums` outside of them:
two rows of C, a coarse and a fine part.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.delta_scan.tpu.tile import (
    ChunkCotangents,
    ChunkTerms,
    Solved,
    later_registers,
    pack_diagonal,
)
from kernels_pallas.linear_scan.tpu.scalar_decay import dlog_decay_of_pairs
from kernels_pallas.linear_scan.tpu.tile import (
    NT,
    ROWS,
    TN,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)


class Factors(NamedTuple):
    """The decays of a chunk.

    Attributes:
      mask: from the write of j to the read of i; 1 on the diagonal, 0 where j is later or in
        another span.
      read: from the start of i's span to the read of i.
      write: from the write of j to the end of its span.
      totals: of every span.
    """

    mask: Float[Array, "C C"]
    read: Float[Array, "C 1"] | float
    write: Float[Array, "C 1"] | float
    totals: tuple[Float[Array, "1 1"] | float, ...]


def undecayed(levels: Int[Array, "C C"], num_spans: int) -> Factors:
    """The factors of the delta rule without decay: a causal mask."""
    mask = (in_span(levels, num_spans) & (levels >= 0)).astype(jnp.float32)
    return Factors(mask, 1.0, 1.0, (1.0,) * num_spans)


def in_span(levels: Int[Array, "C C"], num_spans: int) -> Bool[Array, "C C"]:
    """Which pairs of tokens lie in the same of equal spans."""
    span = levels.shape[0] // num_spans
    # Blocks of 2**level tokens hold both.
    return levels <= span.bit_length() - 1


def mask_of_sums(
    levels: Int[Array, "C C"],
    coarse_row: Float[Array, "1 C"],
    fine_row: Float[Array, "1 C"],
    coarse_column: Float[Array, "C 1"],
    fine_column: Float[Array, "C 1"],
    num_spans: int,
) -> Float[Array, "C C"]:
    """`Factors.mask`, from running sums up to token i (columns) and up to token j (rows)."""
    # Differences part by part: coarse ones are exact, fine ones small.
    between = (coarse_column - coarse_row) + (fine_column - fine_row)
    is_earlier = levels > 0
    # Select before the exponential too: a later j has a positive difference, which may overflow.
    decays = jnp.exp(jnp.where(is_earlier, between, 0.0))
    return jnp.where((levels >= 0) & in_span(levels, num_spans), decays, 0.0)


def chunk_terms(
    options: TileOptions,
    levels: Int[Array, "C C"],
    q: Float[Array, "C K"],
    erase: Float[Array, "C K"],
    k: Float[Array, "C K"],
    factors: Factors,
    solved: Solved | None = None,
) -> Generator[None, None, tuple[ChunkTerms, Float[Array, "C C"]]]:
    """The terms of a chunk, of scaled queries, negative erase keys and keys, and all erase scores
    (a generator). For an inverse from those that are solved, if they are.
    """

    def operand(x: Array) -> Array:
        """As matmuls see it."""
        return x.astype(options.operand)

    C = q.shape[0]
    products = matmul(options, join_rows((q, erase)), k, NT)
    yield
    # A token erases before it writes.
    erase_scores = jnp.where(levels > 0, products[C:] * factors.mask, 0.0)
    rows = split_rows(erase_scores)
    erase_rows = []
    h = ROWS if solved is None else solved.block
    while h < C // len(factors.totals):
        erase_rows.append(later_registers(rows, h))
        h *= 2
    terms = ChunkTerms(
        read_scores=operand(products[:C] * factors.mask),
        erase_blocks=pack_diagonal(rows, C) if solved is None else None,
        erase_rows=tuple(erase_rows),
        reads=operand(q * factors.read),
        erases=operand(erase * factors.read),
        writes=operand(k * factors.write),
        totals=factors.totals,
    )
    return terms, erase_scores


def backward(
    options: TileOptions,
    q: Float[Array, "C K"],
    erase: Float[Array, "C K"],
    k: Float[Array, "C K"],
    factors: Factors,
    cotangents: ChunkCotangents,
) -> tuple[Float[Array, "C K"], Float[Array, "C K"], Float[Array, "C K"]]:
    """The cotangents of q, erase and k, as `chunk_terms` takes them."""
    C = q.shape[0]
    of_reads = cotangents.dread_scores * factors.mask
    of_erases = cotangents.derase_scores * factors.mask
    dproducts = join_rows((of_reads, of_erases))
    drows = matmul(options, dproducts, k)
    dq = drows[:C] + cotangents.dreads * factors.read
    derase = drows[C:] + cotangents.derases * factors.read
    of_keys = matmul(options, dproducts, join_rows((q, erase)), TN)
    return dq, derase, of_keys + cotangents.dwrites * factors.write


def dlog_decay(
    options: TileOptions,
    levels: Int[Array, "C C"],
    terms: ChunkTerms,
    erase_scores: Float[Array, "C C"],
    cotangents: ChunkCotangents,
) -> Float[Array, "1 C"]:
    """The cotangents of the logs: what each receives from the products that it is part of.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      terms, erase_scores: of `chunk_terms`.
      cotangents: those of the terms.

    Returns:
      One row.
    """
    # d/dlog of a decayed product is the product itself.
    weights = cotangents.dread_scores * terms.read_scores
    weights += cotangents.derase_scores * erase_scores
    of_reads = terms.reads * cotangents.dreads + terms.erases * cotangents.derases
    of_writes = terms.writes * cotangents.dwrites
    inside = dlog_decay_of_pairs(
        options,
        levels,
        weights,
        jnp.sum(of_reads, axis=1, keepdims=True),
        jnp.sum(of_writes, axis=1, keepdims=True),
    )
    # Every log is part of the chunk's total.
    of_keys = jnp.sum(cotangents.dlog_total, axis=0, keepdims=True)
    return inside + jnp.sum(of_keys, axis=1, keepdims=True)
