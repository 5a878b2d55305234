"""One decoding step of `attention` on GPU, the cache split over its length.

Grid: (parts of the cache, key heads, batch). A program loops over the slots of one part of one key
head. The rows of its tile are the query heads of the group, so that every slot is read once, for
all of them; they stay in registers with the running sums. The cache is read as it lies in memory:
nothing of it is copied to be padded.

A program leaves its sums and what the normalizer keeps of a row. These are small beside the cache:
XLA merges them over the parts, ends the rows and multiplies by the gate.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.gpu import tile
from kernels_pallas.attention.gpu import tuning as gpu_tuning
from kernels_pallas.attention.gpu.call import (
    Operand,
    block_positions,
    by_row,
    call,
    load,
    store,
    whole,
)
from kernels_pallas.attention.gpu.exponentials import exponentials, in_unit
from kernels_pallas.attention.gpu.matmuls import EXACT, matmuls, operands
from kernels_pallas.attention.gpu.plan import Plan, Ref, unsupported_by_kernels
from kernels_pallas.attention.gpu.tile import Rows
from kernels_pallas.attention.gpu.tuning import STEP, STEP_PROGRAMS, Schedule, padded_channels
from kernels_pallas.attention.inputs import StepInputs, StepOptions
from kernels_pallas.attention.kernels import (
    Shaped,
    gated_step,
    row_statistics,
    step_over_mesh,
)
from kernels_pallas.attention.normalizers.base import undefined_as_nan
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import padded, power_of_two


def unsupported(inputs: StepInputs, options: StepOptions) -> str | None:
    """Why this backend cannot take a call of `attention_step`, or None when it can."""
    return unsupported_by_kernels(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        options.normalizer,
    )


def attention_step(
    inputs: StepInputs,
    options: StepOptions,
    *,
    interpret: bool = False,
) -> Array:
    """As `api.attention_step`, with every default filled in."""

    def attend(part: StepInputs) -> Array:
        return gated_step(partial(_ungated, options, interpret), options, part)

    return step_over_mesh(attend, inputs)


# --- the kernel's inputs and outputs


class KernelInputs(NamedTuple):
    """The arrays of a step as the kernel takes them.

    There are R rows for each key head, of which the first are the query heads of its group.
    """

    # [B, Hk, R, K], K a power of two.
    q: Array
    # [B, S, Hk, K] and [B, S, Hk, V], as the caller has them.
    k_cache: Array
    v_cache: Array
    # float32 [Hk, R]
    sink_logits: Array | None
    alibi_slopes: Array | None
    # int32 [B, S]
    valid: Array
    distances: Array | None


def _ungated(options: StepOptions, interpret: bool, inputs: StepInputs) -> Array:
    """The ungated output, float32 [B, H, V]."""
    B, H, K = inputs.q.shape
    _, _, Hk, V = inputs.v_cache.shape
    group = H // Hk
    plan = _plan(options, interpret, inputs)
    num_rows = rows_of_tile(group)
    by_key_head = inputs.q.reshape(B, Hk, group, K)
    # Rows of padding compute something that nobody reads.
    queries = padded(by_key_head, 2, num_rows)
    distances = inputs.distances
    if distances is not None:
        distances = distances.astype(jnp.int32)
    kernel_inputs = KernelInputs(
        q=padded(queries, 3, plan.K),
        k_cache=inputs.k_cache,
        v_cache=inputs.v_cache,
        sink_logits=_by_key_head(inputs.sink_logits, Hk, num_rows),
        alibi_slopes=_by_key_head(inputs.alibi_slopes, Hk, num_rows),
        valid=inputs.valid.astype(jnp.int32),
        distances=distances,
    )
    output = _over_parts(plan, kernel_inputs)
    # Without the rows and channels of padding. The query heads of a key head are consecutive.
    return output[:, :, :group, :V].reshape(B, H, V)


def _plan(options: StepOptions, interpret: bool, inputs: StepInputs) -> Plan:
    """The static arguments of a step: those of a call with S tokens, without a mask or a gate."""
    _, H, K = inputs.q.shape
    _, S, Hk, V = inputs.v_cache.shape
    kind = matmuls(inputs.q, inputs.k_cache, inputs.v_cache)
    operand, precision = operands(interpret, kind)
    padded_K = padded_channels(K)
    padded_V = padded_channels(V)
    config = gpu_tuning.step(padded_K, padded_V)
    taken = exponentials(options.normalizer, exact=kind == EXACT, interpret=interpret)
    return Plan(
        normalizer=taken.in_kernel,
        normalizer_around=taken.around,
        # Which slots are visible is in `valid`.
        causal=False,
        window=None,
        logits_soft_cap=in_unit(options.logits_soft_cap, taken.unit),
        scale=options.scale,
        unit=taken.unit,
        T=S,
        length=S,
        H=H,
        Hk=Hk,
        K=padded_K,
        V=padded_V,
        # `_step` gates, after the parts are merged.
        gate="none",
        segments=False,
        slopes=inputs.alibi_slopes is not None,
        operand=operand,
        precision=precision,
        out_dtype=jnp.dtype(inputs.v_cache.dtype),
        # The one kernel takes the configuration of the forward pass.
        schedule=Schedule(forward=config, dq=config, dkv=config),
        interpret=interpret,
    )


def _by_key_head(x: Array | None, Hk: int, num_rows: int) -> Array | None:
    """A number for each query head, [H] -> float32 [Hk, R]."""
    if x is None:
        return None
    by_key_head = x.astype(jnp.float32).reshape(Hk, -1)
    return padded(by_key_head, 1, num_rows)


def rows_of_tile(group: int) -> int:
    """The rows of a tile that the query heads of a key head fill."""
    # A power of two, and no less than the matrix unit's tile.
    return max(STEP.block_q, power_of_two(group))


def split(heads: int, blocks: int) -> tuple[int, int]:
    """(parts of a cache, blocks of slots in each): as many parts as fill the chip.

    `heads` programs read one part.
    """
    parts_that_fill = max(1, STEP_PROGRAMS // heads)
    # Rounded up, so there may be fewer parts than would fill the chip, but none waits for another.
    blocks_each = -(-blocks // min(blocks, parts_that_fill))
    return -(-blocks // blocks_each), blocks_each


def _over_parts(plan: Plan, inputs: KernelInputs) -> Array:
    """The ungated output, float32 [B, Hk, R, V], merged over the parts of the cache."""
    B, Hk, R, _ = inputs.q.shape
    S = plan.T
    normalizer = plan.normalizer_around
    config = plan.schedule.forward
    num_parts, blocks_each = split(B * Hk, -(-S // config.block_k))
    num_statistics = row_statistics(normalizer)
    # What a program leaves of its rows.
    part_of_sums = like(inputs.q, (B, Hk, num_parts, R, plan.V), jnp.float32)
    part_of_row = like(inputs.q, (B, Hk, num_parts, R), jnp.float32)
    outs = {}
    for n in range(normalizer.sums):
        outs[f"sum{n}"] = _by_part(part_of_sums)
    for n in range(num_statistics):
        outs[f"row{n}"] = _by_part(part_of_row)

    pairs = B * plan.H * S
    K = inputs.k_cache.shape[3]
    V = inputs.v_cache.shape[3]
    results = call(
        plan,
        partial(_kernel, plan, blocks_each),
        config,
        grid=(num_parts, Hk, B),
        ins=_operands(inputs),
        outs=outs,
        name="attention_step",
        flops=2 * pairs * (K + normalizer.sums * V),
        exponentials=pairs,
    )
    # Parts first, as `Normalizer.merge` takes them.
    row = []
    for n in range(num_statistics):
        by_part = jnp.moveaxis(results[f"row{n}"], 2, 0)
        # [parts, B, Hk, R, 1]
        row.append(by_part[..., None])
    sums = []
    for n in range(normalizer.sums):
        # [parts, B, Hk, R, V]
        sums.append(jnp.moveaxis(results[f"sum{n}"], 2, 0))
    merged_row, merged_sums = normalizer.merge(tuple(row), sums)
    # [B, 1, 1, 1]; a token without a slot has zeros.
    sees = jnp.any(inputs.valid != 0, axis=1)[:, None, None, None]
    sums = undefined_as_nan(normalizer, merged_row, merged_sums, sees)
    outputs, _ = normalizer.finish(merged_row, sums)
    return outputs[0]


def _operands(inputs: KernelInputs) -> dict[str, Operand]:
    """What a program reads. Grid indices: n part, h key head, b row of the batch."""
    _, _, R, K = inputs.q.shape

    def queries_index(n: Array, h: Array, b: Array) -> tuple:
        return b, h, 0, 0

    def cache_index(n: Array, h: Array, b: Array) -> tuple:
        return b, 0, h, 0

    def cache(array: Array) -> Operand:
        # All slots of one head: the program loads those of its part.
        S = array.shape[1]
        width = array.shape[3]
        spec = pl.BlockSpec((None, S, None, width), cache_index)
        return Operand(array, spec)

    queries_spec = pl.BlockSpec((None, None, R, K), queries_index)
    operands = {
        "q": Operand(inputs.q, queries_spec),
        "k": cache(inputs.k_cache),
        "v": cache(inputs.v_cache),
        "valid": by_row(inputs.valid),
    }
    if inputs.sink_logits is not None:
        operands["sinks"] = whole(inputs.sink_logits)
    if inputs.alibi_slopes is not None:
        operands["slopes"] = whole(inputs.alibi_slopes)
    if inputs.distances is not None:
        operands["distances"] = by_row(inputs.distances)
    return operands


def _by_part(array: Shaped) -> Operand:
    """Of [B, Hk, parts, ...]: what one program writes."""
    # [R, V] or [R]
    shape = array.shape[3:]

    def index(n: Array, h: Array, b: Array) -> tuple:
        return b, h, n, *[0] * len(shape)

    spec = pl.BlockSpec((None, None, None, *shape), index)
    return Operand(array, spec)


# --- the kernel


def _kernel(plan: Plan, blocks_each: int, refs: dict[str, Ref]) -> None:
    """One program: a part of the slots of one key head."""
    normalizer = plan.normalizer
    block = plan.schedule.forward.block_k
    R = refs["q"].shape[0]
    part = pl.program_id(0)
    key_head = pl.program_id(1)
    # Rows are query heads of the group.
    row = lax.iota(jnp.int32, R)
    zero = jnp.zeros((R, 1), jnp.float32)
    queries = load(refs["q"], row, plan.K)
    slope = plan.unit * _of_rows(refs["slopes"], key_head, row) if plan.slopes else None
    product = partial(tile.matmul, plan)

    def add_slots(slot_block: Array, carry: Rows) -> Rows:
        slots = block_positions(slot_block, block)
        # The last block may end after the cache.
        inside = slots < plan.T
        valid = pltriton.load(
            refs["valid"].at[slots],
            mask=inside,
            other=0,
        )
        # What a slot that is not valid holds is not read: it may be anything.
        holds_key = valid != 0
        visible = tile.as_row(holds_key)
        distances = None
        if "distances" in refs:
            distances = pltriton.load(
                refs["distances"].at[slots],
                mask=inside,
                other=0,
            )
            distances = tile.as_row(distances)
        k = _slots(refs["k"], slots, holds_key, plan.K)
        logits = tile.logits(plan, queries, k, slope, distances)
        keys = tile.as_row(slots)
        added = normalizer.add(
            carry.statistics,
            logits.values,
            visible,
            keys,
        )
        values = _slots(refs["v"], slots, holds_key, plan.V)
        sums = attention_tile.accumulate(carry.sums, added, values, product)
        return Rows(added.row, sums)

    sink = None
    if "sinks" in refs:
        # A sink counts once, so in one part only.
        sink = jnp.where(
            part == 0,
            plan.unit * _of_rows(refs["sinks"], key_head, row),
            -jnp.inf,
        )
    zeros = jnp.zeros((R, plan.V), jnp.float32)
    start = Rows(
        statistics=normalizer.start(zero, (), sink),
        sums=[zeros] * normalizer.sums,
    )
    # The last part may be shorter than the others.
    num_blocks = -(-plan.T // block)
    first_block = part * blocks_each
    end_block = jnp.minimum((part + 1) * blocks_each, num_blocks)
    end = lax.fori_loop(first_block, end_block, add_slots, start)
    for i, x in enumerate(end.sums):
        store(refs[f"sum{i}"], row, x)
    for i, x in enumerate(end.statistics):
        pltriton.store(
            refs[f"row{i}"].at[row],
            x.reshape(R),
        )


def _of_rows(ref: Ref, key_head: Array, row: Array) -> Array:
    """A number for each row, of [Hk, R]: [R, 1]."""
    return tile.as_column(pltriton.load(ref.at[key_head, row]))


def _slots(
    ref: Ref,
    slots: Array,
    holds_key: Array,
    width: int,
) -> Array:
    """Some slots of a cache, [slots, width].

    Args:
      ref: all slots of one head, [S, D].
      slots: which.
      holds_key: which of these the cache has, and the query may see.
      width: D, or the next power of two: columns after D are zeros.

    Returns:
      Zeros for the other slots, whatever is in them: a weight of 0 times NaN would be NaN.
    """
    _, D = ref.shape
    columns = lax.iota(jnp.int32, width)
    place = ref.at[slots[:, None], columns[None, :]]
    has_data = jnp.broadcast_to(holds_key[:, None], (len(slots), width))
    if width != D:
        has_data = has_data & (columns < D)[None, :]
    return pltriton.load(place, mask=has_data, other=0)
