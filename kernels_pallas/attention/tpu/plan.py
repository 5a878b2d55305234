"""The static arguments of the TPU kernels of `attention`, and the tables of tiles they loop over.

Both kernels cut the sequence into blocks, as many of queries as of keys; keys of another sequence
have blocks of their own. A tile is a block of queries against a block of keys. The last axis of a
kernel's grid counts the entries of a table of tiles, made here while the call is traced: tiles that
the mask hides entirely are not in it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.attention.kernels import GateKind, count_visible_pairs, saved_outputs
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.common.padding import round_up
from kernels_pallas.common.tpu import Interpret

LANES = 128

# What there is to compute in a tile. FULL tiles hide nothing by position; the keys of a DIAGONAL
# tile begin where its queries begin, so half of it is hidden; MASKED ones are cut in another way.
FULL, DIAGONAL, MASKED, EMPTY = range(4)
# The kind of a tile is in the lowest two bits of its flags, and these are the others.
KIND_BITS = 3
FIRST = 4  # the first tile of its block of queries (in a span of keys, in the backward pass)
LAST = 8  # the last tile of its block of queries
FLUSH = 16  # backward: with this tile the gradients of its block of keys are complete


class Schedule(NamedTuple):
    """How a kernel is cut. Only its time and memory depend on this."""

    # Queries in a tile.
    block: int
    # Of a block, those that are computed together: queries forward, keys backward.
    rows: int
    # How many such groups the matrix unit is ahead, in program order.
    lag: int = 1
    # Backward: how many keys have their gradients summed up in VMEM at a time.
    span: int = 1 << 30
    # Keys in a tile; None: as many as queries.
    key_block: int | None = None

    @property
    def keys(self) -> int:
        """Keys in a tile."""
        return self.block if self.key_block is None else self.key_block

    def fitted(self, T: int) -> "Schedule":
        """Blocks that cover T tokens with as little padding as their groups allow."""
        # A short sequence may be less than a group; groups are whole registers.
        rows = min(self.rows, round_up(T, LANES))
        num_blocks = -(-T // max(self.block, rows))
        # As many blocks as before, of equal size: none is mostly padding.
        block = round_up(-(-T // num_blocks), rows)
        blocks_in_span = max(1, self.span // block)
        return self._replace(
            block=block,
            rows=rows,
            span=blocks_in_span * block,
        )


class Plan(NamedTuple):
    """The static arguments of a call."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float
    # The true length, without padding.
    T: int
    H: int
    Hk: int
    # Padded to whole registers, as the kernels see them.
    K: int
    V: int
    # The kind of the output gate.
    gate: GateKind
    # Whether there are segment ids, and ALiBi slopes.
    segments: bool
    slopes: bool
    # Whether matmuls round their operands to bfloat16, in one pass.
    rounds: bool
    # Of y, before `op.py` converts it to v's dtype.
    out_dtype: jnp.dtype
    forward: Schedule
    backward: Schedule
    # As `pallas_call` takes it.
    interpret: Interpret
    # Keys, where they are of another sequence than the queries.
    num_keys: int | None = None
    # Whether some query may see no key at all.
    may_see_nothing: bool = False
    # Whether the log-sum-exp of every row is a result too.
    return_lse: bool = False

    @property
    def S(self) -> int:
        """The true number of keys, without padding."""
        return self.T if self.num_keys is None else self.num_keys

    @property
    def pads_queries(self) -> bool:
        """Whether some block of queries is padded, in either pass."""
        return bool(self.T % self.forward.block or self.T % self.backward.block)

    @property
    def pads_keys(self) -> bool:
        """Whether some block of keys is padded, in either pass."""
        return bool(self.S % self.forward.keys or self.S % self.backward.keys)

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.H // self.Hk

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the mask leaves, without segments."""
        if self.num_keys is not None:
            # The work that is declared: a window of another sequence hides some of it.
            return self.T * self.num_keys
        return count_visible_pairs(self.T, self.causal, self.window)

    def hides(self, kind: int) -> bool:
        """Whether a tile of this kind may have a pair that is not visible."""
        return kind in (DIAGONAL, MASKED) or self.segments

    @property
    def saved_outputs(self) -> list[int]:
        """Which outputs of the normalizer the forward kernel writes for the backward kernel."""
        return saved_outputs(self.normalizer, self.gate, self.out_dtype)


class KernelInputs(NamedTuple):
    """The arrays of a call as the kernels take them.

    A head is a range of columns, so that the last axis fills registers; numbers that belong to
    a token have tokens as their last axis.
    """

    q: Float[Array, "B T H*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T Hk*V"]
    gate_logits: Float[Array, "B T H*V"] | Float[Array, "B H 1 T"] | None
    sink_logits: Float[Array, "H"] | None
    alibi_slopes: Float[Array, "H"] | None
    segment_ids: Int[Array, "B 1 T"] | None
    key_segment_ids: Int[Array, "B 1 S"] | None = None

    @property
    def segments_of_keys(self) -> Int[Array, "B 1 S"] | None:
        """The documents of the keys; None without documents."""
        return self.segment_ids if self.key_segment_ids is None else self.key_segment_ids


# What the kernels return: y, heads as columns, and with `return_lse` the log-sum-exp of rows.
KernelOutputs = Float[Array, "B T HV"] | tuple[Float[Array, "B T HV"], Float[Array, "B H 1 T"]]


class TileTable(NamedTuple):
    """The tiles of a kernel in the order of its grid; inside the kernel, references to SMEM."""

    q_blocks: Int[np.ndarray, "N"]
    k_blocks: Int[np.ndarray, "N"]
    flags: Int[np.ndarray, "N"]


def tile_kinds(plan: Plan, schedule: Schedule) -> Int[np.ndarray, "Nq Nk"]:
    """What there is to compute in every tile, by its block of queries and its block of keys."""
    block = schedule.block
    first_query = np.arange(-(-plan.T // block))[:, None] * block
    first_key = np.arange(-(-plan.S // schedule.keys))[None, :] * schedule.keys
    last_query = first_query + block - 1
    last_key = first_key + schedule.keys - 1
    # The least and the largest distance query - key in a tile.
    nearest = first_query - last_key
    farthest = last_query - first_key

    # Is any pair of the tile visible, and is every one?
    shape = nearest.shape
    some_visible = np.full(shape, True)
    all_visible = np.broadcast_to(last_key < plan.S, shape)
    if plan.causal:
        some_visible = farthest >= 0
        # This hides keys of padding as well: they come after every query.
        all_visible = nearest >= 0
    if plan.window is not None:
        # |distance| < window, of the nearest and of the farthest pair.
        some_visible = some_visible & (nearest < plan.window) & (farthest > -plan.window)
        all_visible = all_visible & (farthest < plan.window) & (nearest > -plan.window)
    if plan.T % block:
        # Queries of padding must see nothing: see `tile.visible`.
        all_visible = all_visible & (last_query < plan.T)

    kinds = np.full(shape, EMPTY)
    kinds[some_visible] = MASKED
    kinds[some_visible & all_visible] = FULL
    # On the diagonal no other condition than causality cuts, if the window is at least a block.
    if plan.causal and (plan.window is None or plan.window >= block):
        np.fill_diagonal(kinds, DIAGONAL)
    return kinds


def forward_tiles(plan: Plan) -> TileTable:
    """The tiles of the forward kernel: for one block of queries after another, the keys it sees."""
    kinds = tile_kinds(plan, plan.forward)
    tiles = []
    for i, kinds_of_row in enumerate(kinds):
        # Queries that see nothing, under a window on another sequence, still have y to write.
        keys = np.flatnonzero(kinds_of_row != EMPTY).tolist() or [0]
        for j in keys:
            flags = int(kinds_of_row[j]) | _first_and_last(j, keys)
            tiles.append((i, j, flags))
    return _table(tiles)


def backward_tiles(plan: Plan) -> tuple[TileTable, int, int]:
    """The tiles of the backward kernel, one span of key blocks after another.

    In every span every block of queries has a tile, if only to write zeros to its dq, and the last
    block of queries has a tile with every block of keys, which completes dk and dv.

    Returns:
      The table; how many entries a span has, the same for each; how many blocks a span has.
    """
    kinds = tile_kinds(plan, plan.backward)
    num_blocks = kinds.shape[1]
    blocks_per_span = min(num_blocks, plan.backward.span // plan.backward.keys)
    spans = []
    for start in range(0, num_blocks, blocks_per_span):
        span = range(start, min(start + blocks_per_span, num_blocks))
        spans.append(_tiles_of_span(kinds, span))

    tiles_per_span = max(len(tiles) for tiles in spans)
    tiles = []
    for of_span in spans:
        tiles += of_span
        # Shorter spans end by repeating their last tile without computing anything.
        last_q_block, last_k_block, _ = of_span[-1]
        idle = (last_q_block, last_k_block, EMPTY)
        tiles += [idle] * (tiles_per_span - len(of_span))
    return _table(tiles), tiles_per_span, blocks_per_span


def _tiles_of_span(kinds: Int[np.ndarray, "Nq Nk"], span: range) -> list[tuple[int, int, int]]:
    """(block of queries, block of keys, flags) of every tile of one span of key blocks."""
    tiles = []
    for i in range(len(kinds)):
        if i == len(kinds) - 1:
            # The last queries of a span: with them every block of its keys is complete.
            keys = list(span)
            flush = FLUSH
        else:
            visible = [j for j in span if kinds[i, j] != EMPTY]
            # A block of queries that sees nothing here still has dq to write: zeros.
            keys = visible or [span.start]
            flush = 0
        for j in keys:
            flags = int(kinds[i, j]) | _first_and_last(j, keys) | flush
            tiles.append((i, j, flags))
    return tiles


def _first_and_last(j: int, keys: list[int]) -> int:
    """The flags of key block j in the order of its block of queries."""
    first = FIRST if j == keys[0] else 0
    last = LAST if j == keys[-1] else 0
    return first | last


def _table(tiles: list[tuple[int, int, int]]) -> TileTable:
    q_blocks, k_blocks, flags = np.array(tiles, np.int32).T
    return TileTable(q_blocks, k_blocks, flags)
