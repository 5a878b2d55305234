"""The mathematics of one chunk as Triton can do it: whole power-of-two tiles, no slices.

Decays are those of `linear_scan/gpu/tile.py`: blocks of h = 1, 2, 4, ... tokens are merged in
pairs, and at each level a row has one factor, the decay from its block's start or to its block's
end. Here two kinds of rows read, queries and erase keys, so a level makes two products with the
same keys. Every factor is a decay over exactly the tokens between, so at most 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.linear_scan.gpu import tile as scan_tile
from kernels_pallas.linear_scan.gpu.tile import (
    Logs,
    Tile,
    matmul,
    merged,
    over_levels,
    rows_and_columns,
)

# Rows of the blocks that are inverted as one tile: the fewest that the tensor core multiplies.
BLOCK = 16


# --- scores


def vector_scores(
    tile: Tile,
    q: Float[Array, "C K"],
    erase: Float[Array, "C K"] | None,
    k: Float[Array, "C K"],
    logs: Logs,
    totals: tuple[Array, Array],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Adds the scores of a block of channels, one decay a channel.

    Args:
      erase: erase keys; None where they are k, but for a factor of each token.
      logs: of the same channels.
      totals: scores of queries and of erase keys so far [C, C].

    Returns:
      The two scores, right where j < i only: what stands elsewhere is meaningless.
      The decays of each row [C, K] from the chunk's start, and to its end.
    """
    C = q.shape[0]

    def level(h, later, factors, scores):
        read_scores, erase_scores = scores
        # Of a pair that this level merges, the later row reads what the earlier one writes.
        is_merged = merged(h, C)
        writes = (k * factors).astype(tile.operand)
        zeros = jnp.zeros_like(read_scores)
        read = matmul(tile, q * factors, writes, trans_b=True)
        read_scores += jnp.where(is_merged, read, zeros)
        erases = writes if erase is None else erase * factors
        found = matmul(tile, erases, writes, trans_b=True)
        return read_scores, erase_scores + jnp.where(is_merged, found, zeros)

    return over_levels(tile, C, logs, level, totals)


class Cotangents(NamedTuple):
    """Cotangents of a chunk's queries, erase keys and keys, and what its logs receive.

    `of_logs` has the meaning that it has in `linear_scan`; queries and erase keys are both readers.
    """

    dq: Float[Array, "C K"]
    derase: Float[Array, "C K"]
    dk: Float[Array, "C K"]
    of_logs: scan_tile.Cotangents


class FromStates(NamedTuple):
    """What reads, erases and writes of a chunk receive through the states at its two ends."""

    dreads: Float[Array, "C K"]
    derases: Float[Array, "C K"]
    dwrites: Float[Array, "C K"]


def vector_cotangents(
    tile: Tile,
    q: Float[Array, "C K"],
    erase: Float[Array, "C K"],
    k: Float[Array, "C K"],
    logs: Logs,
    dscores: Callable[[], tuple[Array, Array]],
    from_states: Callable[[], FromStates],
) -> Cotangents:
    """The way back through `vector_scores`.

    Args:
      dscores: returns the cotangents of both scores [C, C]. A function, as the next one, so that
        registers hold its results for as short a time as can be.
      from_states: returns those of reads, erases and writes.
    """
    C = q.shape[0]
    i, j = rows_and_columns(C)

    def level(h, later, factors, carry):
        dq, derase, dk = carry
        is_merged = merged(h, C) & (j < i)
        dread_scores, derase_scores = dscores()
        dread = jnp.where(is_merged, dread_scores, jnp.zeros_like(dread_scores))
        dfound = jnp.where(is_merged, derase_scores, jnp.zeros_like(derase_scores))
        writes = (k * factors).astype(tile.operand)
        dq += factors * matmul(tile, dread, writes)
        derase += factors * matmul(tile, dfound, writes)
        # A key is read by the queries and by the erase keys of later tokens.
        dwrites = matmul(tile, dread, q * factors, trans_a=True)
        dwrites += matmul(tile, dfound, erase * factors, trans_a=True)
        return dq, derase, dk + factors * dwrites

    zeros = jnp.zeros_like(q)
    carry, factors = over_levels(tile, C, logs, level, (zeros, zeros, zeros))
    read_decay, write_decay = factors
    # Not before the levels: these would stay in registers through all of them.
    return joined(q, erase, k, carry, from_states(), read_decay, write_decay)


def scalar_cotangents(
    tile: Tile,
    q: Float[Array, "C K"],
    erase: Float[Array, "C K"],
    k: Float[Array, "C K"],
    dread_scores: Float[Array, "C C"],
    derase_scores: Float[Array, "C C"],
) -> tuple[Array, Array, Array]:
    """What q, erase and k receive of cotangents of undecayed products, 0 unless j < i."""
    dq = matmul(tile, dread_scores, k)
    derase = matmul(tile, derase_scores, k)
    dk = matmul(tile, dread_scores, q, trans_a=True)
    dk += matmul(tile, derase_scores, erase, trans_a=True)
    return dq, derase, dk


def joined(
    q: Array,
    erase: Array,
    k: Array,
    of_pairs: tuple[Array, Array, Array],
    from_states: FromStates,
    read_decay: Array | float,
    write_decay: Array | float,
) -> Cotangents:
    """What comes from pairs of tokens and what comes through the states, together.

    Args:
      of_pairs: what q, erase and k receive from pairs.
      from_states: what they receive else, decayed.
      read_decay, write_decay: from the chunk's start to a token, from a token to its end.
    """
    dq, derase, dk = of_pairs
    dq += read_decay * from_states.dreads
    derase += read_decay * from_states.derases
    from_writes = write_decay * from_states.dwrites
    of_logs = scan_tile.Cotangents(
        dq=dq,
        dk=dk,
        of_readers=q * dq + erase * derase,
        of_writers=k * dk,
        of_writes=k * from_writes,
    )
    return Cotangents(dq, derase, dk + from_writes, of_logs)


# --- the triangular system


def merged_inverse(
    inverses: tuple[Array, ...],
    scores_at: Callable[[int, int], Array],
    precision: Any,
    first: int = 0,
) -> dict[tuple[int, int], Array]:
    """(I + A_e)^-1 for blocks of BLOCK rows, from the inverses of its diagonal blocks.

        T = [[T_L, 0], [-T_R A_e[R, L] T_L, T_R]]

    Never from powers of A_e: see `delta_scan.tile.inverse`. The products keep all bits of float32
    for any inputs: they are small, and errors here would grow with correlated keys.

    Args:
      inverses: of the diagonal blocks from the first on; their number is a power of two.
      scores_at: row and column of a block -> that block of A_e.
      precision: of the products.
      first: the first block's number.

    Returns:
      The blocks on the diagonal and below, by row and column.
    """
    count = len(inverses)
    if count == 1:
        return {(first, first): inverses[0]}
    # Left and right half of the diagonal, and the square [R, L] between them.
    half = count // 2
    middle = first + half
    end = first + count
    left = merged_inverse(inverses[:half], scores_at, precision, first)
    right = merged_inverse(inverses[half:], scores_at, precision, middle)
    found = left | right
    for column in range(first, middle):
        # A_e[R, L] T_L: the blocks (m, column) of T_L are 0 above the diagonal.
        products = {}
        for row in range(middle, end):
            terms = []
            for m in range(column, middle):
                terms.append(_dot(scores_at(row, m), left[m, column], precision))
            products[row] = sum(terms[1:], terms[0])
        for row in range(middle, end):
            terms = []
            for m in range(middle, row + 1):
                terms.append(_dot(right[row, m], products[m], precision))
            found[row, column] = -sum(terms[1:], terms[0])
    return found


def inverse_of_block(scores: Float[Array, "n n"], precision: Any) -> Float[Array, "n n"]:
    """The inverse of I + scores, by the same recursion in one tile: T <- T - T A T.

    In a step A is what the scores have between the two blocks of each pair.
    """
    n = scores.shape[0]
    i, j = rows_and_columns(n)

    def of_level(h: int) -> Array:
        return jnp.where(merged(h, n), scores, jnp.zeros_like(scores))

    # Blocks of one row have the inverse 1, so the first level needs no product.
    result = jnp.where(i == j, 1.0, 0.0) - of_level(1)
    # Then blocks of 2, 4 and 8 rows. The result is 0 outside of the blocks inverted so far, so both
    # products stay between the two blocks of a pair.
    h = 2
    while h < n:
        result -= _dot(result, _dot(of_level(h), result, precision), precision)
        h *= 2
    return result


def _dot(a: Array, b: Array, precision: Any) -> Array:
    return pltriton.dot(a, b, precision=precision)
