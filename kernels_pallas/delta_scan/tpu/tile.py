"""The mathematics of a chunk inside the TPU kernels: what every kind of decay shares.

`../tile.py` says what a chunk's scores, reads, erases, writes and total are, and which triangular
system gives its changes W. Here that is written in terms of 8-row registers, with the derivatives
by hand; the building blocks are those of `linear_scan/tpu/tile.py`.

The inverse of I + A_e is the one thing that one pass of bfloat16 would spoil: keys that are alike
make differences of large numbers. It is multiplied in three passes of bfloat16, or in float32
where the inputs are. Everything else is one pass for bfloat16 inputs.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from kernels_pallas.linear_scan.tpu.tile import (
    NN,
    NT,
    ROWS,
    TN,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)


class ChunkTerms(NamedTuple):
    """The terms of a chunk, as `../tile.py` defines them.

    Attributes:
      read_scores: A_q with its diagonal.
      erase_scores: A_e, strictly lower triangular.
    """

    read_scores: Float[Array, "C C"]
    erase_scores: Float[Array, "C C"]
    reads: Float[Array, "C K"]
    erases: Float[Array, "C K"]
    writes: Float[Array, "C K"]
    total: Float[Array, "1 K"] | Float[Array, "1 1"] | float


# --- the inverse of I + A_e


def blocks_of_ones(C: int) -> Float[Array, "C C"]:
    """1 where row and column lie in the same block of 8, for `inverse`."""
    i = lax.broadcasted_iota(jnp.int32, (C, C), 0)
    j = lax.broadcasted_iota(jnp.int32, (C, C), 1)
    return (i // ROWS == j // ROWS).astype(jnp.float32)


def inverse(
    options: TileOptions,
    erase_scores: Float[Array, "C C"],
    ones: Float[Array, "C C"],
) -> Generator[None, None, Float[Array, "C C"]]:
    """(I + A_e)^-1, from the inverses of its diagonal blocks, which double in every level.

        T = [[T_L, 0], [-T_R A_e[R, L] T_L, T_R]]

    Blocks are kept packed, side by side in h rows: block b of h rows in lanes b h to b h + h. So
    the left operand of a matmul has h rows, not C.

    Args:
      options: the static arguments.
      erase_scores: A_e, strictly lower triangular.
      ones: `blocks_of_ones`, the same for all heads.

    Returns:
      The inverse (a generator).
    """
    scores = split_rows(erase_scores)
    C = erase_scores.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, C), 1)
    packed = [(yield from _inverse_of_registers(options, scores, ones, lane))]
    h = ROWS
    while h < C:
        yield
        # Of every pair of blocks the right one, R, has bit h.
        is_right = (lane & h) != 0
        lefts = [jnp.where(is_right, 0.0, x) for x in packed]
        rights = [jnp.where(is_right, x, 0.0) for x in packed]
        below = [jnp.where(is_right, 0.0, x) for x in _pack_below(scores, h, lane)]
        # A_e[R, L] T_L, then T_R times that.
        left_blocks = [_unpack(part, h, C, lane, is_right=False) for part in _parts(options, lefts)]
        product = _careful_matmul(options, below, left_blocks)
        yield
        right_blocks = [
            _unpack(part, h, C, lane, is_right=True) for part in _parts(options, product)
        ]
        cross = _careful_matmul(options, rights, right_blocks)
        packed = lefts + [right - x for right, x in zip(rights, cross)]
        h *= 2
    return join_rows(packed)


def _inverse_of_registers(
    options: TileOptions,
    scores: Registers,
    ones: Float[Array, "C C"],
    lane: Int[Array, "8 C"],
) -> Generator[None, None, Float[Array, "8 C"]]:
    """The inverses of all blocks of 8 rows, side by side: by substitution, in float32."""
    row = lax.broadcasted_iota(jnp.int32, lane.shape, 0)
    blocks = jnp.zeros(lane.shape, jnp.float32)
    for i, score in enumerate(scores):
        blocks = jnp.where(_is_block(lane, i, ROWS), score, blocks)
    # Column j of every block, in all lanes of the block: one matmul with blocks of ones.
    column_of_block = lane & (ROWS - 1)
    columns = [jnp.where(column_of_block == j, blocks, 0.0) for j in range(ROWS)]
    spread = _careful_matmul(options, columns, [split_rows(ones)])
    yield
    # Row j of the inverse is final when the rows before it have been taken from it.
    solved = (column_of_block == row).astype(jnp.float32)
    for j in range(ROWS - 1):
        solved = solved - spread[j] * solved[j : j + 1]
    return solved


def _parts(options: TileOptions, rows: Registers) -> list[Registers]:
    """Numbers as sums of numbers that bfloat16 holds, where the matrix unit multiplies these."""
    if not options.rounds:
        return [rows]
    high = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in rows]
    return [high, [x - part for x, part in zip(rows, high)]]


def _careful_matmul(
    options: TileOptions,
    left: Registers,
    right_parts: list[Registers],
) -> Registers:
    """left right: in three passes of bfloat16 where other matmuls take one, else with all bits.

    Args:
      options: the static arguments.
      left: the left operand.
      right_parts: the right operand's `_parts`; one of them if it has no more bits.

    Returns:
      The product.
    """
    right, *rests = [join_rows(part) for part in right_parts]
    if not options.rounds:
        return split_rows(_dot(join_rows(left), right, lax.Precision.HIGHEST))
    high, low = _parts(options, left)
    # Of four products of parts the one of both low parts is too small to matter.
    both = _dot(
        join_rows(high + low).astype(jnp.bfloat16),
        right.astype(jnp.bfloat16),
        lax.Precision.DEFAULT,
    )
    num_rows = both.shape[0] // 2
    product = both[:num_rows] + both[num_rows:]
    for rest in rests:
        product = product + _dot(
            join_rows(high).astype(jnp.bfloat16),
            rest.astype(jnp.bfloat16),
            lax.Precision.DEFAULT,
        )
    return split_rows(product)


def _dot(a: Array, b: Array, precision: lax.Precision) -> Array:
    return lax.dot_general(
        a,
        b,
        NN,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _is_block(lane: Int[Array, "8 C"], block: int, h: int) -> Bool[Array, "8 C"]:
    """The lanes of a block of h."""
    return (lane >= block * h) & (lane < block * h + h)


def _unpack(
    packed: Registers,
    h: int,
    C: int,
    lane: Int[Array, "8 C"],
    is_right: bool,
) -> Registers:
    """Blocks of h rows that are side by side -> in [C, C], each in the rows of a block of its pair.

    Args:
      packed: the blocks, each in the lanes of one of its pair; all other lanes are of no meaning.
      h: rows of a block.
      C: rows of the result.
      lane: of every element.
      is_right: whether the rows are those of the right blocks. The others are 0.

    Returns:
      The rows. Left blocks are on the diagonal; right ones are below it.
    """
    zeros = [jnp.zeros_like(x) for x in packed]
    rows = []
    for left in range(0, C // h, 2):
        is_left = _is_block(lane, left, h)
        blocks = [jnp.where(is_left, x, 0.0) for x in packed]
        rows += zeros + blocks if is_right else blocks + zeros
    return rows


def _pack_below(
    scores: Registers,
    h: int,
    lane: Int[Array, "8 C"],
) -> Registers:
    """The blocks [R, L] of [C, C] side by side, each in the lanes of its L."""
    registers_in_block = h // ROWS
    num_blocks = len(scores) // registers_in_block
    packed = scores[registers_in_block : 2 * registers_in_block]
    for right in range(3, num_blocks, 2):
        first = right * registers_in_block
        block = scores[first : first + registers_in_block]
        is_left = _is_block(lane, right - 1, h)
        packed = [jnp.where(is_left, x, p) for x, p in zip(block, packed)]
    return packed


# --- the state: [V, K], transposed so that a decay of the keys is a row


def read_and_update(
    options: TileOptions,
    terms: ChunkTerms,
    inverse_matrix: Float[Array, "C C"],
    written: Float[Array, "C V"],
    state: Float[Array, "V K"],
) -> Generator[None, None, tuple[Float[Array, "C V"], Float[Array, "V K"]]]:
    """o, and the state after the chunk (a generator)."""
    C = written.shape[0]
    # Queries and erase keys read the same state.
    rows = join_rows((terms.reads, terms.erases))
    found = matmul(options, rows, state, NT)
    yield
    changes = matmul(options, inverse_matrix, written - found[C:])
    yield
    o = found[:C] + matmul(options, terms.read_scores, changes)
    yield
    new_state = state * terms.total + matmul(options, changes, terms.writes, TN)
    return o, new_state


class ChunkCotangents(NamedTuple):
    """The cotangents of what was written, of the terms of a chunk and of the state before it.

    Attributes:
      dlog_total: that of the log of the total decay; its 8 rows are still to be summed.
    """

    dwritten: Float[Array, "C V"]
    dread_scores: Float[Array, "C C"]
    derase_scores: Float[Array, "C C"]
    dreads: Float[Array, "C K"]
    derases: Float[Array, "C K"]
    dwrites: Float[Array, "C K"]
    dlog_total: Float[Array, "8 K"]
    dstate: Float[Array, "V K"]


def read_and_update_backward(
    options: TileOptions,
    levels: Int[Array, "C C"],
    terms: ChunkTerms,
    inverse_matrix: Float[Array, "C C"],
    written: Float[Array, "C V"],
    do: Float[Array, "C V"],
    state: Float[Array, "V K"],
    dstate: Float[Array, "V K"],
) -> Generator[None, None, ChunkCotangents]:
    """The derivative of `read_and_update`, and of the inverse with it.

    With (I + A_e)^T dZ = dW, what was written receives dZ and A_e receives -dZ W^T: the inverse
    itself is never differentiated.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      terms: of the chunk.
      inverse_matrix: `inverse` of its erase scores.
      written: what each token writes where nothing is erased.
      do: the cotangent of o.
      state: the state before the chunk.
      dstate: the cotangent of the state after the chunk.

    Returns:
      The cotangents (a generator).
    """
    C = do.shape[0]
    # W once more, and its cotangent.
    found = matmul(options, terms.erases, state, NT)
    of_scores = matmul(options, terms.read_scores, do, TN)
    of_update = matmul(options, terms.writes, dstate, NT)
    yield
    changes = matmul(options, inverse_matrix, written - found)
    dwritten = matmul(options, inverse_matrix, of_scores + of_update, TN)
    yield
    # o = A_q W + reads S^T and W = T (written - erases S^T): the same right operands for both.
    both = join_rows((do.astype(jnp.float32), -dwritten))
    dscores = matmul(options, both, changes, NT)
    dread_scores = jnp.where(levels >= 0, dscores[:C], 0.0)
    derase_scores = jnp.where(levels > 0, dscores[C:], 0.0)
    yield
    drows = matmul(options, both, state)
    dwrites = matmul(options, changes, dstate)
    yield
    # total * dtotal, a column of the state at a time: what the log of the total receives.
    first, *others = split_rows(state.astype(jnp.float32) * dstate)
    dlog_total = sum(others, first) * terms.total
    rows = join_rows((terms.reads, terms.erases))
    dstate_before = dstate * terms.total + matmul(options, both, rows, TN)
    return ChunkCotangents(
        dwritten=dwritten,
        dread_scores=dread_scores,
        derase_scores=derase_scores,
        dreads=drows[:C],
        derases=drows[C:],
        dwrites=dwrites,
        dlog_total=dlog_total,
        dstate=dstate_before,
    )
