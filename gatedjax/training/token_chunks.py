"""A batch cut along its length into chunks of tokens, and a loss made chunk by chunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from gatedjax.training.output_matrix import by_group


def over_chunks(
    of_chunk: Callable[[tuple[Array, ...]], tuple[Any, Any, Array]],
    pieces: tuple[Array, ...],
    chunk: int,
) -> tuple[Any, Any, Array]:
    """A loss and its gradients, made chunk by chunk: (sums, what is of tokens, dweights).

    Args:
      of_chunk: of the pieces of a chunk: what is summed, what belongs to its tokens [B C ...], and
        the gradient of the output matrix by groups of rows, which is summed too.
      pieces: arrays [B T ...].
      chunk: tokens whose logits exist at once; 0 for all of them.
    """
    rows, length = pieces[0].shape[:2]
    positions = positions_of_chunk(rows, length, chunk)
    if positions == length:
        return of_chunk(pieces)

    def add_chunk(total: tuple[Any, Array], piece: tuple[Array, ...]):
        sums, of_tokens, dweights = of_chunk(piece)
        return jax.tree.map(jnp.add, total, (sums, dweights)), of_tokens

    def shape_of_piece(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, positions, *x.shape[2:]), x.dtype)

    sums, _, dweights = jax.eval_shape(of_chunk, jax.tree.map(shape_of_piece, pieces))
    zeros = (
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        by_group(jnp.zeros(dweights.shape, dweights.dtype)),
    )
    cut = jax.tree.map(lambda x: chunks(x, positions), pieces)
    (sums, dweights), of_tokens = jax.lax.scan(add_chunk, zeros, cut)
    return sums, jax.tree.map(lambda x: _unchunked(x, length), of_tokens), dweights


def positions_of_chunk(rows: int, length: int, chunk: int) -> int:
    """How many positions of each row make a chunk of about `chunk` tokens."""
    if chunk == 0:
        return length
    return max(1, min(length, chunk // rows))


def chunks(
    x: Shaped[Array, "B T *channels"],
    positions: int,
) -> Shaped[Array, "N B C *channels"]:
    """Pieces of `positions` along T as the first axis. The last is filled with zeros."""
    rows, length = x.shape[:2]
    padding = -length % positions
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, padding)
    padded = jnp.pad(x, widths)
    pieces = padded.reshape(rows, -1, positions, *x.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)


def _unchunked(
    pieces: Shaped[Array, "N B C *channels"],
    length: int,
) -> Shaped[Array, "B T *channels"]:
    """What `chunks` cut, without what filled its last piece."""
    count, rows, positions = pieces.shape[:3]
    joined = jnp.moveaxis(pieces, 0, 1).reshape(rows, count * positions, *pieces.shape[3:])
    return joined[:, :length]


def flat(x: Shaped[Array, "B T *channels"]) -> Shaped[Array, "tokens *channels"]:
    return x.reshape(-1, *x.shape[2:])
