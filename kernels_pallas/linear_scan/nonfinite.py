"""What a NaN or Inf of one token reaches in `linear_scan`: the tokens that see it, and no other.

A piece of a sequence (a chunk, or a group of chunks) is multiplied as a whole, with zeros where a
token does not see another. The fast paths notice that something in a piece was not finite, and then
compute that piece again from inputs with zeros in place of NaN and Inf: for tokens that see none of
them, these are the same operations on the same numbers, to the bit. Here is the rest: which tokens'
results are NaN instead.

One channel of a key or query spoils all of a token's; the columns of the values are apart from each
other. What the recurrence sees:

    S_t = exp(g_t) S_{t-1} + k_t^T v_t          key, value and decay of t, and S_{t-1} unless t
                                                begins a segment
    dS_t = q_t^T do_t + exp(g_{t+1}) dS_{t+1}   query and cotangent of t, decay of t+1, and dS_{t+1}
                                                unless t+1 begins a segment; exclusive reads of t
                                                are part of dS_{t-1}

Everything is 0 or 1 in float32, and sums over tokens are matmuls. The kernels leave this to the XLA
path: see their `again.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

# Arrays of 0 and 1.
type Column = Float[Array, "... C 1"]  # a 0 or 1 for every token
type Values = Float[Array, "... C V"]  # and for every column of its value
type Row = Float[Array, "... 1 V"]  # a 0 or 1 for the columns of a state
type Flag = Float[Array, "... 1 1"]  # a 0 or 1 for the piece


class Segments(NamedTuple):
    """Which tokens of a piece belong together, in the order of the recurrence.

    Attributes:
      is_before: whether token j comes before i in the segment of i.
      is_after: whether it comes after i in that segment.
      is_same: either of them, or i itself.
      sees_state: whether token i belongs to the segment of the state before the piece.
      reaches_end: whether it belongs to that of the state after the piece.
      is_start: whether it begins a segment.
      is_unbroken: whether no token does.
    """

    is_before: Float[Array, "... C C"]
    is_after: Float[Array, "... C C"]
    is_same: Bool[Array, "... C C"]
    sees_state: Column
    reaches_end: Column
    is_start: Column
    is_unbroken: Flag


def segments(
    starts_column: Column,
    starts_row: Float[Array, "... 1 C"],
    reverse: bool = False,
) -> Segments:
    """The segments of a piece, from where they start, as a column and as a row.

    Args:
      starts_column: 1 where the state is reset before the token.
      starts_row: the same, as a row.
      reverse: whether the recurrence runs from the last token to the first.
    """
    C = starts_row.shape[-1]
    # As many axes as the starts have.
    pairs = (1,) * (starts_row.ndim - 2) + (C, C)
    i = jax.lax.broadcasted_iota(jnp.int32, pairs, len(pairs) - 2)
    j = jax.lax.broadcasted_iota(jnp.int32, pairs, len(pairs) - 1)
    j_comes_first = j > i if reverse else j < i
    i_comes_first = j < i if reverse else j > i
    # How many segments have begun at each token: as a column for i, as a row for j.
    up_to_i = jnp.where(i_comes_first, 0.0, starts_row)
    number_i = jnp.sum(up_to_i, axis=-1, keepdims=True)
    up_to_j = jnp.where(j_comes_first, 0.0, starts_column)
    number_j = jnp.sum(up_to_j, axis=-2, keepdims=True)
    last_number = jnp.sum(starts_row, axis=-1, keepdims=True)
    is_same = number_i == number_j
    return Segments(
        is_before=jnp.where(is_same & j_comes_first, 1.0, 0.0),
        is_after=jnp.where(is_same & i_comes_first, 1.0, 0.0),
        is_same=is_same,
        sees_state=(number_i == 0).astype(jnp.float32),
        reaches_end=(number_i == last_number).astype(jnp.float32),
        is_start=starts_column,
        is_unbroken=(last_number == 0).astype(jnp.float32),
    )


class Bad(NamedTuple):
    """What of a piece is not finite.

    Attributes:
      query, key: of each token.
      value: of each token and column.
      decay: of each token; -inf is a decay of 0, and not bad.
      bonus: any channel of the bonus; None without one.
      state: any element in a column of the state before the piece.
      cotangent: of each token's output; for the backward pass, as the next one.
      dstate: any element in a column of the cotangent of the state after the piece.
    """

    query: Column
    key: Column
    value: Values
    decay: Column
    bonus: Flag | None
    state: Row
    cotangent: Values | None = None
    dstate: Row | None = None


def bad_elements(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """1 for elements that are NaN or infinite."""
    # Not `is_finite`: with libtpu 0.0.50.1 its comparison of bfloat16 ends a compilation for v7x.
    return jnp.where(jnp.isfinite(x), 0.0, 1.0)


def bad_rows(x: Float[Array, "... C D"]) -> Column:
    """1 for rows with such an element."""
    return jnp.max(bad_elements(x), axis=-1, keepdims=True)


def bad_columns(x: Float[Array, "... K V"]) -> Row:
    """1 for columns with such an element."""
    return jnp.max(bad_elements(x), axis=-2, keepdims=True)


def is_good_log(log_decay: Array) -> Bool[Array, "..."]:
    """Where a log decay is neither NaN nor +inf."""
    return log_decay < jnp.inf


class BadOutputs(NamedTuple):
    """Which results of the forward pass are NaN."""

    o: Bool[Array, "... C V"]
    state: Bool[Array, "... 1 V"]


def forward(tokens: Segments, bad: Bad, inclusive: bool) -> BadOutputs:
    """What is seen by the outputs, and by the state after the piece.

    Args:
      tokens: the segments of the piece.
      bad: what is not finite.
      inclusive: whether a token reads the state after its own update.
    """
    before, own = _state_at_tokens(tokens, bad)
    o = bad.query + before
    if inclusive:
        o = o + own
    if bad.bonus is not None:
        o = o + bad.bonus + bad.key + bad.value
    at_end = jnp.max(tokens.reaches_end * own, axis=-2, keepdims=True)
    at_end = at_end + tokens.is_unbroken * bad.state
    return BadOutputs(o > 0, at_end > 0)


class BadGradients(NamedTuple):
    """Which results of the backward pass are NaN."""

    dq: Bool[Array, "... C 1"]
    dk: Bool[Array, "... C 1"]
    dv: Bool[Array, "... C V"]
    dlog_decay: Bool[Array, "... C 1"]
    dbonus: Bool[Array, "... 1 1"]
    dstate: Bool[Array, "... 1 V"]


def backward(tokens: Segments, bad: Bad, inclusive: bool) -> BadGradients:
    """What is seen by the gradients; the arguments are those of `forward`."""
    assert bad.cotangent is not None
    assert bad.dstate is not None
    before, own = _state_at_tokens(tokens, bad)
    read = bad.query + bad.cotangent
    # The cotangent of the state after each token.
    dstate = _any_of(tokens.is_after, read + bad.decay)
    dstate = dstate + tokens.reaches_end * bad.dstate
    if inclusive:
        dstate = dstate + read
    dq = bad.cotangent + before
    if inclusive:
        dq = dq + own
    dk = dstate + bad.value
    dv = dstate + bad.key
    if bad.bonus is not None:
        dq = dq + bad.bonus + bad.key + bad.value
        dk = dk + bad.bonus + read
        dv = dv + bad.bonus + read
    # The state before a start takes no part in the gradient of its decay.
    dlog_decay = before + bad.decay + dstate
    dbonus = jnp.max(_any_column(read + bad.key + bad.value), axis=-2, keepdims=True)
    dstate_before = jnp.max(tokens.sees_state * (read + bad.decay), axis=-2, keepdims=True)
    dstate_before = dstate_before + tokens.is_unbroken * bad.dstate
    return BadGradients(
        dq=_any_column(dq) > 0,
        dk=_any_column(dk) > 0,
        dv=dv > 0,
        dlog_decay=_any_column(dlog_decay) > 0,
        dbonus=dbonus > 0,
        dstate=dstate_before > 0,
    )


def _state_at_tokens(tokens: Segments, bad: Bad) -> tuple[Values, Values]:
    """What spoils the state that each token finds, and what it adds itself."""
    own = bad.key + bad.decay + bad.value
    before = _any_of(tokens.is_before, own) + tokens.sees_state * bad.state
    return before, own


def _any_of(mask: Float[Array, "... C C"], values: Values) -> Values:
    """How much of `values` the mask of each token selects."""
    # Numbers up to 4, exact in one pass of bfloat16; their sums are float32.
    return jnp.matmul(mask, values, preferred_element_type=jnp.float32)


def _any_column(values: Values) -> Column:
    return jnp.max(values, axis=-1, keepdims=True)
