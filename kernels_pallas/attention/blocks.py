"""How the xla backend cuts a call into blocks, and loops over them.

Queries [B, T, H, D] become blocks [Nq, B, Hk, R, D]. The G = H / Hk query heads of a key head are
laid out one after another as the R = G block_q rows of one tile, so that no key head is repeated
in memory. Keys [B, S, Hk, D] become blocks [Nk, B, Hk, C, D] with C = block_k. Both are padded with
zeros at the end.

Block numbers stay Python numbers as long as they can: loops over few blocks are unrolled, and then
even the bounds of the inner loop are known while tracing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention import tile
from kernels_pallas.attention.inputs import MASK_BLOCK, statistics_dtype
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque

# So few blocks are unrolled: about a tenth faster on a CPU at T = 256.
UNROLLED_BLOCKS = 4


class Plan(NamedTuple):
    """The static arguments of a call: those of `AttentionOptions`, and the sizes of a tile."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float
    # Queries of one head, and keys, in a tile.
    block_q: int
    block_k: int
    # Whether every query is among the keys, and so sees one at least.
    sees_itself: bool = True
    # Whether the log-sum-exp of every row is a result too.
    return_lse: bool = False


class UngatedInputs(NamedTuple):
    """The arrays that decide the ungated output: T queries against S keys.

    Attributes:
      q, k, v, sink_logits, alibi_slopes, normalizer_parameters: as in `AttentionInputs`.
      q_segments, k_segments: the documents of queries and keys, both or neither.
      first: the position of the first query among the keys; 0 if None.
      distances: of keys in no order from a single query, for ALiBi; None if positions tell them.
      block_mask: as in `AttentionInputs`.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S Hk K"]
    v: Float[Array, "B S Hk V"]
    sink_logits: Float[Array, "H"] | None = None
    alibi_slopes: Float[Array, "H"] | None = None
    q_segments: Int[Array, "B T"] | None = None
    k_segments: Int[Array, "B S"] | None = None
    first: Int[Array, ""] | int | None = None
    distances: Int[Array, "B S"] | None = None
    block_mask: Bool[Array, "B H _ _"] | None = None
    normalizer_parameters: Float[Array, "P H"] | None = None


class QueryBlocks(NamedTuple):
    """All Nq blocks of queries; without the first axis, one block."""

    # int32 [Nq], by numpy; of one block a Python number, or a traced one.
    number: Any
    q: Float[Array, "Nq B Hk R K"]
    # The document of every row.
    segments: Int[Array, "Nq B 1 R"] | None
    # The part of the block mask that each block of keys meets: r x c of its entries.
    mask: Bool[Array, "Nq Nk B H r c"] | None


class KeyBlocks(NamedTuple):
    """All Nk blocks of keys; without the first axis, one block."""

    k: Float[Array, "Nk B Hk C K"]
    v: Float[Array, "Nk B Hk C V"]
    # The document of every key.
    segments: Int[Array, "Nk B 1 C"] | None
    # As `UngatedInputs.distances`.
    distances: Int[Array, "Nk B 1 C"] | None


class RowConstants(NamedTuple):
    """What the rows of every query block have in common: they depend on the head alone."""

    # Its dtype is that of all statistics.
    zero: Float[Array, "B Hk R 1"]
    sink: Float[Array, "B Hk R 1"] | None
    slopes: Float[Array, "B Hk R 1"] | None
    # One for each of `Normalizer.parameters`.
    parameters: tuple[Float[Array, "B Hk R 1"], ...]


# Cutting arrays and joining them.


def cut_queries(plan: Plan, inputs: UngatedInputs) -> QueryBlocks:
    """The queries and their documents in blocks."""
    kv_heads = inputs.k.shape[2]
    q = split(inputs.q, kv_heads, plan.block_q)
    segments = None
    if inputs.q_segments is not None:
        group = inputs.q.shape[2] // kv_heads
        # Each head of the group has the same documents.
        segments = jnp.tile(_split_tokens(inputs.q_segments, plan.block_q), group)
    # Numpy, so that `take` gives Python numbers.
    number = np.arange(q.shape[0], dtype=np.int32)
    return QueryBlocks(number, q, segments, _cut_mask(plan, inputs))


def _cut_mask(plan: Plan, inputs: UngatedInputs) -> Bool[Array, "Nq Nk B H r c"] | None:
    """The block mask by tiles. No entry is copied where tiles are whole blocks of it."""
    mask = inputs.block_mask
    if mask is None:
        return None

    def entries(length: int, block: int, size: int) -> Int[np.ndarray, "N n"]:
        """The entries of one axis of the mask that every tile meets."""
        is_one_tile = length <= min(block, MASK_BLOCK)
        assert block % MASK_BLOCK == 0 or MASK_BLOCK % block == 0 or is_one_tile
        # A tile is several blocks of the mask, or lies within one.
        per_tile = max(1, block // MASK_BLOCK)
        first = np.arange(-(-length // block)) * block // MASK_BLOCK
        # What is past the end is padding, hidden by other conditions.
        return np.minimum(first[:, None] + np.arange(per_tile), size - 1)

    rows = entries(inputs.q.shape[1], plan.block_q, mask.shape[2])
    columns = entries(inputs.k.shape[1], plan.block_k, mask.shape[3])
    # [B, H, Nq, r, Nk, c] -> [Nq, Nk, B, H, r, c]
    tiles = mask[:, :, rows][..., columns]
    return tiles.transpose(2, 4, 0, 1, 3, 5)


def cut_keys(plan: Plan, inputs: UngatedInputs) -> KeyBlocks:
    """The keys, values and what is known of them in blocks."""
    kv_heads = inputs.k.shape[2]
    segments = None
    if inputs.k_segments is not None:
        segments = _split_tokens(inputs.k_segments, plan.block_k)
    distances = None
    if inputs.distances is not None:
        distances = _split_tokens(inputs.distances, plan.block_k)
    return KeyBlocks(
        k=split(inputs.k, kv_heads, plan.block_k),
        v=split(inputs.v, kv_heads, plan.block_k),
        segments=segments,
        distances=distances,
    )


def split(
    x: Float[Array, "B T H D"] | Int[Array, "B T H D"],
    kv_heads: int,
    block: int,
) -> Array:
    """[B, T, H, D] -> [N, B, Hk, G block, D], with zeros at the end."""
    B, T, H, D = x.shape
    # What a multiple of the block lacks.
    padding = -T % block
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
    # [B, N, block, Hk, G, D] -> [N, B, Hk, G, block, D]
    group = H // kv_heads
    x = x.reshape(B, -1, block, kv_heads, group, D)
    x = x.transpose(1, 0, 3, 4, 2, 5)
    N = x.shape[0]
    return x.reshape(N, B, kv_heads, -1, D)


def join(
    x: Float[Array, "N B Hk R D"],
    block: int,
    T: int,
) -> Float[Array, "B T H D"]:
    """[N, B, Hk, G block, D] -> [B, T, H, D]: the inverse of `split`."""
    N, B, kv_heads, _, D = x.shape
    # [N, B, Hk, G, block, D] -> [B, N, block, Hk, G, D]
    x = x.reshape(N, B, kv_heads, -1, block, D)
    x = x.transpose(1, 0, 4, 2, 3, 5)
    x = x.reshape(B, N * block, -1, D)
    # Without the padding.
    return x[:, :T]


def _split_tokens(x: Int[Array, "B T"], block: int) -> Int[Array, "N B 1 block"]:
    # As one head of one channel.
    return split(x[:, :, None, None], 1, block)[..., 0]


def row_constants(plan: Plan, inputs: UngatedInputs) -> RowConstants:
    """Sinks and slopes of every row of a query block, and zeros like them."""
    B, _, H, _ = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    # R = G block_q.
    num_rows = plan.block_q * H // kv_heads
    dtype = statistics_dtype(inputs.q, inputs.k, inputs.v)

    def of_rows(x: Array) -> Array:
        x = jnp.broadcast_to(x, (B, kv_heads, num_rows, 1))
        # They are carried through loops along with what varies like q.
        return varying_like(x, inputs.q)

    def of_heads(x: Array) -> Array:
        # Head h = kv_head * G + g fills the rows g * block_q to (g + 1) * block_q.
        by_group = x.astype(dtype).reshape(kv_heads, -1)
        by_row = jnp.repeat(by_group, plan.block_q, axis=1)
        return of_rows(by_row[..., None])

    sink = inputs.sink_logits
    slopes = inputs.alibi_slopes
    # Most normalizers have learned nothing.
    parameters = () if inputs.normalizer_parameters is None else inputs.normalizer_parameters
    return RowConstants(
        zero=of_rows(jnp.zeros((), dtype)),
        sink=None if sink is None else of_heads(sink),
        slopes=None if slopes is None else of_heads(slopes),
        parameters=tuple(of_heads(x) for x in parameters),
    )


def sum_by_head(x: Float[Array, "Nq B Hk R 1"], block_q: int) -> Float[Array, "H"]:
    """Sums over all rows of a head."""
    Nq, B, kv_heads = x.shape[:3]
    # [Nq, B, Hk, G, block_q]: head h is kv_head * G + g.
    x = x.reshape(Nq, B, kv_heads, -1, block_q)
    return jnp.sum(x, axis=(0, 1, 4)).reshape(-1)


# Positions and masks.


def first_position(
    plan: Plan,
    inputs: UngatedInputs,
    number: int | Array,
) -> int | Array:
    """The position of a query block's first row; a Python number where `number` is one."""
    # Not known while tracing where `first` is given.
    position = number * plan.block_q
    return position if inputs.first is None else inputs.first + position


def key_range(
    plan: Plan,
    num_keys: int,
    first_query: int | Array,
) -> tuple[int | Array, int | Array]:
    """(first, end): the key blocks of which the query block at `first_query` sees something."""
    # jnp would make traced bounds of Python numbers, and then no loop could be unrolled.
    static = isinstance(first_query, int)
    maximum = max if static else jnp.maximum
    minimum = min if static else jnp.minimum
    end_query = first_query + plan.block_q
    first_key = 0
    end_key = num_keys
    if plan.window is not None:
        # The first query sees the farthest back, the last one the farthest ahead.
        first_key = maximum(first_query - plan.window + 1, 0)
        end_key = minimum(end_query + plan.window - 1, num_keys)
    if plan.causal:
        # Nothing after the block's last query.
        end_key = minimum(end_query, num_keys)
    first_block = first_key // plan.block_k
    # Rounded up.
    end_block = -(-end_key // plan.block_k)
    return first_block, end_block


def is_no_padding(
    plan: Plan,
    inputs: UngatedInputs,
    rows: QueryBlocks,
) -> Bool[Array, "1 1 R 1"]:
    """Which rows of a query block are queries of the caller."""
    # Row g * block_q + t is token t of the block.
    tokens = jnp.arange(rows.q.shape[-2]) % plan.block_q
    is_real = rows.number * plan.block_q + tokens < inputs.q.shape[1]
    return is_real[None, None, :, None]


def tile_mask(
    plan: Plan,
    inputs: UngatedInputs,
    constants: RowConstants,
    rows: QueryBlocks,
    j: int | Array,
    keys: KeyBlocks,
) -> tile.Mask:
    """Where the tile of one query block against key block `j` lies."""
    num_rows = rows.q.shape[-2]
    # Row g * block_q + t is token t of the block.
    tokens = jnp.arange(num_rows) % plan.block_q
    first_query = first_position(plan, inputs, rows.number)
    first_key = j * plan.block_k
    num_keys = inputs.k.shape[1]
    # Counted from the tile's first key: unrolled tiles that lie alike are compiled once.
    seen = tile.visible(
        first_query - first_key + tokens,
        jnp.arange(plan.block_k),
        # Keys of padding are at the length and beyond.
        length=None if num_keys % plan.block_k == 0 else num_keys - first_key,
        causal=plan.causal and not _is_all_before(plan, first_query, first_key),
        window=plan.window,
        row_segments=rows.segments,
        key_segments=keys.segments,
    )
    # [1 or B, 1, R, C], as the logits have batch and heads.
    seen = seen.reshape((1,) * (4 - seen.ndim) + seen.shape)
    if inputs.q.shape[1] % plan.block_q:
        # Queries of padding see nothing: their 0 times an infinite key is NaN.
        seen = seen & is_no_padding(plan, inputs, rows)
    if rows.mask is not None:
        seen = seen & _on_pairs(plan, rows.mask[j], inputs.k.shape[2])
    positions = first_key + jnp.arange(plan.block_k)
    alibi = None
    if constants.slopes is not None:
        dtype = constants.slopes.dtype
        if keys.distances is None:
            # [1, 1, R, C]
            distances = tile.distance(first_query + tokens, positions, dtype)[None, None]
        else:
            # [B, 1, 1, C]: the single query's.
            distances = keys.distances[..., None, :].astype(dtype)
        alibi = tile.Alibi(constants.slopes, distances)
    return tile.Mask(seen, positions[None, None, None, :], alibi)


def _is_all_before(plan: Plan, first_query: int | Array, first_key: int | Array) -> bool:
    """Whether it is known while tracing that every key of a tile is before every query."""
    static = isinstance(first_query, int) and isinstance(first_key, int)
    return static and first_key + plan.block_k <= first_query


def tile_is_on(rows: QueryBlocks, j: int | Array) -> Bool[Array, ""] | None:
    """Whether the block mask leaves anything of a tile, in any row and head; None without one."""
    return None if rows.mask is None else jnp.any(rows.mask[j])


def _on_pairs(plan: Plan, mask: Bool[Array, "B H r c"], kv_heads: int) -> Bool[Array, "B Hk R C"]:
    """A tile's part of the block mask, pair by pair."""
    B, H, r, c = mask.shape
    queries = jnp.repeat(mask, plan.block_q // r, axis=2)
    pairs = jnp.repeat(queries, plan.block_k // c, axis=3)
    # Head h = kv_head * G + g has the rows g * block_q to (g + 1) * block_q.
    return pairs.reshape(B, kv_heads, H // kv_heads * plan.block_q, plan.block_k)


# Loops.


def scan_blocks(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
) -> tuple[Any, Any]:
    """`lax.scan`; few blocks are unrolled, with Python numbers as their block numbers."""
    num_blocks = jax.tree.leaves(xs)[0].shape[0]
    if num_blocks > UNROLLED_BLOCKS:
        return jax.lax.scan(body, carry, xs)
    # As `lax.scan`, but body sees block numbers that are Python numbers.
    ys = []
    for i in range(num_blocks):
        carry, y = body(carry, take(xs, i))
        ys.append(y)
    stacked = jax.tree.map(lambda *y: jnp.stack(y), *ys)
    return carry, stacked


def loop(
    first: int | Array,
    end: int | Array,
    body: Callable[[Any, Any], Any],
    carry: Any,
) -> Any:
    """carry = body(j, carry) for first <= j < end; unrolled where both are Python numbers."""
    static = isinstance(first, int) and isinstance(end, int)
    # Bounds that are not static depend on where the queries are: see `key_range`.
    if not static or end - first > UNROLLED_BLOCKS:
        return jax.lax.fori_loop(first, end, body, carry)
    for j in range(first, end):
        carry = body(j, carry)
    return carry


def take(blocks: Any, i: int | Array) -> Any:
    """Block `i` of every array. Block numbers, which numpy holds, are Python numbers then."""

    def take_one(x: Array | np.ndarray) -> Array | int:
        if isinstance(x, np.ndarray):
            return int(x[i])
        if not isinstance(i, int):
            return x[i]
        # XLA is not told which block it is: what is computed of it is compiled once for all blocks.
        index = opaque(jnp.int32(i))
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False, allow_negative_indices=False)

    return jax.tree.map(take_one, blocks)


def add_at(
    x: Float[Array, "N *block"],
    i: int | Array,
    y: Float[Array, "*block"],
) -> Array:
    """`x` with `y` added to its block `i`."""
    return jax.lax.dynamic_update_index_in_dim(x, x[i] + y, i, 0)
