"""The mathematics of a chunk inside the TPU kernels: what every kind of decay shares.

`../tile.py` says what a chunk's scores, reads, writes and total are. Here they are written in terms
of 8-row registers, with their derivatives by hand: `scalar_decay.py` and `vector_decay.py` compute
them from the decays, this file reads and updates the state with them.

Mosaic keeps a [C, K] float32 array as C/8 registers of 8 rows, so a chunk is a list of [8, K]
arrays in many places, and only matmuls see it whole.

Functions with `yield` are generators that return their result at the end. Each yield is a place
where the schedule may go on with another head (`interleave`): the compiler does not interleave
independent heads by itself.

`reverse` swaps which of two tokens is the earlier one; nothing else changes.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.common.tpu import LANES, SUBLANES, Ref

# Of a float32 register.
ROWS = SUBLANES
# A [C, K] array as C/8 registers, [8, K] each.
type Registers = list[Array]

# Dimension numbers of `lax.dot_general` for a b, a b^T and a^T b.
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


class TileOptions(NamedTuple):
    """The static arguments of a chunk.

    Attributes:
      rounds: whether matmuls are one pass of bfloat16, so that the matrix unit rounds operands.
      operand: the dtype of a matmul's operands. With bfloat16 they are rounded, and kept so, before
        the matrix unit does it. Everything else is float32.
      inclusive: whether a token reads the state after its own update.
      reverse: whether the recurrence runs from the last token to the first.
      stack: whether the scores of two levels are one matmul of twice the depth, for matrix units of
        256.
    """

    rounds: bool
    operand: jnp.dtype
    inclusive: bool
    reverse: bool
    stack: bool

    def rounded_early(self) -> "TileOptions":
        """With operands that are rounded before the matrix unit does it, where it does."""
        if not self.rounds:
            return self
        return self._replace(operand=jnp.dtype(jnp.bfloat16))


class ChunkTerms(NamedTuple):
    """The terms of a chunk, as `../tile.py` defines them. The scores include their diagonal."""

    scores: Float[Array, "C C"]
    reads: Float[Array, "C K"]
    writes: Float[Array, "C K"]
    total: Float[Array, "1 K"] | Float[Array, "1 1"] | float


# --- registers and matmuls


def matmul(options: TileOptions, a: Array, b: Array, dims=NN) -> Array:
    """a b (or a b^T, a^T b), accumulated in float32."""
    # HIGHEST keeps all bits of float32, in several passes of bfloat16.
    precision = lax.Precision.DEFAULT if options.rounds else lax.Precision.HIGHEST
    a = a.astype(options.operand)
    b = b.astype(options.operand)
    return lax.dot_general(
        a,
        b,
        dims,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def split_rows(x: Array) -> Registers:
    """[C, K] -> C/8 arrays of [8, K]."""
    return [x[start : start + ROWS] for start in range(0, x.shape[0], ROWS)]


def join_rows(xs: Sequence[Array]) -> Array:
    """The inverse of `split_rows`, for any number of rows in each array."""
    if len(xs) == 1:
        return xs[0]
    return jnp.concatenate(xs, axis=0)


class Check:
    """A running sum of arrays in one register: NaN or infinite if an element of them is.

    An addition for each of their registers, where they are in registers anyway. That nothing
    branches here costs less than any look at the sum: a vector's way to the scalar unit is long.
    """

    def __init__(self):
        self._sum: Array | None = None

    def add(self, x: Float[Array, "C D"]) -> None:
        """Adds the elements of `x`."""
        if x.shape[1] < LANES:
            x = jnp.sum(x, axis=1, keepdims=True)
        for start in range(0, x.shape[1], LANES):
            first, *others = split_rows(x[:, start : start + LANES])
            rows = sum(others, first)
            self._sum = rows if self._sum is None else self._sum + rows

    def add_to(self, ref: Ref) -> None:
        """Adds the sum to a register [8, 128] in memory."""
        if self._sum is not None:
            ref[...] += self._sum


def merge_levels(chunk: int, reverse: bool) -> Int[Array, "C C"]:
    """For every pair of tokens the merge that computes its score.

    l where token i and an earlier token j first lie in the same block of 2**l tokens, 0 where i is
    j, -1 where j is later than i.
    """
    i = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    j = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    # The bit length of i ^ j: above the highest bit that differs, both lie in the same block.
    num_levels = chunk.bit_length() - 1
    level = sum(((i ^ j) >= 1 << l).astype(jnp.int32) for l in range(num_levels))
    # In the order of the recurrence.
    is_later = j < i if reverse else j > i
    return jnp.where(is_later, -1, level)


# --- the schedule


def interleave(
    heads: Sequence[Generator],
    lag: int | None,
    num_heads: int | None = None,
) -> None:
    """Runs generators, one for each head and chunk, to their ends.

    Args:
      heads: what to run. A step of a generator goes from one yield to the next.
      lag: None for one after the other. Else they take turns, and generator i starts `lag` turns
        after generator i - 1, so that one head's matmuls are next to another's element-wise work in
        the program.
      num_heads: where there are chunks of several heads, how many: a head's next chunk starts when
        the one before has ended. Others go on meanwhile, so that the matrix unit has no pause
        between two chunks.
    """

    def may_run(i: int) -> bool:
        return num_heads is None or i - num_heads not in running

    running = list(range(len(heads)))
    turn = 0
    while running:
        if lag is None:
            due = running[:1]
        else:
            # Those that have started and have not ended.
            due = [i for i in running if turn >= i * lag and may_run(i)]
        for i in due:
            try:
                next(heads[i])
            except StopIteration:
                running.remove(i)
        turn += 1


# --- the state: [V, K], transposed so that a decay of the keys is a row


def read_and_update(
    options: TileOptions,
    terms: ChunkTerms,
    v: Float[Array, "C V"],
    state: Float[Array, "V K"],
) -> tuple[Float[Array, "C V"], Float[Array, "V K"]]:
    """o, and the state after the chunk."""
    from_chunk = matmul(options, terms.scores, v)
    from_state = matmul(options, terms.reads, state, NT)
    o = from_chunk + from_state
    new_state = state * terms.total + matmul(options, v, terms.writes, TN)
    return o, new_state


class ChunkCotangents(NamedTuple):
    """The cotangents of v, of the terms of a chunk and of the state before it.

    Attributes:
      dlog_total: that of the log of the total decay; its 8 rows are still to be summed.
    """

    dv: Float[Array, "C V"]
    dscores: Float[Array, "C C"]
    dreads: Float[Array, "C K"]
    dwrites: Float[Array, "C K"]
    dlog_total: Float[Array, "8 K"]
    dstate: Float[Array, "V K"]


def read_and_update_backward(
    options: TileOptions,
    terms: ChunkTerms,
    v: Float[Array, "C V"],
    do: Float[Array, "C V"],
    state: Float[Array, "V K"],
    dstate: Float[Array, "V K"],
    scores_are_transposed: bool = False,
) -> Generator[None, None, ChunkCotangents]:
    """The derivative of `read_and_update`.

    Args:
      options: the static arguments.
      terms: of the chunk.
      v: the values.
      do: the cotangent of o.
      state: the state before the chunk.
      dstate: the cotangent of the state after the chunk.
      scores_are_transposed: whether row j, column i of the terms' scores is token i's read of the
        write of j.

    Returns:
      The cotangents (a generator).
    """
    # o = scores v + reads state^T;  state' = total state + v^T writes, all transposed.
    dv_of_scores = matmul(options, terms.scores, do, NN if scores_are_transposed else TN)
    dv_of_update = matmul(options, terms.writes, dstate, NT)
    dv = dv_of_scores + dv_of_update
    yield
    dscores = matmul(options, do, v, NT)
    yield
    dreads = matmul(options, do, state)
    dwrites = matmul(options, v, dstate)
    # total * dtotal, a column of the state at a time: what the log of the total receives.
    first, *others = split_rows(state.astype(jnp.float32) * dstate)
    dlog_total = sum(others, first) * terms.total
    dstate_before = dstate * terms.total + matmul(options, do, terms.reads, TN)
    return ChunkCotangents(
        dv=dv,
        dscores=dscores,
        dreads=dreads,
        dwrites=dwrites,
        dlog_total=dlog_total,
        dstate=dstate_before,
    )
