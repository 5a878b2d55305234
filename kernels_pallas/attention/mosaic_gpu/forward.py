"""The forward kernel of `attention` for Hopper GPUs (Pallas, Mosaic GPU).

Grid: (heads, blocks of queries, batch). A program has one block of 128 queries of one head, and
three warp groups. One of them only copies: blocks of keys and values, by the chip's copy engine
(TMA), into `stages` slots of shared memory each. The other two compute, each for 64 of the queries:
logits, weights, weighted values, with the running sums in their registers. They meet at barriers in
shared memory: a slot "is there" when its copy has come, and "is free" when both have read it.

Weights go to shared memory before they are multiplied by values. A matrix instruction can take them
from registers, and FlashAttention 3 does; but below CUDA 13.3 ptxas miscompiles that, and jax's
interpreter cannot run it. It costs a store of 64 block_k numbers a tile.

Nothing is recomputed here, and nothing is looked for twice: what NaN does is `op.py`'s.
"""

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.kernels import ForwardResult, Shaped, forward_result
from kernels_pallas.attention.mosaic_gpu import tile
from kernels_pallas.attention.mosaic_gpu.plan import (
    BLOCK_Q,
    COMPUTING,
    ROWS,
    SWIZZLE_BYTES,
    KernelInputs,
    Plan,
    Ref,
)
from kernels_pallas.attention.tile_ranges import TileRange, reach_of_queries, tile_ranges
from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like

# References by name.
Refs = dict[str, Ref]


def forward(plan: Plan, inputs: KernelInputs, save: bool) -> ForwardResult:
    """y [B, T, H, D], and with `save` the ungated output and the log-sum-exp [B, H, T] in float32.

    The log-sum-exp is in the unit of the natural logarithm.
    """
    ins = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if inputs.gate_logits is not None:
        ins["gate"] = inputs.gate_logits
    outs = _outputs(plan, inputs.q, save)
    B = inputs.q.shape[0]
    # Of queries and keys, of all heads and rows of the batch.
    pairs = B * plan.H * plan.pairs
    cost = pl.CostEstimate(
        flops=4 * pairs * plan.D,
        transcendentals=pairs,
        bytes_accessed=moved([*ins.values(), *outs.values()]),
    )
    names = [*ins, *outs]

    # Pallas passes arrays by position; the kernel wants them by name, for some are optional.
    def body(*refs: Ref, **shared: Ref) -> None:
        _kernel(plan, dict(zip(names, refs)), shared)

    computed = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        scratch_types=_shared_memory(plan),
        grid=(plan.H, plan.length // BLOCK_Q, B),
        grid_names=("head", "block", "row"),
        num_threads=COMPUTING + 1,
        thread_name="warp_group",
        kernel_name="attention_forward",
        # One instruction for 2^x, with a relative error of 2^-22.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter(plan),
        **_declared(cost),
    )(*ins.values())
    return forward_result(dict(zip(outs, computed)))


def _outputs(plan: Plan, q: Array, save: bool) -> dict[str, Shaped]:
    B = q.shape[0]
    by_token = (B, plan.length, plan.H, plan.D)
    outs: dict[str, Shaped] = {"y": like(q, by_token, plan.dtype)}
    if save:
        # In float32: rounded to 16 bits, the output would bring most of the error of dq.
        outs["o0"] = like(q, by_token, jnp.float32)
        outs["saved0"] = like(q, (B, plan.H, plan.length), jnp.float32)
    return outs


def _shared_memory(plan: Plan) -> dict[str, Any]:
    """What a program has in shared memory, by name: `plan.py` counts the bytes."""
    config = plan.config

    def tiles(*shape: int) -> Any:
        # As matrix instructions read it: tiles of 8 rows of 128 bytes, whose 16-byte pieces are
        # permuted so that a column lies in different banks.
        row_bytes = min(SWIZZLE_BYTES, shape[-1] * plan.dtype.itemsize)
        swizzled = (
            plgpu.TilingTransform((8, row_bytes // plan.dtype.itemsize)),
            plgpu.SwizzleTransform(row_bytes),
        )
        return plgpu.SMEM(shape, plan.dtype, transforms=swizzled)

    return {
        # A warp group's queries; its y when all is done.
        "queries": tiles(COMPUTING, ROWS, plan.D),
        "weights": tiles(COMPUTING, ROWS, config.block_k),
        "keys": tiles(config.stages, config.block_k, plan.D),
        "values": tiles(config.stages, config.block_k, plan.D),
        "queries_there": plgpu.Barrier(num_barriers=COMPUTING),
        "keys_there": plgpu.Barrier(num_barriers=config.stages),
        "values_there": plgpu.Barrier(num_barriers=config.stages),
        "keys_free": plgpu.Barrier(num_barriers=config.stages, num_arrivals=COMPUTING),
        "values_free": plgpu.Barrier(num_barriers=config.stages, num_arrivals=COMPUTING),
    }


def _interpreter(plan: Plan) -> Any:
    """For `plgpu.kernel`: False to compile, or a machine that finds where threads race."""
    return plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else False


def _declared(cost: pl.CostEstimate) -> dict[str, Any]:
    """As an argument of `plgpu.kernel`, which has it from jax 0.12 on."""
    known = inspect.signature(plgpu.kernel).parameters
    return {"cost_estimate": cost} if "cost_estimate" in known else {}


# --- a program


class Place(NamedTuple):
    """Which part of the arrays is a program's."""

    # Numbers of the row of the batch, of the query head and of its key head.
    row: Array
    head: Array
    key_head: Array
    # The position of the first query.
    first_query: Array
    # Blocks of keys, in order.
    ranges: list[TileRange]

    @property
    def first(self) -> Array:
        """The first block of keys."""
        return self.ranges[0].first

    @property
    def end(self) -> Array:
        """One after the last."""
        return self.ranges[-1].end


def _place(plan: Plan) -> Place:
    head = lax.axis_index("head")
    # Where attention is causal, the last queries see most keys. They start first, so that no long
    # program is left over when the others have ended.
    n = plan.length // BLOCK_Q - 1 - lax.axis_index("block")
    return Place(
        row=lax.axis_index("row"),
        head=head,
        # Consecutive query heads share a key head.
        key_head=lax.div(head, jnp.int32(plan.group)),
        first_query=n * BLOCK_Q,
        ranges=tile_ranges(
            plan,
            reach_of_queries(plan),
            n,
            BLOCK_Q,
            plan.config.block_k,
            None,
        ),
    )


def _kernel(plan: Plan, refs: Refs, shared: Refs) -> None:
    """One program: a block of queries of one head."""
    place = _place(plan)
    warp_group = lax.axis_index("warp_group")
    pl.when(warp_group < COMPUTING)(partial(_compute, plan, refs, shared, place, warp_group))
    pl.when(warp_group == COMPUTING)(partial(_copy, plan, refs, shared, place))


def _slot(plan: Plan, place: Place, block: Array) -> Array:
    """Where a block of keys, and that of their values, lies in shared memory."""
    return lax.rem(block - place.first, jnp.int32(plan.config.stages))


# --- the warp group that copies


def _copy(
    plan: Plan,
    refs: Refs,
    shared: Refs,
    place: Place,
) -> None:
    """Copies every block of keys and values that the program's queries see, in order."""
    plgpu.set_max_registers(plan.config.copying_registers, action="decrease")
    stages = plan.config.stages

    def wait_until_free(block: Array) -> None:
        slot = _slot(plan, place, block)
        plgpu.barrier_wait(shared["keys_free"].at[slot])
        plgpu.barrier_wait(shared["values_free"].at[slot])

    def copy_block(block: Array, carry: None) -> None:
        # The first blocks find every slot empty.
        used_before = block - place.first >= stages
        pl.when(used_before)(partial(wait_until_free, block))
        slot = _slot(plan, place, block)
        tokens = pl.ds(block * plan.config.block_k, plan.config.block_k)
        plgpu.copy_gmem_to_smem(
            refs["k"].at[place.row, tokens, place.key_head],
            shared["keys"].at[slot],
            shared["keys_there"].at[slot],
        )
        plgpu.copy_gmem_to_smem(
            refs["v"].at[place.row, tokens, place.key_head],
            shared["values"].at[slot],
            shared["values_there"].at[slot],
        )
        return carry

    def leave_free(block: Array, carry: None) -> None:
        wait_until_free(block)
        return carry

    lax.fori_loop(place.first, place.end, copy_block, None)
    # So that no barrier goes away while a warp group has yet to arrive at it.
    last = jnp.maximum(place.first, place.end - stages)
    lax.fori_loop(last, place.end, leave_free, None)


# --- the warp groups that compute


def _compute(
    plan: Plan,
    refs: Refs,
    shared: Refs,
    place: Place,
    warp_group: Array,
) -> None:
    """The rows of one warp group: 64 queries against every block of keys."""
    plgpu.set_max_registers(plan.config.computing_registers, action="increase")
    queries = shared["queries"].at[warp_group]
    first_query = place.first_query + warp_group * ROWS
    tokens = pl.ds(first_query, ROWS)
    plgpu.copy_gmem_to_smem(
        refs["q"].at[place.row, tokens, place.head],
        queries,
        shared["queries_there"].at[warp_group],
    )
    plgpu.barrier_wait(shared["queries_there"].at[warp_group])

    def add_tile(by_position: bool, block: Array, rows: tile.Rows) -> tile.Rows:
        slot = _slot(plan, place, block)
        plgpu.barrier_wait(shared["keys_there"].at[slot])
        # [block_k, D] -> [D, block_k], as the matrix instruction reads it anyway.
        keys = shared["keys"].at[slot].transpose((1, 0))
        products = _product(queries, keys)
        plgpu.barrier_arrive(shared["keys_free"].at[slot])
        mask = None
        if by_position:
            mask = tile.visible(plan, first_query, block * plan.config.block_k)
        weighted = tile.weigh(
            rows.largest,
            rows.total,
            tile.logits(plan, products),
            mask,
        )
        weights = shared["weights"].at[warp_group]
        weights[...] = weighted.weights.astype(plan.dtype)
        # Before the matrix unit reads what threads have written.
        plgpu.commit_smem()
        plgpu.barrier_wait(shared["values_there"].at[slot])
        added = _product(weights, shared["values"].at[slot])
        plgpu.barrier_arrive(shared["values_free"].at[slot])
        return tile.Rows(
            largest=weighted.largest,
            total=weighted.total,
            sum=rows.sum * tile.by_row(weighted.keep, plan.D) + added,
        )

    rows = tile.start(plan)
    for first, end, by_position in place.ranges:
        # A loop for each range: whether tiles are masked is known while the kernel is compiled.
        rows = lax.fori_loop(first, end, partial(add_tile, by_position), rows)
    _write(plan, refs, queries, place, tokens, rows)


def _product(a: Ref, b: Ref) -> Array:
    """a b, of two arrays in shared memory, in float32."""

    def multiply(accumulator: Ref) -> Array:
        plgpu.wgmma(accumulator, a, b)
        # Reading it waits for the instructions.
        return accumulator[...]

    shape = (a.shape[0], b.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _write(
    plan: Plan,
    refs: Refs,
    staging: Ref,
    place: Place,
    tokens: Any,
    rows: tile.Rows,
) -> None:
    """Ends the rows of a warp group and writes them.

    Args:
      plan: the static arguments.
      refs: the arrays by name. Only what `_outputs` asked for is there to be written.
      staging: shared memory for y.
      place: the program's.
      tokens: the positions of the rows.
      rows: after the last tile.
    """
    # A row whose every logit is -inf has no weights: 0 times 1 / 0 is NaN, as it should be.
    output = rows.sum * tile.by_row(1 / rows.total, plan.D)
    if "o0" in refs:
        refs["o0"][place.row, tokens, place.head] = output
    if plan.gate == "element":
        gate_logits = plgpu.load(
            refs["gate"].at[place.row, tokens, place.head],
            layout=tile.TILE,
            optimized=False,
        )
        output = output * tile.gate(gate_logits)
    elif plan.gate == "head":
        # A number a query.
        gate_logits = plgpu.load(
            refs["gate"].at[place.row, place.head, tokens],
            layout=tile.ROW,
            optimized=False,
        )
        output = output * tile.by_row(tile.gate(gate_logits), plan.D)
    staging[...] = output.astype(plan.dtype)
    if "saved0" in refs:
        refs["saved0"][place.row, place.head, tokens] = tile.log_sum_exp(rows)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, refs["y"].at[place.row, tokens, place.head])
    plgpu.wait_smem_to_gmem(0)
