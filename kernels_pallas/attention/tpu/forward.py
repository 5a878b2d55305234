"""The forward kernel of `attention` on TPU.

Grid: (batch, heads, tiles). The tiles of a head come from a table in SMEM, one block of queries
after another, so that tiles which the mask hides entirely are not even grid steps.

VMEM holds one block each of queries, keys and values (Pallas fetches the next one meanwhile), and,
from the first tile of a block of queries to its last, the block's weighted sums of values and what
the normalizer keeps of a row, in float32. The last tile ends the rows, multiplies by sigmoid(gate)
and writes the block of y.

A block of queries is computed in groups of rows. While the weights of one group are computed, the
matrix unit already has the logits of the next ones (`Schedule.lag` of them): they stand before it
in program order, which is what lets the compiler overlap them. On the diagonal a group stops at
the last key that it sees.

A weight of 0 makes NaN of a value that is NaN. So a tile in which something is hidden looks whether
its values are finite first, and if not, its products are the careful ones, which select: a second
version of the same code, that costs nothing while it is not needed.

Nothing is recomputed here; the backward pass recomputes logits and
weights from what this kernel saves.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.attention.kernel_tile import Positions
from kernels_pallas.attention.kernels import (
    ForwardResult,
    Shaped,
    forward_result,
    row_statistics,
    saved_statistics,
)
from kernels_pallas.attention.normalizers.base import undefined_as_nan
from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.call import Tables, call, make_tables, without_padding
from kernels_pallas.attention.tpu.plan import (
    DIAGONAL,
    EMPTY,
    FIRST,
    KIND_BITS,
    LAST,
    MASKED,
    KernelInputs,
    Plan,
    TileTable,
    forward_tiles,
)
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.tpu import Operand, Ref, as_column, sigmoid


class Before(NamedTuple):
    """What earlier keys have made of the rows of a softmax, which are continued with more keys.

    Rows that have not seen anything have an output of 0 and a log-sum-exp of -inf.
    """

    # Float32.
    output: Float[Array, "B T H*V"]
    lse: Float[Array, "B H 1 T"]


def forward(
    plan: Plan,
    inputs: KernelInputs,
    save: bool,
    before: Before | None = None,
) -> ForwardResult:
    """y [B, T, H*V], and with `save` what the backward kernel needs.

    Args:
      plan: the static arguments.
      inputs: the arrays.
      save: whether the backward pass will be asked for.
      before: rows that are continued, without a gate and without sinks; None for new ones.

    Returns:
      Outputs are float32 [B, T, H*V], statistics of rows float32 [B, H, 1, T].
    """
    B = inputs.q.shape[0]
    block = plan.forward.block
    # Whole blocks. The mask hides keys of padding; queries of padding are cut off at the end.
    padded_length = round_up(plan.T, block)
    padded_keys = round_up(plan.S, plan.forward.keys)
    normalizer = plan.normalizer
    tiles = forward_tiles(plan)

    # In the scratch memory, by block of queries: sums of weighted values, then statistics of rows.
    sums = pltpu.VMEM((block, plan.V), jnp.float32)
    statistics = pltpu.VMEM((block, tile.lanes(normalizer)), jnp.float32)
    scratch = [sums] * normalizer.sums + [statistics] * row_statistics(normalizer)
    if plan.may_see_nothing:
        # Whether a row has seen anything.
        scratch.append(statistics)

    # Of queries and keys, of all heads and rows of the batch.
    pairs = B * plan.H * plan.pairs
    results = call(
        plan,
        partial(_kernel, plan),
        make_tables(tiles, inputs, plan.forward),
        grid=(B, plan.H, len(tiles.flags)),
        ins=_inputs(plan, inputs, before, padded_length, padded_keys),
        outs=_outputs(plan, inputs, padded_length, save),
        scratch=scratch,
        name="attention_forward",
        # Logits are products over K, every sum of values one over V.
        flops=2 * pairs * (plan.K + normalizer.sums * plan.V),
        exponentials=pairs,
        # The tiles of a head follow one another: they share its sums.
        parallel=2,
    )
    return forward_result(without_padding(results, plan.T))


# --- operands. Grid indices: b row of the batch, h query head, p entry of the table of tiles.


def _by_query(
    plan: Plan,
    name: str,
    array: Shaped,
    width: int,
) -> Operand:
    """Of [B, T, H * width]: the tile's queries, of the program's head."""

    def index(
        b: Array,
        h: Array,
        p: Array,
        tiles: TileTable,
    ) -> tuple:
        return b, tiles.q_blocks[p], h

    return Operand(
        name,
        array,
        (1, plan.forward.block, width),
        index,
    )


def _by_key(
    plan: Plan,
    name: str,
    array: Shaped,
    width: int,
) -> Operand:
    """Of [B, S, Hk * width]: the tile's keys, of the key head that the program's head uses."""

    def index(
        b: Array,
        h: Array,
        p: Array,
        tiles: TileTable,
    ) -> tuple:
        return b, tiles.k_blocks[p], h // plan.group

    return Operand(
        name,
        array,
        (1, plan.forward.keys, width),
        index,
    )


def _number_by_query(plan: Plan, name: str, array: Shaped) -> Operand:
    """Of [B, H, 1, T]: a number for each of the tile's queries, along lanes."""

    def index(
        b: Array,
        h: Array,
        p: Array,
        tiles: TileTable,
    ) -> tuple:
        return b, h, 0, tiles.q_blocks[p]

    return Operand(
        name,
        array,
        (1, 1, 1, plan.forward.block),
        index,
    )


def _segments(plan: Plan, of_queries: Array, of_keys: Array) -> list[Operand]:
    """Of [B, 1, T] and [B, 1, S]: the segment ids of the tile's queries, and of its keys."""

    def query_index(
        b: Array,
        h: Array,
        p: Array,
        tiles: TileTable,
    ) -> tuple:
        return b, 0, tiles.q_blocks[p]

    def key_index(
        b: Array,
        h: Array,
        p: Array,
        tiles: TileTable,
    ) -> tuple:
        return b, 0, tiles.k_blocks[p]

    return [
        Operand("query_segments", of_queries, (1, 1, plan.forward.block), query_index),
        Operand("key_segments", of_keys, (1, 1, plan.forward.keys), key_index),
    ]


def _inputs(
    plan: Plan,
    inputs: KernelInputs,
    before: Before | None,
    padded_length: int,
    padded_keys: int,
) -> list[Operand]:
    pad_tokens = partial(padded, axis=1, size=padded_length)
    pad_keys = partial(padded, axis=1, size=padded_keys)
    operands = [
        _by_query(plan, "q", pad_tokens(inputs.q), plan.K),
        _by_key(plan, "k", pad_keys(inputs.k), plan.K),
        _by_key(plan, "v", pad_keys(inputs.v), plan.V),
    ]
    if before is not None:
        lse_before = padded(before.lse, 3, padded_length)
        operands.append(_by_query(plan, "before", pad_tokens(before.output), plan.V))
        operands.append(_number_by_query(plan, "lse_before", lse_before))
    gate_logits = inputs.gate_logits
    if gate_logits is not None and plan.gate == "element":
        operand = _by_query(plan, "gate", pad_tokens(gate_logits), plan.V)
        operands.append(operand)
    elif gate_logits is not None:
        by_head = padded(gate_logits, 3, padded_length)
        operand = _number_by_query(plan, "gate", by_head)
        operands.append(operand)
    key_segments = inputs.segments_of_keys
    if inputs.segment_ids is not None and key_segments is not None:
        # Padding with the last id does not widen the bounds of the last block.
        of_queries = padded(inputs.segment_ids, 2, padded_length, mode="edge")
        of_keys = padded(key_segments, 2, padded_keys, mode="edge")
        operands += _segments(plan, of_queries, of_keys)
    return operands


def _outputs(
    plan: Plan,
    inputs: KernelInputs,
    padded_length: int,
    save: bool,
) -> list[Operand]:
    B = inputs.q.shape[0]
    by_token = (B, padded_length, plan.H * plan.V)
    y = like(inputs.q, by_token, plan.out_dtype)
    operands = [_by_query(plan, "y", y, plan.V)]
    if not save and not plan.return_lse:
        return operands
    output = like(inputs.q, by_token, jnp.float32)
    for n in plan.saved_outputs if save else ():
        operands.append(_by_query(plan, f"o{n}", output, plan.V))
    statistic = like(
        inputs.q,
        (B, plan.H, 1, padded_length),
        jnp.float32,
    )
    for n in range(saved_statistics(plan.normalizer)):
        operands.append(_number_by_query(plan, f"saved{n}", statistic))
    return operands


# --- the kernel


def _kernel(
    plan: Plan,
    tables: Tables,
    refs: dict[str, Ref],
    scratch: list[Ref],
) -> None:
    """One grid step: a tile of one head."""
    normalizer = plan.normalizer
    b = pl.program_id(0)
    h = pl.program_id(1)
    p = pl.program_id(2)
    # In the order of `forward`.
    sums = scratch[: normalizer.sums]
    statistics = scratch[normalizer.sums :]
    sees = statistics.pop() if plan.may_see_nothing else None
    flags = tables.tiles.flags[p]
    q_block = tables.tiles.q_blocks[p]
    k_block = tables.tiles.k_blocks[p]

    @pl.when(flags & FIRST != 0)
    def start_rows() -> None:
        # The shape of what the normalizer keeps of a block's rows.
        zero = jnp.zeros((plan.forward.block, tile.lanes(normalizer)), jnp.float32)
        sink = None if tables.sink_logits is None else zero + tables.sink_logits[h]
        if "before" in refs:
            # What was seen before is as one key: its logit the log-sum-exp, its value the output.
            sink = zero + as_column(refs["lse_before"][0, 0])
        for ref, start in zip(statistics, normalizer.start(zero, (), sink)):
            ref[...] = start
        for ref in sums:
            ref[...] = refs["before"][0] if "before" in refs else jnp.zeros_like(ref)
        if sees is not None:
            sees[...] = zero

    # Each kind of tile is compiled by itself. Only the kinds that the table has are.
    kinds = set(forward_tiles(plan).flags & KIND_BITS) - {EMPTY}
    for kind in sorted(kinds):
        is_due = (flags & KIND_BITS) == kind
        if tables.segments is not None:
            is_due &= tables.segments.may_share_segment(plan, plan.forward, b, q_block, k_block)

        add_tile = partial(
            _add_tile,
            plan,
            refs,
            sums,
            statistics,
            sees,
            kind=int(kind),
            slope=None if tables.alibi_slopes is None else tables.alibi_slopes[h],
            first_query=q_block * plan.forward.block,
            first_key=k_block * plan.forward.keys,
        )

        def fast_or_careful(add_tile: Callable[..., None] = add_tile) -> None:
            careful = tile.has_large(refs["v"][0])
            lax.cond(careful, partial(add_tile, careful=True), add_tile)

        # Where every key is seen, NaN goes where it belongs by itself.
        pl.when(is_due)(fast_or_careful if plan.hides(int(kind)) else add_tile)

    @pl.when(flags & LAST != 0)
    def end_rows() -> None:
        row = tuple(ref[...] for ref in statistics)
        # Every token sees itself, unless keys are of another sequence.
        weighted_sums = undefined_as_nan(
            normalizer,
            tuple(tile.across(statistic, plan.V) for statistic in row),
            [ref[...] for ref in sums],
            True if sees is None else tile.across(sees[...], plan.V) > 0,
        )
        outputs, saved = normalizer.finish(row, weighted_sums)
        # The first output is the ungated o.
        y = outputs[0]
        if plan.gate == "element":
            gate = sigmoid(refs["gate"][0])
            y = y * gate
        elif plan.gate == "head":
            # The gate of a head runs along lanes; rows of y run down.
            gate = sigmoid(refs["gate"][0, 0])
            y = y * as_column(gate)
        refs["y"][0] = y.astype(plan.out_dtype)
        # Only what `_outputs` asked for is there to be written.
        for n, output in enumerate(outputs):
            if f"o{n}" in refs:
                refs[f"o{n}"][0] = output
        for n, column in enumerate(saved):
            if f"saved{n}" in refs:
                # A column in HBM would fill 128 lanes for each number.
                refs[f"saved{n}"][0, 0] = tile.as_row(column)


def _add_tile(
    plan: Plan,
    refs: dict[str, Ref],
    sums: list[Ref],
    statistics: list[Ref],
    sees: Ref | None,
    *,
    kind: int,
    slope: Array | None,
    first_query: Array,
    first_key: Array,
    careful: bool = False,
) -> None:
    """Adds a block of keys and values to the sums of a block of queries.

    Args:
      plan: the static arguments.
      refs: the kernel's operands by name.
      sums: of weighted values, [block, V] each; added to.
      statistics: what the normalizer keeps of a row, [block, 1 or lanes] each; updated.
      sees: [block, 1 or lanes], above 0 where a row has seen a key; None if every row does.
      kind: of the tile: FULL, DIAGONAL or MASKED.
      slope: of this head, or None.
      first_query: position of the first query of the tile.
      first_key: position of the first key of the tile.
      careful: whether values that are not seen may be NaN or infinite.
    """
    normalizer = plan.normalizer
    block = plan.forward.block
    rows = plan.forward.rows
    # FULL tiles need no mask of positions.
    by_position = kind in (DIAGONAL, MASKED)
    # Careful products need the mask itself.
    triangles = tile.only_triangles(plan, kind) and not careful
    starts = range(0, block, rows)

    def group_rows(start: int) -> slice:
        return slice(start, start + rows)

    def num_keys(start: int) -> int:
        # On the diagonal the keys after a group's last query are hidden from all of it.
        return start + rows if kind == DIAGONAL else plan.forward.keys

    def positions(start: int) -> Positions:
        end = num_keys(start)
        at = tile.positions(
            first_query + start,
            rows,
            first_key,
            end,
            transposed=False,
        )
        if plan.segments:
            # They are stored along lanes; rows of this tile are queries.
            query_segments = as_column(refs["query_segments"][0, :, group_rows(start)])
            key_segments = refs["key_segments"][0, :, :end]
            at = at._replace(query_segments=query_segments, key_segments=key_segments)
        return at

    def logits(start: int) -> Array:
        at = positions(start)
        q = refs["q"][0, group_rows(start)]
        k = refs["k"][0, : num_keys(start)]
        return tile.logits(plan, q, k, slope, at).values

    def add_values(start: int, s: Array) -> None:
        at = positions(start)
        group = group_rows(start)
        # What the normalizer knows of these rows, from the tiles before.
        row = tuple(ref[group] for ref in statistics)
        mask = None
        if triangles:
            s = tile.below_diagonal(s, transposed=False)
        else:
            mask = tile.visible(plan, at, by_position)
        added = normalizer.add(row, s, mask, at.keys)
        for ref, statistic in zip(statistics, added.row):
            ref[group] = statistic
        if sees is not None:
            pairs = jnp.ones_like(s) if mask is None else mask.astype(jnp.float32)
            sees[group] = jnp.maximum(sees[group], jnp.max(pairs, axis=-1, keepdims=True))
        for ref, weights in zip(sums, added.weights):
            product = tile.selecting_product(
                plan,
                weights,
                mask if careful else None,
                refs["v"][0, : num_keys(start)],
            )
            kept = ref[group]
            if added.keep is not None:
                # The sums so far were weighted relative to another maximum.
                kept = tile.across(added.keep, plan.V) * kept
            ref[group] = kept + product

    in_lag_order(starts, plan.forward.lag, logits, add_values)


def in_lag_order[T](
    starts: range,
    lag: int,
    first: Callable[[int], T],
    second: Callable[[int, T], None],
) -> None:
    """second(start, first(start)) of every group of rows, `first` being `lag` groups ahead.

    Args:
      starts: the first row of every group.
      lag: how many groups the products of `first` are ahead of `second`, in program order.
      first: begins a group: its matrix products.
      second: ends a group, given what `first` made of it.
    """
    ahead = {}
    # This loop runs while the kernel is traced: it decides the order of instructions.
    for n in range(len(starts) + lag):
        if n < len(starts):
            ahead[n] = first(starts[n])
        done = n - lag
        if done >= 0:
            second(starts[done], ahead.pop(done))
