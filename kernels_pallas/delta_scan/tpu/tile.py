"""The mathematics of a chunk inside the TPU kernels: what every kind of decay shares.

`../tile.py` says what a chunk's scores, reads, erases, writes and total are, and which triangular
system gives its changes W. Here that is written in terms of 8-row registers, with the derivatives
by hand; the building blocks are those of `linear_scan/tpu/tile.py`.

The inverse of I + A_e is the one thing that one pass of bfloat16 would spoil: keys that are alike
make differences of large numbers. It is multiplied in three passes of bfloat16, or in float32
where the inputs are. Everything else is one pass for bfloat16 inputs.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
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
from kernels_pallas.linear_scan.tpu.vector_decay import is_later_block


class ChunkTerms(NamedTuple):
    """The terms of a chunk, as `../tile.py` defines them, with the sign of the erase keys changed.

    What the negative of an erase key finds is added, and nothing has to be negated:
    (I - N) W = U + (-e.G) S, with N = -A_e.

    The state is updated once every S tokens: S = C, or two spans of C / 2 lie side by side, so that
    they fill registers. Then decays are those from and to the ends of a span.

    Attributes:
      read_scores: A_q with its diagonal, 0 for tokens of two spans.
      erase_blocks: the blocks of 8 on N's diagonal side by side, strictly lower triangular, see
        `pack_diagonal`; None where larger ones are `Solved`.
      erase_rows: for blocks of h = 8, 16, ... S / 2 the rows of N of every second, later block.
        Only the columns of the block before it are meant. Not for blocks inside of a solved one.
      erases: -e.G.
      totals: the decay of every span.
    """

    read_scores: Float[Array, "C C"]
    erase_blocks: Float[Array, "8 C"] | None
    erase_rows: tuple[Registers, ...]
    reads: Float[Array, "C K"]
    erases: Float[Array, "C K"]
    writes: Float[Array, "C K"]
    totals: tuple[Float[Array, "1 K"] | Float[Array, "1 1"] | float, ...]

    @property
    def span(self) -> int:
        """Tokens between two updates of the state."""
        return self.reads.shape[0] // len(self.totals)


class Solved(NamedTuple):
    """What the backward kernel gets of a chunk that the forward kernel has computed.

    Attributes:
      inverses: of blocks, those of the forward kernel's spans, as `inverse` returns them.
      read_scores: those of its `ChunkTerms`: zeros between two spans. None where they are computed
        again.
    """

    inverses: Float[Array, "S C"]
    read_scores: Float[Array, "C C"] | None

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.inverses.shape[0]


# --- blocks on the diagonal of [C, C], and the same side by side


def lanes_of(C: int) -> Int[Array, "8 C"]:
    """The lane of every element of a register."""
    return lax.broadcasted_iota(jnp.int32, (ROWS, C), 1)


def _is_block(lane: Int[Array, "8 C"], block: int, h: int) -> Bool[Array, "8 C"]:
    """The lanes of a block of h."""
    return (lane >= block * h) & (lane < block * h + h)


def pack_diagonal(xs: Registers, C: int) -> Array:
    """The blocks of 8 rows on the diagonal of [C, C], side by side in one register.

    Args:
      xs: the rows; columns [8, 1] stand for a row of equal numbers.
      C: rows and columns.

    Returns:
      [8, C]: block b in lanes 8 b to 8 b + 7.
    """
    lane = lanes_of(C)
    packed = jnp.broadcast_to(xs[0], lane.shape)
    for block, x in enumerate(xs[1:], 1):
        packed = jnp.where(_is_block(lane, block, ROWS), x, packed)
    return packed


def unpack_diagonal(packed: Float[Array, "8 C"]) -> Registers:
    """The inverse of `pack_diagonal`, with zeros in all other places."""
    C = packed.shape[1]
    lane = lanes_of(C)
    return [jnp.where(_is_block(lane, block, ROWS), packed, 0.0) for block in range(C // ROWS)]


# --- blocks of whole registers


def later_registers(xs: Registers, h: int) -> Registers:
    """Those of later blocks of h >= 8 rows."""
    return [x for i, x in enumerate(xs) if is_later_block(i, h, False)]


def earlier_registers(xs: Registers, h: int) -> Registers:
    """Those of earlier blocks of h >= 8 rows."""
    return [x for i, x in enumerate(xs) if not is_later_block(i, h, False)]


# --- the inverse of I - N


def inverse(
    options: TileOptions,
    terms: ChunkTerms,
    solved: Float[Array, "h C"] | None = None,
) -> Generator[None, None, Float[Array, "S C"]]:
    """(I - N)^-1 of every span, from the inverses of diagonal blocks, which double in every level.

        T = [[T_L, 0], [T_R N[R, L] T_L, T_R]]

    Blocks are kept packed, side by side in h rows: block b of h rows in lanes b h to b h + h. So
    the left operand of a matmul has h rows, not C.

    Args:
      options: the static arguments.
      terms: the terms of the chunk, with N.
      solved: the inverses of blocks of h rows, if they are known.

    Returns:
      The inverses, side by side (a generator).
    """
    lane = lanes_of(terms.read_scores.shape[1])
    if solved is not None:
        packed = split_rows(solved)
    else:
        assert terms.erase_blocks is not None
        packed = [_inverse_of_registers(terms.erase_blocks, lane)]
    h = len(packed) * ROWS
    for erase_rows in terms.erase_rows:
        yield
        # T_R N[R, L], then that times T_L. The right operands are known before the left ones, and
        # have only the blocks that are wanted: what else is in the left ones does not matter.
        parts = _parts(options, packed)
        erase_parts = _parts(options, erase_rows)
        below = [_blocks_below(options, part, h, lane) for part in erase_parts]
        product = _careful_matmul(options, parts, below)
        yield
        lefts = [_left_blocks(options, part, h, lane) for part in parts]
        cross = _careful_matmul(options, _parts(options, product), lefts)
        # Of every pair of blocks the right one, R, has bit h.
        is_right = (lane & h) != 0
        upper = [jnp.where(is_right, 0.0, x) for x in packed]
        lower = [jnp.where(is_right, x, c) for x, c in zip(packed, cross)]
        packed = upper + lower
        h *= 2
    return join_rows(packed)


def _inverse_of_registers(
    blocks: Float[Array, "8 C"],
    lane: Int[Array, "8 C"],
) -> Float[Array, "8 C"]:
    """The inverses of all blocks of 8 rows, side by side: by substitution, in float32."""
    row = lax.broadcasted_iota(jnp.int32, lane.shape, 0)
    column_of_block = lane & (ROWS - 1)
    # Row j of the inverse is final when the rows before it have been added to it.
    solved = (column_of_block == row).astype(jnp.float32)
    for j in range(ROWS - 1):
        # Column j of every block, in all lanes of the block.
        source = lane - column_of_block + j
        column = jnp.take_along_axis(blocks, source, axis=1, mode="promise_in_bounds")
        solved = solved + column * solved[j : j + 1]
    return solved


def _parts(options: TileOptions, rows: Registers) -> list[Registers]:
    """Numbers as sums of two that bfloat16 holds (nearly), where the matrix unit rounds to it."""
    if not options.rounds:
        return [rows]
    # The upper half of the bits, and what is missing.
    upper_half = jnp.int32(-(2**16))
    high = [pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & upper_half, jnp.float32) for x in rows]
    return [high, [x - part for x, part in zip(rows, high)]]


def _careful_matmul(
    options: TileOptions,
    left_parts: list[Registers],
    right_parts: list[Array],
) -> Registers:
    """left right: in three passes of bfloat16 where other matmuls take one, else with all bits.

    Args:
      options: the static arguments.
      left_parts: the left operand's `_parts`.
      right_parts: the right operand's.

    Returns:
      The product.
    """
    if not options.rounds:
        return split_rows(_dot(join_rows(left_parts[0]), right_parts[0], lax.Precision.HIGHEST))
    high, low = (join_rows(part).astype(jnp.bfloat16) for part in left_parts)
    # Of four products of parts the one of both low parts is too small to matter. The other three
    # are one matmul of twice the depth: [[high, high], [low, 0]] [right_high; right_low].
    left = jnp.concatenate(
        [
            jnp.concatenate([high, low], axis=0),
            jnp.concatenate([high, jnp.zeros_like(low)], axis=0),
        ],
        axis=1,
    )
    right = join_rows([x.astype(jnp.bfloat16) for x in right_parts])
    both = _dot(left, right, lax.Precision.DEFAULT)
    num_rows = both.shape[0] // 2
    return split_rows(both[:num_rows] + both[num_rows:])


def _dot(a: Array, b: Array, precision: lax.Precision) -> Array:
    return lax.dot_general(
        a,
        b,
        NN,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _left_blocks(
    options: TileOptions,
    packed: Registers,
    h: int,
    lane: Int[Array, "8 C"],
) -> Float[Array, "C C"]:
    """Of blocks of h rows that are side by side the left ones of all pairs, on the diagonal.

    Args:
      options: the static arguments.
      packed: the blocks.
      h: rows of a block.
      lane: of every element.

    Returns:
      [C, C] with zeros in all other places; in bfloat16 where the matrix unit rounds to it.
    """
    zeros = [jnp.zeros_like(x) for x in packed]
    num_pairs = lane.shape[1] // (2 * h)
    return _in_lanes_of_left(options, [packed + zeros] * num_pairs, h, lane)


def _blocks_below(
    options: TileOptions,
    later_rows: Registers,
    h: int,
    lane: Int[Array, "8 C"],
) -> Float[Array, "C C"]:
    """The blocks [R, L] of all pairs of blocks of h rows; as `_left_blocks`."""
    registers = h // ROWS
    zeros = [jnp.zeros_like(x) for x in later_rows[:registers]]
    pairs = []
    for first in range(0, len(later_rows), registers):
        pairs.append(zeros + later_rows[first : first + registers])
    return _in_lanes_of_left(options, pairs, h, lane)


def _in_lanes_of_left(
    options: TileOptions,
    pairs: list[Registers],
    h: int,
    lane: Int[Array, "8 C"],
) -> Float[Array, "C C"]:
    """The rows of pairs of blocks, with zeros outside the lanes of their left block."""
    rows = []
    for pair, registers in enumerate(pairs):
        is_left = _is_block(lane, 2 * pair, h)
        if options.rounds:
            # Two rows of bfloat16 in one of words: half the work.
            words = pltpu.bitcast(join_rows(registers).astype(jnp.bfloat16), jnp.int32)
            registers = split_rows(words)
        rows += [jnp.where(is_left, x, jnp.zeros_like(x)) for x in registers]
    matrix = join_rows(rows)
    return pltpu.bitcast(matrix, jnp.bfloat16) if options.rounds else matrix


# --- the state: [V, K], transposed so that a decay of the keys is a row


def read_and_update(
    options: TileOptions,
    terms: ChunkTerms,
    inverses: Float[Array, "S C"],
    written: Callable[[], Float[Array, "C V"]],
    state: Float[Array, "V K"],
) -> Generator[None, None, tuple[Float[Array, "C V"], Float[Array, "V K"]]]:
    """o, and the state after the chunk (a generator)."""
    S = terms.span

    from_state = []
    changes = []
    for n, total in enumerate(terms.totals):
        span = slice(n * S, n * S + S)
        # Queries and (negative) erase keys read the same state.
        rows = join_rows((terms.reads[span], terms.erases[span]))
        found = matmul(options, rows, state, NT)
        yield
        change = matmul(options, inverses[:, span], written()[span] + found[S:])
        yield
        from_state.append(found[:S])
        changes.append(change.astype(options.operand))
        update = matmul(options, changes[n], terms.writes[span], TN)
        state = state * total + update
        yield
    from_spans = matmul(options, terms.read_scores, join_rows(changes))
    return join_rows(from_state) + from_spans, state


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

    With (I - N)^T dZ = dW, what was written receives dZ and N receives dZ W^T: the inverse itself
    is never differentiated.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      terms: of the chunk.
      inverse_matrix: `inverse` of these.
      written: what each token writes where nothing is erased.
      do: the cotangent of o.
      state: the state before the chunk.
      dstate: the cotangent of the state after the chunk.

    Returns:
      The cotangents (a generator).
    """
    C = do.shape[0]
    (total,) = terms.totals
    # W once more, and its cotangent.
    found = matmul(options, terms.erases, state, NT)
    of_scores = matmul(options, terms.read_scores, do, TN)
    of_update = matmul(options, terms.writes, dstate, NT)
    yield
    changes = matmul(options, inverse_matrix, written + found)
    dwritten = matmul(options, inverse_matrix, of_scores + of_update, TN)
    yield
    # o = A_q W + reads S^T and W = T (written + erases S^T): the same right operands for both.
    both = join_rows((do, dwritten))
    dscores = matmul(options, both, changes, NT)
    dread_scores = jnp.where(levels >= 0, dscores[:C], 0.0)
    derase_scores = jnp.where(levels > 0, dscores[C:], 0.0)
    yield
    drows = matmul(options, both, state)
    dwrites = matmul(options, changes, dstate)
    yield
    # total * dtotal, a column of the state at a time: what the log of the total receives.
    first, *others = split_rows(state.astype(jnp.float32) * dstate)
    dlog_total = sum(others, first) * total
    rows = join_rows((terms.reads, terms.erases))
    dstate_before = dstate * total + matmul(options, both, rows, TN)
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
