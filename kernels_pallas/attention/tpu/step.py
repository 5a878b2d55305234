"""`attention_step` on TPU (Pallas, Mosaic): what the kernel covers, its operands, its merged parts.

The kernel is in `step_kernel.py`, how it sees a cache in `step_cache.py`. It leaves sums, and what
the normalizer keeps of a row, for each part of a row. These are small beside the cache.
"""

from functools import partial
from typing import cast

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.inputs import StepInputs, StepOptions
from kernels_pallas.attention.kernels import (
    Shaped,
    gated_step,
    row_statistics,
    step_over_mesh,
    unsupported_arrays,
)
from kernels_pallas.attention.normalizers.base import undefined_as_nan
from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.plan import LANES
from kernels_pallas.attention.tpu.step_cache import (
    KIND_WIDTH,
    View,
    block_table,
    panels,
    viewed,
    views,
)
from kernels_pallas.attention.tpu.step_kernel import StepPlan, entry_number, kernel, result_name
from kernels_pallas.attention.tpu.tile import off_tpu, on_tpu
from kernels_pallas.attention.tpu.tuning import MAX_D
from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like, varying_like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.tpu import (
    SUBLANES,
    VMEM_LIMIT,
    Interpret,
    Operand,
    in_hbm,
    interpret_params,
    without_float16,
)

# Of a block of keys or values in VMEM. Much less, and what a grid step costs by itself shows; it
# is there twice, for keys and for values.
BLOCK_BYTES = 2 * 2**20
# Columns of a tile that are computed at a time.
COLUMNS = 1024


def unsupported(inputs: StepInputs, options: StepOptions) -> str | None:
    """Why this backend cannot take a call of `attention_step`, or None when it can."""
    refusal = unsupported_arrays(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        options.normalizer,
        MAX_D,
    )
    if refusal is None and inputs.k_cache.dtype != inputs.v_cache.dtype:
        keys = inputs.k_cache.dtype
        refusal = f"takes caches of one dtype, not {keys} and {inputs.v_cache.dtype}"
    return refusal


def attention_step(
    inputs: StepInputs,
    options: StepOptions,
    *,
    interpret: Interpret = False,
) -> Array:
    """As `api.attention_step`, with every default filled in."""

    def attend(part: StepInputs) -> Array:
        return gated_step(partial(_ungated, options, interpret), options, part)

    return step_over_mesh(attend, inputs)


def _ungated(options: StepOptions, interpret: Interpret, inputs: StepInputs) -> Array:
    """The ungated output, float32 [B, H, V]."""
    S = inputs.k_cache.shape[1]
    # A cache of less than a register's lanes is a small one to pad.
    length = max(S, LANES)
    inputs = inputs._replace(
        k_cache=padded(without_float16(inputs.k_cache), 1, length),
        v_cache=padded(without_float16(inputs.v_cache), 1, length),
        valid=padded(inputs.valid, 1, length),
        distances=None if inputs.distances is None else padded(inputs.distances, 1, length),
    )
    plan = _plan(options, interpret, inputs)
    results = _call(plan, inputs)
    # What is left is as small as the output: XLA's.
    # Parts first, as `Normalizer.merge` takes them.
    num_statistics = row_statistics(plan.normalizer)
    row = []
    for n in range(num_statistics):
        # [parts, B, tiles_across, rows, lanes]
        row.append(jnp.moveaxis(results[f"row{n}"], 1, 0))
    sums = []
    for n in range(plan.normalizer.sums):
        by_part = jnp.moveaxis(results[f"sum{n}"], 1, 0)
        sums.append(_panels_as_channels(plan, by_part))
    normalizer = off_tpu(plan.normalizer)
    merged_row, merged_sums = normalizer.merge(tile.as_columns(plan.normalizer, tuple(row)), sums)
    # [B, 1, 1, 1]; a token without a slot has zeros.
    sees = jnp.any(inputs.valid, axis=1)[:, None, None, None]
    sums = undefined_as_nan(normalizer, merged_row, merged_sums, sees)
    outputs, _ = normalizer.finish(merged_row, sums)
    return _heads(plan, inputs, outputs[0])


def _plan(options: StepOptions, interpret: Interpret, inputs: StepInputs) -> StepPlan:
    """The static arguments of a step."""
    B, S, Hk, K = inputs.k_cache.shape
    V = inputs.v_cache.shape[3]
    H = inputs.q.shape[1]
    group = H // Hk
    both = views(K, V, Hk, inputs.k_cache.dtype)
    # Of all key heads, in whole registers.
    bytes_of_slot = Hk * round_up(max(K, V), SUBLANES) * inputs.k_cache.dtype.itemsize
    columns_of_slot = panels(both.k, K, Hk) * Hk if both.interleaved else 1
    # Whole registers along lanes, for every view and every number of heads.
    at_once = max(LANES, COLUMNS // columns_of_slot // LANES * LANES)
    most = max(1, BLOCK_BYTES // bytes_of_slot // at_once)
    slots = min(most * at_once, S // LANES * LANES)
    return StepPlan(
        normalizer=on_tpu(options.normalizer),
        logits_soft_cap=options.logits_soft_cap,
        scale=options.scale,
        Hk=Hk,
        group=group if both.interleaved else round_up(group, SUBLANES),
        rows=round_up(H if both.interleaved else group, SUBLANES),
        views=both,
        panels=panels(both.k, K, Hk),
        slots=slots,
        slots_at_once=min(at_once, slots),
        lag=1,
        # Chips with two cores have work for both.
        parts=1 if B % 2 == 0 or slots >= S else 2,
        rounds=not interpret and one_bfloat16_pass(inputs.q, inputs.k_cache, inputs.v_cache),
        interpret=interpret_params(interpret, inputs.q),
    )


# --- the call


def _call(plan: StepPlan, inputs: StepInputs) -> dict[str, Array]:
    """What the programs leave, by name: [B, parts, tiles_across, ...]."""
    B, S, _, K = inputs.k_cache.shape
    V = inputs.v_cache.shape[3]
    H = inputs.q.shape[1]
    table = block_table(inputs.valid, plan.slots, plan.parts)
    ins = _inputs(plan, inputs)
    outs = _outputs(plan, inputs, V)
    names = [operand.name for operand in (*ins, *outs)]
    # In the order of `State`.
    scratch = [pltpu.VMEM(operand.block[3:], jnp.float32) for operand in outs]

    # The kernel gets the table, inputs, outputs and scratch memory, one after another.
    def body(table_ref, *refs) -> None:
        by_name = dict(zip(names, refs))
        kernel(plan, table_ref, by_name, list(refs[len(names) :]))

    def spec(operand: Operand) -> pl.BlockSpec:
        return pl.BlockSpec(operand.block, operand.index)

    # Of a part, which is the last axis of the grid.
    entries = table.size // (B * plan.parts)
    pairs = B * H * S
    # Only outputs are shapes without values.
    arrays = [in_hbm(cast(Array, operand.array), plan.interpret) for operand in ins]
    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, plan.parts, entries),
            in_specs=[spec(operand) for operand in ins],
            out_specs=[spec(operand) for operand in outs],
            scratch_shapes=scratch * plan.tiles_across,
        ),
        out_shape=[operand.array for operand in outs],
        compiler_params=pltpu.CompilerParams(
            # The blocks of a part follow one another: they share its sums.
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (K + plan.normalizer.sums * V),
            transcendentals=pairs,
            bytes_accessed=moved(operand.array for operand in (*ins, *outs)),
        ),
        interpret=plan.interpret,
        name="attention_step",
    )(varying_like(table, arrays[0]), *arrays)
    return dict(zip((operand.name for operand in outs), results))


def _inputs(plan: StepPlan, inputs: StepInputs) -> list[Operand]:
    """What a program reads. Grid indices: b row of the batch, part, i block of the part."""
    operands = [
        _by_row("q", _queries(plan, inputs.q)),
        _cache(plan, "k", inputs.k_cache, plan.views.k),
        _cache(plan, "v", inputs.v_cache, plan.views.v),
        _by_slot(plan, "valid", inputs.valid),
    ]
    for name, x in (("sinks", inputs.sink_logits), ("slopes", inputs.alibi_slopes)):
        if x is not None:
            operands.append(_by_head(plan, name, x))
    if inputs.distances is not None:
        operands.append(_by_slot(plan, "distances", inputs.distances))
    return operands


def _queries(plan: StepPlan, q: Array) -> Array:
    """[B, H, K] -> float32 [B, tiles_across, panels * rows, K / panels]."""
    B, _, K = q.shape
    # Float32 rows may be cut at any register; a 16-bit query keeps its value.
    by_tile = q.astype(jnp.float32).reshape(B, plan.tiles_across, -1, K)
    rows = padded(by_tile, 2, plan.rows)
    by_panel = rows.reshape(B, plan.tiles_across, plan.rows, plan.panels, -1)
    return jnp.swapaxes(by_panel, 2, 3).reshape(
        B,
        plan.tiles_across,
        plan.panels * plan.rows,
        K // plan.panels,
    )


def _panels_as_channels(plan: StepPlan, sums: Array) -> Array:
    """[..., panels * rows, V / panels] -> [..., rows, V], the inverse of `_queries`'s."""
    leading = sums.shape[:-2]
    by_panel = sums.reshape(*leading, plan.panels, plan.rows, -1)
    return jnp.swapaxes(by_panel, -3, -2).reshape(*leading, plan.rows, -1)


def _heads(plan: StepPlan, inputs: StepInputs, output: Array) -> Array:
    """[B, tiles_across, rows, V] -> [B, H, V], without rows of padding."""
    B, H, _ = inputs.q.shape
    # Rows by key head have padding in every tile, the others at the end.
    real = output[:, :, : H // plan.tiles_across]
    return real.reshape(B, H, -1)


def _by_row(name: str, array: Array) -> Operand:
    """Of [B, ...]: what belongs to a row of the batch."""

    def index(b: Array, part: Array, i: Array, table: Array) -> tuple:
        return b, *[0] * (array.ndim - 1)

    return Operand(name, array, (1, *array.shape[1:]), index)


def _by_head(plan: StepPlan, name: str, x: Array) -> Operand:
    """A number for each query head, [H] -> float32 [tiles_across, rows, 128]."""
    # In every lane, as statistics of rows are.
    by_tile = padded(x.astype(jnp.float32).reshape(plan.tiles_across, -1), 1, plan.rows)
    array = jnp.broadcast_to(by_tile[..., None], (*by_tile.shape, LANES))

    def index(b: Array, part: Array, i: Array, table: Array) -> tuple:
        return 0, 0, 0

    return Operand(name, array, array.shape, index)


def _block(b: Array, part: Array, i: Array, table: Array) -> Array:
    """The block of slots of a grid step."""
    return table[entry_number(b, part, i)] >> KIND_WIDTH


def _cache(plan: StepPlan, name: str, cache: Array, view: View) -> Operand:
    """Of a cache: a block of slots, of all key heads."""
    array = viewed(cache, view)
    # Slots are cut, and nothing else, so that a block is read in few long pieces.
    if view == "rows":
        block = (1, plan.slots * plan.columns_of_slot, array.shape[2])
    elif view == "heads":
        block = (1, plan.Hk, plan.slots, array.shape[3])
    else:
        block = (1, plan.Hk, array.shape[2], plan.slots)

    def index(b: Array, part: Array, i: Array, table: Array) -> tuple:
        number = _block(b, part, i, table)
        if view == "rows":
            return b, number, 0
        return (b, 0, number, 0) if view == "heads" else (b, 0, 0, number)

    return Operand(name, array, block, index)


def _by_slot(plan: StepPlan, name: str, x: Array) -> Operand:
    """A number for each slot, [B, S] -> int32 [B, 1, S]."""
    # What lies behind the last slot is not valid.
    array = padded(x.astype(jnp.int32), 1, round_up(x.shape[1], plan.slots))[:, None]

    def index(b: Array, part: Array, i: Array, table: Array) -> tuple:
        return b, 0, _block(b, part, i, table)

    return Operand(name, array, (1, 1, plan.slots), index)


def _outputs(plan: StepPlan, inputs: StepInputs, V: int) -> list[Operand]:
    """What a program leaves of its rows: statistics, then sums."""
    B = inputs.q.shape[0]
    num_statistics = row_statistics(plan.normalizer)
    operands = []
    for number in range(num_statistics + plan.normalizer.sums):
        is_statistic = number < num_statistics
        rows = plan.rows if is_statistic else plan.panels * plan.rows
        width = tile.lanes(plan.normalizer) if is_statistic else V // plan.panels
        shape = (B, plan.parts, plan.tiles_across, rows, width)
        array: Shaped = like(inputs.q, shape, jnp.float32)

        def index(b: Array, part: Array, i: Array, table: Array) -> tuple:
            return b, part, 0, 0, 0

        name = result_name(number, num_statistics)
        operands.append(Operand(name, array, (1, 1, *shape[2:]), index))
    return operands
