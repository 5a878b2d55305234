"""What every layer is told about the tokens, besides their vectors.

Who is a token, and what is a document (docs/tokens.md):

- segment id 0 is padding: no token. It is never seen, never counted, and no state passes into it.
- A document is a maximal run of equal ids. An id that comes back later in the row is a new
  document; padding between two runs ends the first one.
- Positions count from 0 in each document, unless the caller gives others.
- With caches, the first token of a call goes on with the row's last document if it has its id.
  Padding at either end of a call separates nothing. Without ids a call goes on with it always.

`arranged` brings every input into one form, once; layers rely on that form.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.layers.depth import Depth
from gatedjax.layers.shared_weights import SharedWeights


@struct.dataclass
class History:
    """What the caches hold of every row, before the tokens of a call.

    Attributes:
      tokens: of the row, over all of its documents: where the next one goes.
      in_document: how many of them belong to the row's last document.
      next_position: of the token that goes on with that document.
      segment_id: of that document, as the caller gave it; 0 before the first token.
      is_empty: no row holds a token yet. A static value: prefill needs no keys from a cache.
    """

    tokens: Int[Array, " B"]
    in_document: Int[Array, " B"]
    next_position: Int[Array, " B"]
    segment_id: Int[Array, " B"]
    is_empty: bool = struct.field(pytree_node=False, default=False)


class Grid(NamedTuple):
    """How the patches of an image lie: row by row, behind `extra` tokens that are no patches."""

    rows: int
    columns: int
    extra: int = 0


@struct.dataclass
class TokenInfo:
    """Positions, documents and ids of the tokens of a batch.

    Attributes:
      positions: position of each token within its document (rotary embeddings).
      segment_ids: which document of a packed row each token belongs to, 0 for padding; None when a
        row is one document. Layers see them numbered: 1, 2, 3 ... With caches 1 is the document
        that the row goes on with, and padding stands at the end of the row.
      tokens: their ids (routers that go by a hash of them); None for vectors that come from
        elsewhere.
      lora_weights: weights of low-rank experts, from a first pass of the whole model (X-LoRA); None
        if each layer makes its own.
      before: what the caches hold. None without caches. A layer that is called by itself with a
        cache may leave it out: the row is then one document, of which `positions[:, 0]` tokens
        came before.
      depth: where the layer stands in the model; None where no layer asks for it.
      bank_values: what the model's value bank holds for the tokens; None where it has none.
      weights: of the attention layer whose weights others share; None where none does.
      keys: of the attention layer whose keys and values others share; None where none does.
      memory: what the last scan has read from its state; None where no layer asks for it.
      grid: of the patches, where every row is an image; None for text. A static value.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    tokens: Int[Array, "B T"] | None = None
    lora_weights: Float[Array, "B T E"] | None = None
    before: History | None = None
    depth: Depth | None = None
    bank_values: Float[Array, "B T S Hk D"] | None = None
    weights: SharedWeights | None = None
    keys: SharedWeights | None = None
    memory: Float[Array, "B T H V"] | None = None
    grid: Grid | None = struct.field(pytree_node=False, default=None)


class Arranged(NamedTuple):
    """The tokens of a call in the form that layers rely on.

    info: about the tokens, in their new order.
    after: what the caches will hold; None without caches.
    order: which token of the call stands at each place; None where none was moved.
    """

    info: TokenInfo
    after: History | None
    order: Int[Array, "B T"] | None


def default_info(x: Float[Array, "B T M"]) -> TokenInfo:
    """Every row is one document: positions 0, 1, 2 ..."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    return TokenInfo(jnp.broadcast_to(positions, x.shape[:2]))


def numbered(info: TokenInfo) -> TokenInfo:
    """The same with documents numbered 1, 2, 3 ... in each row: an id that comes back is new."""
    if info.segment_ids is None:
        return info
    return dataclasses.replace(info, segment_ids=document_numbers(info.segment_ids))


def document_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """1, 2, 3 ... for the documents of a row, 0 for padding."""
    segment_ids = jnp.asarray(segment_ids)
    numbers = jnp.cumsum(_starts(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids != 0, numbers, 0)


def empty_history(batch: int) -> History:
    """That of caches without a token."""
    # An array each: callers donate them.
    return History(
        tokens=jnp.zeros(batch, jnp.int32),
        in_document=jnp.zeros(batch, jnp.int32),
        next_position=jnp.zeros(batch, jnp.int32),
        segment_id=jnp.zeros(batch, jnp.int32),
        is_empty=True,
    )


def history_of(info: TokenInfo) -> History:
    """`info.before`, or what positions say of it to a layer that is called by itself.

    Raises:
      ValueError: documents with a cache, but nothing about what it holds.
    """
    if info.before is not None:
        return info.before
    if info.segment_ids is not None:
        raise ValueError(
            "info.before: got None with segment_ids and a cache, expected the History of the cache"
        )
    start = info.positions[:, 0]
    return History(
        tokens=start,
        in_document=start,
        next_position=start,
        segment_id=jnp.ones_like(start),
    )


def arranged(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    before: History | None = None,
) -> Arranged:
    """What layers are told about the tokens of a call.

    Args:
      tokens: their ids.
      positions: within their documents; None counts them.
      segment_ids: the document of each token, 0 for padding; None for one document a row.
      before: what the caches hold; None without caches.

    Returns:
      The numbered documents and their positions, and what the caches will hold. With caches and
      segment ids the padding of a row comes after its tokens.
    """
    if segment_ids is None:
        return _arranged_whole_rows(tokens, positions, before)
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    if before is None:
        starts = _starts(segment_ids)
        numbers = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        numbers = jnp.where(segment_ids != 0, numbers, 0)
        if positions is None:
            positions = jnp.where(numbers > 0, _since_start(starts), 0)
        return Arranged(TokenInfo(positions, numbers, tokens), None, None)

    starts = _starts(segment_ids, before.segment_id)
    order = None
    if tokens.shape[1] > 1:
        # Tokens first, in their order: states and convolutions then never meet padding on the way.
        order = jnp.argsort(segment_ids == 0, axis=1, stable=True)
        tokens, segment_ids, starts = (
            jnp.take_along_axis(x, order, axis=1) for x in (tokens, segment_ids, starts)
        )
        if positions is not None:
            positions = jnp.take_along_axis(positions, order, axis=1)
    # 1 goes on with what the caches hold; what begins here is 2, 3 ...
    numbers = jnp.cumsum(starts, axis=1, dtype=jnp.int32) + 1
    numbers = jnp.where(segment_ids != 0, numbers, 0)
    since_start = _since_start(starts)
    goes_on = numbers == 1
    in_document = since_start + jnp.where(goes_on, before.in_document[:, None], 0)
    if positions is None:
        positions = since_start + jnp.where(goes_on, before.next_position[:, None], 0)
        positions = jnp.where(numbers > 0, positions, 0)
    info = TokenInfo(positions, numbers, tokens, before=before)

    count = jnp.sum(numbers > 0, axis=1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)[:, None]

    def after_last(of_tokens: Array, unchanged: Array) -> Array:
        of_last = jnp.take_along_axis(of_tokens, last, axis=1)[:, 0]
        return jnp.where(count > 0, of_last, unchanged)

    after = History(
        tokens=before.tokens + count,
        in_document=after_last(in_document + 1, before.in_document),
        next_position=after_last(positions + 1, before.next_position),
        segment_id=after_last(segment_ids, before.segment_id),
    )
    return Arranged(info, after, order)


def in_order(x: Array, order: Int[Array, "B T"]) -> Array:
    """[B, T, ...]: the values of the tokens of a call, in the order of `Arranged`."""
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def out_of_order(x: Array, order: Int[Array, "B T"]) -> Array:
    """[B, T, ...]: the values as the call had its tokens."""
    return in_order(x, jnp.argsort(order, axis=1))


def _arranged_whole_rows(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    before: History | None,
) -> Arranged:
    """Without segment ids: every row is one document, or goes on with its last one."""
    length = tokens.shape[1]
    if positions is None:
        start = 0 if before is None else before.next_position[:, None]
        positions = start + jnp.arange(length, dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, tokens.shape)
    if before is None:
        return Arranged(TokenInfo(positions, None, tokens), None, None)
    after = History(
        tokens=before.tokens + length,
        in_document=before.in_document + length,
        next_position=positions[:, -1] + 1,
        segment_id=jnp.where(before.segment_id == 0, 1, before.segment_id),
    )
    return Arranged(TokenInfo(positions, None, tokens, before=before), after, None)


def _starts(
    segment_ids: Int[Array, "B T"],
    id_before: Int[Array, " B"] | None = None,
) -> Bool[Array, "B T"]:
    """Whether a document begins at a token: the place before it has another id.

    Args:
      segment_ids: 0 for padding.
      id_before: of the last token before the row; 0 or None if there is none.
    """
    is_token = segment_ids != 0
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    if id_before is not None:
        # Padding in front of the first token separates it from nothing.
        is_first = is_token & (jnp.cumsum(is_token, axis=1) == 1)
        previous = jnp.where(is_first, id_before[:, None], previous)
    return is_token & (segment_ids != previous)


def _since_start(starts: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Places since the last start; since the beginning of the row before the first one."""
    place = jnp.arange(starts.shape[1], dtype=jnp.int32)
    start = jnp.where(starts, place, 0)
    return place - jax.lax.cummax(start, axis=1)
