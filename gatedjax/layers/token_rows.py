"""Looks tokens up in a table with a row for each token of the vocabulary."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from gatedjax.sharding import Names, parts, placed

# The logical names of a table's axes.
TABLE_AXES = ("vocab", "embed_vocab")


def token_rows(
    table: Float[Array, "X M"],
    tokens: Int[Any, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    dtype: DTypeLike,
) -> Float[Array, "B T M"]:
    """The tokens' rows of a table; zeros for padding, NaN outside of the vocabulary.

    The table's gradient is summed in float32. In bfloat16 a sum stands still once it is 256 times
    what is added, and the gradient of a common token would be off by half.

    Args:
      table: as it is stored.
      tokens: their numbers.
      segment_ids: 0 for padding; None: there is none.
      dtype: of the result.
    """
    # Below 0 is outside of the vocabulary too, not counted from its end.
    tokens = jnp.where(tokens < 0, table.shape[0], tokens)
    is_token = None if segment_ids is None else segment_ids != 0
    return _taken(jnp.dtype(dtype), table, tokens, is_token)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(
    dtype: jnp.dtype,
    table: Float[Array, "X M"],
    tokens: Int[Array, "B T"],
    is_token: Bool[Array, "B T"] | None,
) -> Float[Array, "B T M"]:
    """As `token_rows`, of tokens that are not negative."""
    rows, length, width = _axes_of_lookup()
    table = placed(table.astype(dtype), ("vocab", width))
    x = jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan)
    x = placed(x, (rows, length, width))
    return x if is_token is None else jnp.where(is_token[..., None], x, 0)


def _taken_forward(dtype: jnp.dtype, table: Array, tokens: Array, is_token: Array | None):
    return _taken(dtype, table, tokens, is_token), (table, tokens, is_token)


def _taken_backward(
    dtype: jnp.dtype,
    residuals: tuple[Array, Array, Array | None],
    dx: Float[Array, "B T M"],
) -> tuple[Float[Array, "X M"], None, None]:
    """Each device adds up its own tokens; those of all devices are added in the rows' dtype."""
    table, tokens, is_token = residuals
    if is_token is not None:
        # Outside of the table, where nothing is added, whatever stands in dx.
        tokens = jnp.where(is_token, tokens, table.shape[0])
    B, T, _ = dx.shape
    rows, length, width = _axes_of_lookup()
    P, Q = parts(rows), parts(length)
    if B % P or T % Q:
        P = Q = 1
    dx = placed(dx, (rows, length, width))

    def by_device(x: Array, *width: str | None) -> Array:
        """[P, Q, tokens of a device, ...]"""
        x = x.reshape(P, B // P, Q, T // Q, *x.shape[2:])
        x = placed(x, (rows, None, length, None, *width))
        x = jnp.moveaxis(x, 2, 1).reshape(P, Q, -1, *x.shape[4:])
        return placed(x, (rows, length, None, *width))

    def added_up(tokens: Int[Array, "..."], dx: Float[Array, "... M"]) -> Float[Array, "X M"]:
        zeros = jnp.zeros(table.shape, jnp.float32)
        return zeros.at[tokens].add(dx.astype(jnp.float32), mode="drop")

    if P * Q == 1:
        sums = added_up(tokens, dx)
    else:
        parts_of_sums = jax.vmap(jax.vmap(added_up))(by_device(tokens), by_device(dx, width))
        parts_of_sums = placed(parts_of_sums, (rows, length, "vocab", width))
        sums = parts_of_sums.astype(dtype).sum((0, 1))
    return placed(sums, TABLE_AXES).astype(table.dtype), None, None


_taken.defvjp(_taken_forward, _taken_backward)


def _axes_of_lookup() -> Names:
    """How tokens' vectors are cut while they are looked up: the logical names of [B, T, M].

    As the table is: each device finds its channels of all tokens, and those of a row then come
    together. That sends tokens' vectors both ways, where whole rows would need the table gathered
    and its gradient summed. Where the sequence is cut too, XLA could move such vectors only by
    replicating them.
    """
    if parts("length") == 1:
        return "lookup_batch", None, "embed_vocab"
    return "batch", "length", None
