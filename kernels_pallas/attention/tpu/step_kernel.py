"""The decoding kernel of `attention` on TPU: one token against a cache, read once.

Grid: (batch, parts of a row's blocks, blocks of a part). The blocks come from a table in SMEM that
has none without a slot that the token may see, and none twice: what lies beyond a row's length, or
before its window, is not fetched (`step_cache.block_table`).

VMEM holds a block of keys and one of values, of all key heads (Pallas fetches the next ones
meanwhile), and from a part's first block to its last the weighted sums of values and what the
normalizer keeps of a row, in float32. Rows are query heads. A part leaves them as they are: XLA
merges the parts, ends the rows and multiplies by the gate, as all that is small beside the cache.

Memory is what takes the time, and the matrix unit has plenty to spare. So where key heads lie side
by side, every query head is multiplied by the keys of all of them, and the mask hides those of the
others: nothing has to be moved in VMEM. Of a cache in panels of 128 channels, the products of all
panels are computed alike, and rolled to the columns of the first.

A weight of 0 makes NaN of a value that is NaN. That shows in the sums, which are much smaller than
the values: then the block is computed again, by products that select.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import kernel_tile
from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.normalizers.base import Normalizer, Row
from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.forward import in_lag_order
from kernels_pallas.attention.tpu.step_cache import (
    ALL,
    KIND_BITS,
    KIND_WIDTH,
    SOME,
    Views,
)
from kernels_pallas.common.tpu import Interpret, Ref


class StepPlan(NamedTuple):
    """The static arguments of a step, as the kernel sees it."""

    normalizer: Normalizer
    logits_soft_cap: float | None
    scale: float
    Hk: int
    # Query heads of a key head, with those of padding where rows are by key head.
    group: int
    # Rows of a tile: all query heads, or one key head's.
    rows: int
    views: Views
    # Panels of 128 channels in a slot.
    panels: int
    # Slots of a block, and of what is computed at a time.
    slots: int
    slots_at_once: int
    # How many of these the logits are ahead, in program order.
    lag: int
    # Programs that share a row of the batch.
    parts: int
    # Whether matmuls round their operands to bfloat16, in one pass.
    rounds: bool
    interpret: Interpret

    @property
    def columns_of_slot(self) -> int:
        """Columns of a tile for each slot."""
        return self.panels * self.Hk if self.views.interleaved else 1

    @property
    def tiles_across(self) -> int:
        """How many groups of rows there are, with columns of their own."""
        return 1 if self.views.interleaved else self.Hk


class State(NamedTuple):
    """What is known of a group of rows after some slots."""

    statistics: Row
    # [panels * rows, V / panels]
    sums: tuple[Array, ...]


def kernel(plan: StepPlan, table: Ref, refs: dict[str, Ref], scratch: list[Ref]) -> None:
    """One grid step: a block of slots of one row.

    Args:
      plan: the static arguments.
      table: of blocks, in SMEM.
      refs: operands by name.
      scratch: for each group of rows its statistics, then its sums.
    """
    part = pl.program_id(1)
    i = pl.program_id(2)
    last = pl.num_programs(2) - 1
    entry = table[entry_number(pl.program_id(0), part, i)]
    kind = entry & KIND_BITS
    # Of the block, among all columns of the row.
    first_column = (entry >> KIND_WIDTH) * (plan.slots * plan.columns_of_slot)
    per_group = len(scratch) // plan.tiles_across
    groups = [scratch[n * per_group : (n + 1) * per_group] for n in range(plan.tiles_across)]
    # The normalizer's sums are the last ones.
    num_statistics = per_group - plan.normalizer.sums

    def state_of(group: list[Ref]) -> State:
        values = [ref[...] for ref in group]
        return State(tuple(values[:num_statistics]), tuple(values[num_statistics:]))

    def write(group: list[Ref], state: State) -> None:
        for ref, value in zip(group, (*state.statistics, *state.sums)):
            ref[...] = value

    @pl.when(i == 0)
    def start_rows() -> None:
        for n, group in enumerate(groups):
            write(group, _start(plan, refs, n, part))

    for block_kind in (SOME, ALL):

        @pl.when(kind == block_kind)
        def add_block(masked: bool = block_kind == SOME) -> None:
            before = [state_of(group) for group in groups]
            # Two versions of the same code; the second one runs where values are not finite.
            after = _added(plan, refs, before, first_column, masked, careful=False)
            sums = [x for state in after for x in state.sums]
            is_special = _has_special(sums)

            @pl.when(jnp.logical_not(is_special))
            def keep() -> None:
                for group, state in zip(groups, after):
                    write(group, state)

            @pl.when(is_special)
            def select() -> None:
                selected = _added(plan, refs, before, first_column, masked, careful=True)
                for group, state in zip(groups, selected):
                    write(group, state)

    @pl.when(i == last)
    def leave_rows() -> None:
        for n, group in enumerate(groups):
            for number, ref in enumerate(group):
                refs[result_name(number, num_statistics)][0, 0, n] = ref[...]


def result_name(number: int, num_statistics: int) -> str:
    """The name of what a program leaves: "row0", ..., then "sum0", ..."""
    if number < num_statistics:
        return f"row{number}"
    return f"sum{number - num_statistics}"


def entry_number(b: Array, part: Array, i: Array) -> Array:
    """The place in the table of blocks of a grid step."""
    return (b * pl.num_programs(1) + part) * pl.num_programs(2) + i


def _start(plan: StepPlan, refs: dict[str, Ref], n: int, part: Array) -> State:
    """The state of a group of rows before the first block of a part."""
    normalizer = plan.normalizer
    zero = jnp.zeros((plan.rows, tile.lanes(normalizer)), jnp.float32)
    sink = None
    if "sinks" in refs:
        # A sink counts once, so in one part only. It is the same in every lane.
        sink = jnp.where(part == 0, refs["sinks"][n] + zero, -jnp.inf)
    rows = plan.panels * plan.rows
    width = refs["sum0"].shape[-1]
    sums = tuple(jnp.zeros((rows, width), jnp.float32) for _ in range(normalizer.sums))
    return State(normalizer.start(zero, (), sink), sums)


def _has_special(sums: list[Array]) -> Array:
    """Whether any sum is NaN or infinite: a scalar."""
    found = [jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0) for x in sums]
    most = found[0]
    for x in found[1:]:
        most = jnp.maximum(most, x)
    return jnp.max(most) > 0


class _Chunk(NamedTuple):
    """Some slots against one group of rows."""

    # Of rows.
    n: int
    # Of slots, in a block.
    first: int


def _added(
    plan: StepPlan,
    refs: dict[str, Ref],
    before: list[State],
    first_column: Array,
    masked: bool,
    careful: bool,
) -> list[State]:
    """The states of all groups of rows after a block.

    Args:
      plan: the static arguments.
      refs: operands by name.
      before: the states before the block.
      first_column: of the block, among all columns of the row.
      masked: whether some slot of the block is not valid.
      careful: whether products select.
    """
    states = list(before)
    starts = range(0, plan.slots, plan.slots_at_once)
    # Groups of rows do not wait for each other, so they come in turns.
    chunks = [_Chunk(n, first) for first in starts for n in range(plan.tiles_across)]

    def logits(number: int) -> Array:
        return _logits(plan, refs, chunks[number])

    def add(number: int, s: Array) -> None:
        chunk = chunks[number]
        states[chunk.n] = _add(
            plan,
            refs,
            chunk,
            states[chunk.n],
            s,
            first_column,
            masked,
            careful,
        )

    in_lag_order(range(len(chunks)), plan.lag, logits, add)
    return states


def _columns(plan: StepPlan, chunk: _Chunk) -> slice:
    """The columns of a chunk, in a row of a block's numbers."""
    first = chunk.first * plan.columns_of_slot
    return slice(first, first + plan.slots_at_once * plan.columns_of_slot)


def _logits(plan: StepPlan, refs: dict[str, Ref], chunk: _Chunk) -> Array:
    """The logits of a chunk, before the mask."""
    # Where key heads are interleaved there is one group of rows, number 0.
    q = refs["q"][0, chunk.n]
    if plan.views.k == "channels":
        keys = refs["k"][0, chunk.n, :, _columns(plan, chunk)]
        products = tile.matmul(plan, q, keys, tile.NN)
    elif plan.views.k == "heads":
        keys = refs["k"][0, chunk.n, _columns(plan, chunk)]
        products = tile.matmul(plan, q, keys, tile.NT)
    else:
        keys = refs["k"][0, _columns(plan, chunk)]
        products = _over_panels(plan, tile.matmul(plan, q, keys, tile.NT))
    capped = attention_tile.soft_capped(products * plan.scale, plan.logits_soft_cap)
    if "slopes" not in refs:
        return capped
    # Equal in every lane.
    slope = refs["slopes"][chunk.n][:, :1]
    distance = _by_column(plan, refs["distances"], chunk)
    return kernel_tile.with_slopes(capped, slope, distance).values


def _by_column(plan: StepPlan, ref: Ref, chunk: _Chunk) -> Array:
    """A number for each slot of a chunk, as one for each of its columns: float32 [1, C]."""
    numbers = ref[0, :, chunk.first : chunk.first + plan.slots_at_once].astype(jnp.float32)
    if plan.columns_of_slot == 1:
        return numbers
    # Lanes cannot be repeated, so a product with ones does it: it keeps all bits, and a column has
    # one term.
    shape = (plan.slots_at_once, plan.slots_at_once * plan.columns_of_slot)
    slot = lax.broadcasted_iota(jnp.int32, shape, 0) * plan.columns_of_slot
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    is_of_slot = (column >= slot) & (column < slot + plan.columns_of_slot)
    return jnp.dot(
        numbers,
        is_of_slot.astype(jnp.float32),
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def _over_panels(plan: StepPlan, products: Array) -> Array:
    """[panels * R, C] -> [R, C]: the sums of a slot's panels, in the columns of the first.

    Rows of panel n are right in columns of panel n only, n * Hk after those of the first.
    """
    columns = products.shape[1]
    total = products[: plan.rows]
    for n in range(1, plan.panels):
        of_panel = products[n * plan.rows : (n + 1) * plan.rows]
        # A rotation to the left, within whole registers: what wraps around is hidden.
        total = total + pltpu.roll(of_panel, columns - n * plan.Hk, 1)
    return total


def _in_panels(plan: StepPlan, weights: Array) -> Array:
    """[R, C] -> [panels * R, C]: the weights of a slot in the columns of every panel."""
    rolled = [weights]
    for n in range(1, plan.panels):
        rolled.append(pltpu.roll(weights, n * plan.Hk, 1))
    return jnp.concatenate(rolled, axis=0) if plan.panels > 1 else weights


def _own_columns(plan: StepPlan, columns: int) -> Array | None:
    """Which columns of a tile are of the key head of their row; None if every one is."""
    if not plan.views.interleaved:
        return None
    # Those of the first panel are the key heads' numbers.
    column = lax.broadcasted_iota(jnp.int32, (1, columns), 1) % plan.columns_of_slot
    row = lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0)
    # Rows of padding see nothing.
    return (column == row // plan.group) & (row < plan.Hk * plan.group)


def _add(
    plan: StepPlan,
    refs: dict[str, Ref],
    chunk: _Chunk,
    state: State,
    s: Array,
    first_column: Array,
    masked: bool,
    careful: bool,
) -> State:
    """The state of a group of rows after a chunk with logits `s`; as of `_added`."""
    at = _columns(plan, chunk)
    seen = _own_columns(plan, s.shape[1])
    if masked:
        valid = _by_column(plan, refs["valid"], chunk)
        holds_key = jnp.broadcast_to(valid != 0, s.shape)
        seen = holds_key if seen is None else seen & holds_key
    # Numbers that tell keys of a row apart, in the order of slots.
    keys = first_column + at.start + lax.broadcasted_iota(jnp.int32, (1, s.shape[1]), 1)
    added = plan.normalizer.add(state.statistics, s, seen, keys)
    if plan.views.v == "rows":
        values = refs["v"][0, at]
    elif plan.views.v == "heads":
        values = refs["v"][0, chunk.n, at]
    else:
        values = refs["v"][0, chunk.n, :, at]
    contraction = tile.NT if plan.views.v == "channels" else tile.NN
    mask = _in_panels_mask(plan, seen) if careful else None
    sums = []
    for before, weights in zip(state.sums, added.weights):
        product = tile.selecting_product(
            plan,
            _in_panels(plan, weights),
            mask,
            values,
            contraction,
        )
        if added.keep is not None:
            keep = tile.across(added.keep, before.shape[1])
            # A row's panels share its maximum.
            before = jnp.concatenate([keep] * plan.panels, axis=0) * before
        sums.append(before + product)
    return State(added.row, tuple(sums))


def _in_panels_mask(plan: StepPlan, seen: Array | None) -> Array | None:
    if seen is None or plan.panels == 1:
        return seen
    return _in_panels(plan, seen.astype(jnp.float32)) > 0
