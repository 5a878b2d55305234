"""The mathematics of one chunk of `delta_scan`, as pure functions of arrays.

With G_{i/j} the decay over the tokens j+1 to i and G_i the one from the chunk's start, the changes
W of a chunk's tokens (what each of them adds to the state along its key) solve a triangular system:

    A_e[i, j] = sum_k e_ik k_jk G_{i/j,k}   (j < i)      what erase key i finds of the write of j
    A_q[i, j] = sum_k q_ik k_jk G_{i/j,k}   (j <= i)     what query i reads of the write of j
    (I + A_e) W = U - (e.G) S                            S: the state before the chunk
    O = (q.G) S + A_q W
    S' = G_C S + (k . G_{C/.})^T W

Every factor is a decay over exactly the tokens between, so every factor is <= 1 and nothing
overflows. The inverse of I + A_e is made of inverses of its blocks, never of powers of A_e: keys of
length one make every inverse block small, while powers reach 1e18 on equal keys.

A reset is a decay of 0: it cuts scores, erasing, reading and the state at once.

Sources: DeltaNet in parallel form, arXiv 2406.06484; Gated DeltaNet 2412.06464; Kimi Delta
Attention 2510.26692.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.linear_scan.tile import scalar_factors


class ChunkTerms(NamedTuple):
    """What a chunk's decays make of its queries and keys; see this module's docstring.

    Attributes:
      read_scores: A_q without its diagonal.
      erase_scores: A_e.
      reads: q.G, the queries decayed from the chunk's start.
      erases: e.G, the erase keys decayed from the chunk's start.
      writes: k . G_{C/.}, the keys decayed to the chunk's end.
      total: G_C, the decay of the whole chunk; one channel if it is the same for all.
    """

    read_scores: Float[Array, "... C C"]
    erase_scores: Float[Array, "... C C"]
    reads: Float[Array, "... C K"]
    erases: Float[Array, "... C K"]
    writes: Float[Array, "... C K"]
    total: Float[Array, "... K"] | Float[Array, "... 1"]


def undecayed(
    q: Float[Array, "... C K"],
    erase: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    precision: str | None = None,
) -> ChunkTerms:
    """DeltaNet: no decay, so the scores are plain products."""
    return ChunkTerms(
        read_scores=jnp.tril(_products(q, k, precision), -1),
        erase_scores=jnp.tril(_products(erase, k, precision), -1),
        reads=q,
        erases=erase,
        writes=k,
        total=jnp.ones_like(q[..., 0, :1]),
    )


def scalar_decay(
    q: Float[Array, "... C K"],
    erase: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    log_decay: Float[Array, "... C"],
    precision: str | None = None,
) -> ChunkTerms:
    """Gated DeltaNet: one decay per token and head, so one [C, C] mask weighs both scores.

    Args:
      q, erase, k: queries, erase keys and keys of the chunk.
      log_decay: the decay of the state at each token.
      precision: of the matmuls, as `jnp.einsum` takes it.

    Returns:
      The terms of the chunk.
    """
    # Reads see the state after the token's own decay, and so does its erase key.
    factors = scalar_factors(log_decay, log_decay)
    return ChunkTerms(
        read_scores=_products(q, k, precision) * factors.mask,
        erase_scores=_products(erase, k, precision) * factors.mask,
        reads=q * factors.read[..., None],
        erases=erase * factors.read[..., None],
        writes=k * factors.write[..., None],
        total=factors.total[..., None],
    )


def _products(
    rows: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    precision: str | None,
) -> Float[Array, "... C C"]:
    return jnp.einsum("...ik,...jk->...ij", rows, k, precision=precision)


# --- vector decay: one decay per key channel and token


class _Blocks(NamedTuple):
    """Blocks of h tokens, n = C / h of them, before they are merged in pairs.

    The axis of size 2 holds queries and erase keys: both read the same writes.
    """

    scores: Float[Array, "*batch n 2 h h"]
    reads: Float[Array, "*batch n 2 h K"]
    writes: Float[Array, "*batch n h K"]
    total: Float[Array, "*batch n K"]


def vector_decay(
    q: Float[Array, "... C K"],
    erase: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    log_decay: Float[Array, "... C K"],
    precision: str | None = None,
) -> ChunkTerms:
    """Kimi Delta Attention: one decay per key channel, by multiplicative halving.

    Blocks of h = 1, 2, 4, ... tokens are merged in pairs, left L and right R, as in
    `linear_scan.tile.vector_decay`, with two sets of rows that read, queries and erase keys:

        scores[R, L] = reads[R] writes[L]^T
        reads[R] *= total[L]
        writes[L] *= total[R]
        total = total[L] total[R]

    Args:
      q, erase, k: queries, erase keys and keys of the chunk; C is a power of two.
      log_decay: the decay of the state at each token.
      precision: of the matmuls, as `jnp.einsum` takes it.

    Returns:
      The terms of the chunk.
    """
    decay = jnp.exp(log_decay)
    reads = jnp.stack([q * decay, erase * decay], axis=-2)
    blocks = _Blocks(
        scores=jnp.zeros((*reads.shape[:-1], 1, 1), q.dtype),
        reads=reads[..., None, :],
        writes=k[..., None, :],
        total=decay,
    )
    while blocks.total.shape[-2] > 1:
        blocks = _merge(blocks, precision)
    return ChunkTerms(
        read_scores=blocks.scores[..., 0, 0, :, :],
        erase_scores=blocks.scores[..., 0, 1, :, :],
        reads=blocks.reads[..., 0, 0, :, :],
        erases=blocks.reads[..., 0, 1, :, :],
        writes=blocks.writes[..., 0, :, :],
        # The state is multiplied by this factor once a chunk: rounded once, not C times.
        total=jnp.exp(log_decay.sum(-2)),
    )


def _merge(blocks: _Blocks, precision: str | None) -> _Blocks:
    """Merges neighboring blocks in pairs: half as many blocks, of twice as many tokens."""
    *batch, n, _, h, K = blocks.reads.shape
    pairs = (*batch, n // 2, 2)
    scores = blocks.scores.reshape(*pairs, 2, h, h)
    reads = blocks.reads.reshape(*pairs, 2, h, K)
    writes = blocks.writes.reshape(*pairs, h, K)
    total = blocks.total.reshape(*pairs, K)
    left_reads = reads[..., 0, :, :, :]
    right_reads = reads[..., 1, :, :, :]
    left_writes = writes[..., 0, :, :]
    right_writes = writes[..., 1, :, :]
    left_total = total[..., 0, :]
    right_total = total[..., 1, :]

    # Tokens on the right read what tokens on the left wrote, never the other way round.
    if h == 1:
        # A batch of single dot products is slow as a matmul.
        products = right_reads * left_writes[..., None, :, :]
        cross = jnp.sum(products, -1, keepdims=True)
    else:
        cross = jnp.einsum(
            "...aik,...jk->...aij",
            right_reads,
            left_writes,
            precision=precision,
        )
    return _Blocks(
        scores=_lower_triangle(scores[..., 0, :, :, :], cross, scores[..., 1, :, :, :]),
        # Reads now count from the start of the pair, writes to its end.
        reads=jnp.concatenate([left_reads, right_reads * left_total[..., None, None, :]], -2),
        writes=jnp.concatenate([left_writes * right_total[..., None, :], right_writes], -2),
        total=left_total * right_total,
    )


def _lower_triangle(
    left: Float[Array, "... h h"],
    cross: Float[Array, "... h h"],
    right: Float[Array, "... h h"],
) -> Array:
    """[[left, 0], [cross, right]]: [..., 2h, 2h]."""
    upper = jnp.concatenate([left, jnp.zeros_like(cross)], -1)
    lower = jnp.concatenate([cross, right], -1)
    return jnp.concatenate([upper, lower], -2)


# --- the triangular system

# Rows of the blocks that are inverted by substitution: matmuls of fewer rows are slower than that.
SUBSTITUTED = 8


def inverse(
    erase_scores: Float[Array, "... C C"],
    precision: str | None = None,
) -> Float[Array, "... C C"]:
    """(I + A_e)^-1, from the inverses of its diagonal blocks, which double in every level.

        T = [[T_L, 0], [-T_R A_e[R, L] T_L, T_R]]

    Args:
      erase_scores: A_e, strictly lower triangular; C is a power of two.
      precision: of the matmuls. 16-bit inputs want at least "high" (three passes of bfloat16): one
        pass is wrong by up to 5 % on correlated keys.

    Returns:
      The inverse, lower triangular with ones on its diagonal.
    """
    C = erase_scores.shape[-1]
    h = min(C, SUBSTITUTED)
    blocks = _substituted(_diagonal_blocks(erase_scores, h))
    while h < C:
        left = blocks[..., 0::2, :, :]
        right = blocks[..., 1::2, :, :]
        scores = _blocks_below_diagonal(erase_scores, h)
        cross = -_matmul(_matmul(right, scores, precision), left, precision)
        blocks = _lower_triangle(left, cross, right)
        h = 2 * h
    return blocks[..., 0, :, :]


def _diagonal_blocks(matrix: Float[Array, "... C C"], h: int) -> Float[Array, "... n h h"]:
    """The blocks of h rows on the diagonal."""
    *batch, C, _ = matrix.shape
    grid = matrix.reshape(*batch, C // h, h, C // h, h)
    return _same_block(grid)


def _substituted(blocks: Float[Array, "... n h h"]) -> Float[Array, "... n h h"]:
    """(I + block)^-1, row by row: row i is e_i less its scores times the rows before it."""
    h = blocks.shape[-1]
    identity = jnp.eye(h, dtype=blocks.dtype)
    rows: list[Array] = []
    for i in range(h):
        row = jnp.broadcast_to(identity[i], blocks.shape[:-1])
        for j, earlier_row in enumerate(rows):
            row = row - blocks[..., i, j, None] * earlier_row
        rows.append(row)
    return jnp.stack(rows, -2)


def _blocks_below_diagonal(
    matrix: Float[Array, "... C C"],
    h: int,
) -> Float[Array, "... n h h"]:
    """The blocks [R, L] of every pair of neighboring blocks of h rows."""
    *batch, C, _ = matrix.shape
    num_pairs = C // (2 * h)
    grid = matrix.reshape(*batch, num_pairs, 2, h, num_pairs, 2, h)
    # Rows of the right block, columns of the left one.
    return _same_block(grid[..., :, 1, :, :, 0, :])


def _same_block(grid: Float[Array, "... n h n h"]) -> Float[Array, "... n h h"]:
    """Row block n with column block n."""
    own = jnp.diagonal(grid, axis1=-4, axis2=-2)
    return jnp.moveaxis(own, -1, -3)


def _matmul(
    a: Float[Array, "... n h h"],
    b: Float[Array, "... n h h"],
    precision: str | None,
) -> Float[Array, "... n h h"]:
    return jnp.einsum("...ij,...jk->...ik", a, b, precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(
    precision: str | None,
    erase_scores: Float[Array, "... C C"],
    inverse_matrix: Float[Array, "... C C"],
    rows: Float[Array, "... C V"],
) -> Float[Array, "... C V"]:
    """W of (I + A_e) W = rows, by the inverse that is at hand.

    The derivative is that of the solution: with (I + A_e)^T dZ = dW, it is drows = dZ and
    dA_e = -strict_lower(dZ W^T). No gradient flows through the blocks of the inverse, which saves
    four matmuls of [C, C]; a second derivative does flow through them.

    Args:
      precision: of the matmuls, as `jnp.einsum` takes it.
      erase_scores: A_e, strictly lower triangular.
      inverse_matrix: `inverse` of it.
      rows: the right-hand side.

    Returns:
      W.
    """
    del erase_scores
    return jnp.einsum("...ij,...jv->...iv", inverse_matrix, rows, precision=precision)


def _solve_saving(
    precision: str | None,
    erase_scores: Array,
    inverse_matrix: Array,
    rows: Array,
):
    solution = solve(precision, erase_scores, inverse_matrix, rows)
    return solution, (inverse_matrix, solution)


def _solve_backward(precision: str | None, residuals, dsolution: Array):
    inverse_matrix, solution = residuals
    drows = jnp.einsum(
        "...ij,...iv->...jv",
        inverse_matrix,
        dsolution,
        precision=precision,
    )
    products = jnp.einsum(
        "...iv,...jv->...ij",
        drows,
        solution,
        precision=precision,
    )
    # None: the inverse is a function of the scores, whose whole derivative is here already.
    return -jnp.tril(products, -1), None, drows


solve.defvjp(_solve_saving, _solve_backward)
