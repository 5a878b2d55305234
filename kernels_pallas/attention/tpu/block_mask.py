"""`attention` under a block mask on TPU: a block of queries meets the blocks of keys that are on.

Mask blocks are too small to be tiles of the other kernels, where every tile is a step of the grid:
here a program has the keys and values of a whole head in VMEM, copied once for all query heads that
use them, and several blocks of queries. For each of these it goes through a list, made by XLA, of
the blocks of keys that are on and not hidden by position: `CHUNK` of them at a time become one
matrix. What is off is neither computed nor read; nothing depends on how the blocks that are on lie.

Grid: (batch, heads, programs of queries). The backward kernel has (batch, key heads, query heads of
the key head, programs of queries), and sums dk and dv of the head in VMEM, block by block.

The kernels know softmax without a sink, and return its output and log-sum-exp. A gate and a sink
follow in XLA: a sink is a part of the softmax that has no value (`merge.py` joins such parts).
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention import reference
from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.inputs import (
    MASK_BLOCK,
    AttentionInputs,
    AttentionOptions,
    Outputs,
)
from kernels_pallas.attention.normalizers.base import Softmax
from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.plan import LANES, Plan, Schedule
from kernels_pallas.attention.xla import OUT_NAME, STATISTIC_NAME
from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like, varying_like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.second_order import differentiable_gradient
from kernels_pallas.common.tpu import VMEM_LIMIT, Interpret, Ref, in_hbm, interpret_params

# Blocks of keys that are one matrix. More hide the latency of a product, fewer waste less where a
# list ends.
CHUNK = 8
# Blocks of queries that are computed side by side: while the weights of one are computed, the
# matrix unit has the logits of the others.
GROUP = 4
# Queries of a program at most.
MAX_ROWS = 512
# Of VMEM, for keys, values and their gradients: the rest is for a program's queries.
KEYS_BYTES = 48 * 2**20
# Words of SMEM that a list is rounded up to.
LIST_WORDS = 1024


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why these kernels cannot take a call with a block mask, or None when they can."""
    if type(options.normalizer) is not Softmax:
        return f"takes a block_mask with softmax, not {type(options.normalizer).__name__}"
    if inputs.segment_ids is not None:
        return "takes no segment_ids with a block_mask"
    if inputs.alibi_slopes is not None:
        return "takes no alibi_slopes with a block_mask"
    K = round_up(inputs.q.shape[-1], LANES)
    V = round_up(inputs.v.shape[-1], LANES)
    itemsize = max(2, min(4, inputs.k.dtype.itemsize))
    # Blocks of a grid are in VMEM twice: k and v, and dk and dv in float32.
    most = KEYS_BYTES // (2 * (K + V) * (itemsize + 4))
    S = inputs.k.shape[1]
    if most < S:
        return f"takes a block_mask over up to {most} keys of {K} and {V} channels, not {S}"
    return None


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    interpret: Interpret,
) -> Outputs:
    """As `tpu/op.py`'s, of the rows and heads of one device, with a block mask."""
    q, k, v = (_without_float16(x) for x in (inputs.q, inputs.k, inputs.v))
    T = q.shape[1]
    rows = min(MAX_ROWS, round_up(T, LANES))
    schedule = Schedule(block=rows, rows=MASK_BLOCK)
    plan = Plan(
        normalizer=tile.on_tpu(options.normalizer),
        causal=options.causal,
        window=options.window,
        logits_soft_cap=options.logits_soft_cap,
        scale=options.scale,
        T=T,
        H=q.shape[2],
        Hk=k.shape[2],
        K=round_up(q.shape[3], LANES),
        V=round_up(v.shape[3], LANES),
        gate="none",
        segments=False,
        slopes=False,
        rounds=not interpret and one_bfloat16_pass(q, k, v),
        out_dtype=jnp.dtype(jnp.float32),
        forward=schedule,
        backward=schedule,
        interpret=interpret_params(interpret, q),
        num_keys=k.shape[1],
    )
    assert inputs.block_mask is not None
    o, lse = _softmax(plan, q, k, v, inputs.block_mask)
    if inputs.sink_logits is not None:
        # A key without a value, whose logit all rows of a head see.
        sink = inputs.sink_logits.astype(jnp.float32)[:, None]
        with_sink = jnp.logaddexp(lse, sink)
        o = o * _by_token(jnp.exp(lse - with_sink))
        lse = with_sink
    if inputs.gate_logits is not None:
        o = o * jax.nn.sigmoid(inputs.gate_logits.astype(jnp.float32))
    y = o.astype(inputs.v.dtype)
    return (y, lse) if options.return_lse else y


def _without_float16(x: Array) -> Array:
    """Float16 as float32: Mosaic does not convert to or from float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _by_token(x: Float[Array, "B H T"]) -> Float[Array, "B T H 1"]:
    return jnp.swapaxes(x, 1, 2)[..., None]


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(
    plan: Plan,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    mask: Bool[Array, "B H _ _"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """The output of softmax, float32, and the log-sum-exp of its rows."""
    return _forward(plan, q, k, v, mask)


def _softmax_forward(plan: Plan, *arrays: Array) -> tuple[tuple[Array, Array], tuple]:
    o, lse = _softmax(plan, *arrays)
    # A checkpoint policy that saves these names runs no kernel again.
    o = checkpoint_name(o, OUT_NAME)
    lse = checkpoint_name(lse, STATISTIC_NAME)
    return (o, lse), (arrays, o, lse)


def _softmax_backward(plan: Plan, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    return differentiable_gradient(
        partial(_backward, plan),
        partial(_plain, plan),
        residuals,
        residuals[0],
        cotangents,
    )


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _plain(plan: Plan, arrays: tuple) -> Outputs:
    """`_softmax` for second derivatives."""
    q, k, v, mask = arrays
    y, lse = reference.attention_by_blocks(
        AttentionInputs(q, k, v.astype(jnp.float32), block_mask=mask),
        AttentionOptions(
            normalizer=Softmax(),
            causal=plan.causal,
            window=plan.window,
            logits_soft_cap=plan.logits_soft_cap,
            scale=plan.scale,
            return_lse=True,
        ),
    )
    return y, lse


# --- lists of what is on


def _programs(plan: Plan) -> int:
    """Programs of queries."""
    return -(-plan.T // plan.forward.block)


def _list_stride(plan: Plan) -> int:
    """Words of a block of queries: one for every block of keys, in whole chunks."""
    return round_up(-(-plan.S // MASK_BLOCK), CHUNK)


def _list_words(plan: Plan) -> int:
    """Words of a program."""
    blocks = plan.forward.block // MASK_BLOCK
    return round_up(blocks * _list_stride(plan), LIST_WORDS)


class _Lists(NamedTuple):
    """For every block of queries: how many blocks of keys are on, and which these are.

    Of all programs, one after another: of row b, head h, then of the queries.
    """

    counts: Int[Array, "N"]
    blocks: Int[Array, "M"]


def _lists(plan: Plan, mask: Bool[Array, "B H Tb Sb"]) -> _Lists:
    B, H, Tb, Sb = mask.shape
    first_query = np.arange(Tb)[:, None] * MASK_BLOCK
    first_key = np.arange(Sb)[None, :] * MASK_BLOCK
    # The least and the largest distance query - key in a pair of blocks.
    nearest = first_query - (first_key + MASK_BLOCK - 1)
    farthest = first_query + MASK_BLOCK - 1 - first_key
    visible = np.full((Tb, Sb), True)
    if plan.causal:
        visible &= farthest >= 0
    if plan.window is not None:
        visible &= (nearest < plan.window) & (farthest > -plan.window)
    on = mask & visible
    # Blocks of queries that are padding have nothing on.
    num_blocks = _programs(plan) * plan.forward.block // MASK_BLOCK
    counts = padded(jnp.sum(on, axis=-1, dtype=jnp.int32), 2, num_blocks)
    # What is on comes first, in order. What follows is not used.
    order = jnp.argsort(jnp.logical_not(on), axis=-1, stable=True).astype(jnp.int32)
    order = padded(padded(order, 3, _list_stride(plan)), 2, num_blocks)
    of_programs = order.reshape(B * H * _programs(plan), -1)
    blocks = padded(of_programs, 1, _list_words(plan))
    return _Lists(counts.reshape(-1), blocks.reshape(-1))


class _Steering(NamedTuple):
    """What kernels read from SMEM before anything else."""

    # Whether some number needs careful products, [1].
    large: Int[Array, "1"]
    # Of `_Lists`.
    counts: Int[Array, "N"]


def _has_large(*arrays: Array) -> Int[Array, "1"]:
    """Whether a product of some arrays' numbers may be NaN or infinite; for SMEM."""
    # As `tile.has_large`, but once for the call.
    limit = 2.0**tile.LARGE_EXPONENT
    large = [jnp.logical_not(jnp.all(jnp.abs(x) < limit)) for x in arrays]
    return jnp.any(jnp.stack(large)).astype(jnp.int32).reshape(1)


# --- calls


def _heads_as_columns(x: Array, length: int, width: int) -> Array:
    """[B, T, heads, D] -> [B, length, heads * width], padded with zeros."""
    x = padded(padded(x, 3, width), 1, length)
    return x.reshape(*x.shape[:2], -1)


def _forward(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
) -> tuple[Array, Array]:
    """(o [B, T, H, V], lse [B, H, T])."""
    B, T, H, _ = q.shape
    rows = plan.forward.block
    length = _programs(plan) * rows
    num_keys = round_up(plan.S, MASK_BLOCK)

    lists = _lists(plan, mask)

    def by_query(b: Array, h: Array, t: Array, *_: Any) -> tuple:
        return b, t, h

    def by_key(b: Array, h: Array, t: Array, *_: Any) -> tuple:
        return b, 0, h // plan.group

    def by_program(b: Array, h: Array, t: Array, *_: Any) -> tuple:
        return ((b * H + h) * _programs(plan) + t,)

    o, lse = _call(
        plan,
        partial(_forward_kernel, plan),
        _Steering(_has_large(q, k, v), lists.counts),
        grid=(B, H, _programs(plan)),
        ins=[
            (lists.blocks, _list_spec(plan, by_program)),
            (_heads_as_columns(q, length, plan.K), pl.BlockSpec((1, rows, plan.K), by_query)),
            (_heads_as_columns(k, num_keys, plan.K), pl.BlockSpec((1, num_keys, plan.K), by_key)),
            (_heads_as_columns(v, num_keys, plan.V), pl.BlockSpec((1, num_keys, plan.V), by_key)),
        ],
        outs=[
            (
                like(q, (B, length, H * plan.V), jnp.float32),
                pl.BlockSpec((1, rows, plan.V), by_query),
            ),
            (
                like(q, (B, H, 1, length), jnp.float32),
                pl.BlockSpec((1, 1, 1, rows), lambda b, h, t, *_: (b, h, 0, t)),
            ),
        ],
        scratch=[pltpu.VMEM((rows, LANES), jnp.float32)],
        name="attention_block_mask_forward",
        flops=2 * B * H * plan.pairs * (plan.K + plan.V),
        parallel=2,
    )
    o = o.reshape(B, length, H, plan.V)
    return o[:, :T, :, : v.shape[3]], lse[:, :, 0, :T]


def _backward(
    plan: Plan,
    residuals: tuple,
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array, None]:
    """The gradients of q, k and v; the mask has none."""
    (q, k, v, mask), o, lse = residuals
    do, dlse = cotangents
    B, _, H, _ = q.shape
    Hk = k.shape[2]
    rows = plan.backward.block
    length = _programs(plan) * rows
    num_keys = round_up(plan.S, MASK_BLOCK)
    # As the matrix unit will see it: dp - delta is small by cancellation.
    do = do.astype(jnp.bfloat16 if plan.rounds else jnp.float32)
    delta = jnp.sum(do.astype(jnp.float32) * o, axis=-1)
    # ds = p (dp - sum(do o) + dlse)
    delta = jnp.swapaxes(delta, 1, 2) - dlse

    lists = _lists(plan, mask)

    def head(hk: Array, g: Array) -> Array:
        return hk * plan.group + g

    def by_query(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return b, t, head(hk, g)

    def by_key(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return b, 0, hk

    def number_by_query(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return b, head(hk, g), 0, t

    def by_program(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return ((b * H + head(hk, g)) * _programs(plan) + t,)

    queries = pl.BlockSpec((1, rows, plan.K), by_query)
    outputs = pl.BlockSpec((1, rows, plan.V), by_query)
    keys = pl.BlockSpec((1, num_keys, plan.K), by_key)
    values = pl.BlockSpec((1, num_keys, plan.V), by_key)
    numbers = pl.BlockSpec((1, 1, 1, rows), number_by_query)
    dq, dk, dv = _call(
        plan,
        partial(_backward_kernel, plan),
        _Steering(_has_large(q, k, v, do, delta), lists.counts),
        grid=(B, Hk, plan.group, _programs(plan)),
        ins=[
            (lists.blocks, _list_spec(plan, by_program)),
            (_heads_as_columns(q, length, plan.K), queries),
            (_heads_as_columns(k, num_keys, plan.K), keys),
            (_heads_as_columns(v, num_keys, plan.V), values),
            (_heads_as_columns(do, length, plan.V), outputs),
            (padded(lse, 2, length)[:, :, None], numbers),
            (padded(delta, 2, length)[:, :, None], numbers),
        ],
        outs=[
            (like(q, (B, length, H * plan.K), q.dtype), queries),
            (like(q, (B, num_keys, Hk * plan.K), jnp.float32), keys),
            (like(q, (B, num_keys, Hk * plan.V), jnp.float32), values),
        ],
        scratch=[pltpu.VMEM((rows, 1), jnp.float32)] * 2,
        name="attention_block_mask_backward",
        flops=2 * B * H * plan.pairs * (3 * plan.K + 2 * plan.V),
        parallel=2,
    )

    def heads(x: Array, like_input: Array) -> Array:
        _, tokens, num_heads, width = like_input.shape
        x = x.reshape(B, x.shape[1], num_heads, -1)
        return x[:, :tokens, :, :width].astype(like_input.dtype)

    return heads(dq, q), heads(dk, k), heads(dv, v), None


def _list_spec(plan: Plan, index: Callable) -> pl.BlockSpec:
    return pl.BlockSpec((_list_words(plan),), index, memory_space=pltpu.SMEM)


def _call(
    plan: Plan,
    kernel: Callable,
    steering: _Steering,
    *,
    grid: tuple[int, ...],
    ins: list[tuple[Array, pl.BlockSpec]],
    outs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: list[Any],
    name: str,
    flops: int,
    parallel: int,
) -> list[Array]:
    """Runs a kernel over a grid; what is off is counted as if it were on.

    Args:
      plan: the static arguments.
      kernel: called with what steers it, inputs, outputs and scratch memory.
      steering: for SMEM, whole.
      grid: its size along every axis.
      ins: arrays and their blocks, the lists first.
      outs: shapes and their blocks.
      scratch: memory of a program.
      name: of the kernel, in profiles.
      flops: of matrix products.
      parallel: how many leading axes of the grid may be split over cores.

    Returns:
      The outputs.
    """
    arrays = [array for array, _ in ins]
    shapes = [shape for shape, _ in outs]
    q = arrays[1]
    sequential = len(grid) - parallel
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steering),
            grid=grid,
            in_specs=[spec for _, spec in ins],
            out_specs=[spec for _, spec in outs],
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=q.shape[0] * plan.H * plan.pairs,
            bytes_accessed=moved([*arrays, *shapes]),
        ),
        interpret=plan.interpret,
        name=name,
    )(
        # Inside `shard_map` every argument must vary over the same mesh axes.
        *[varying_like(x, q) for x in steering],
        varying_like(arrays[0], q),
        *[in_hbm(array, plan.interpret) for array in arrays[1:]],
    )


# --- kernels


class _Queries(NamedTuple):
    """A block of queries of a program."""

    # Its first row in the program's.
    first: Array
    # How many blocks of keys are on.
    count: Array
    # Where their list begins in the program's.
    entry: Array

    @property
    def rows(self) -> Any:
        return pl.ds(self.first, MASK_BLOCK)


def _by_group(
    plan: Plan,
    program: Array,
    counts: Ref,
    body: Callable[[list[_Queries]], None],
) -> None:
    """body(group) for every group of blocks of queries of a program."""
    blocks = plan.forward.block // MASK_BLOCK
    size = math.gcd(blocks, GROUP)

    def step(i: Array, _: None) -> None:
        group = []
        for n in range(size):
            block = i * size + n
            first = pl.multiple_of(block * MASK_BLOCK, MASK_BLOCK)
            count = counts[program * blocks + block]
            group.append(_Queries(first, count, block * _list_stride(plan)))
        body(group)

    lax.fori_loop(0, blocks // size, step, None)


def _num_chunks(group: list[_Queries]) -> Array:
    """Of the longest list of a group."""
    count = functools.reduce(jnp.maximum, [queries.count for queries in group])
    return lax.div(count + (CHUNK - 1), jnp.int32(CHUNK))


def _key_blocks(lists: Ref, queries: _Queries, chunk: Array) -> list[Any]:
    """The rows of k and v of every block of keys of a chunk; past the end of the list, of any."""
    blocks = []
    for n in range(CHUNK):
        entry = queries.entry + chunk * CHUNK + n
        first = pl.multiple_of(lists[entry] * MASK_BLOCK, MASK_BLOCK)
        blocks.append(pl.ds(first, MASK_BLOCK))
    return blocks


def _gathered(ref: Ref, blocks: list[Any]) -> Array:
    """The blocks of k or v as one matrix, [CHUNK * MASK_BLOCK, D]."""
    return jnp.concatenate([ref[0, block] for block in blocks], axis=0)


def _mask(
    plan: Plan,
    first_query: Array,
    blocks: list[Any],
    left: Array,
) -> Bool[Array, "R C"]:
    """Which keys of a chunk the queries of a block may see.

    Args:
      plan: the static arguments.
      first_query: the position of the first query.
      blocks: the rows of the chunk's keys, by block.
      left: how many of the blocks are on: those after are past the end of the list.

    Returns:
      The mask.
    """
    columns = lax.broadcasted_iota(jnp.int32, (1, CHUNK * MASK_BLOCK), 1)
    # The position of every column's key.
    keys = columns + blocks[0].start
    for n in range(1, CHUNK):
        of_block = columns + (blocks[n].start - n * MASK_BLOCK)
        keys = jnp.where(columns >= n * MASK_BLOCK, of_block, keys)
    queries = first_query + lax.broadcasted_iota(jnp.int32, (MASK_BLOCK, 1), 0)
    shape = (MASK_BLOCK, CHUNK * MASK_BLOCK)
    mask = jnp.broadcast_to(columns < left * MASK_BLOCK, shape)
    by_position = attention_tile.visible_pairs(
        queries,
        keys,
        length=plan.S if plan.S % MASK_BLOCK else None,
        causal=plan.causal,
        window=plan.window,
    )
    if by_position is not None:
        mask = mask & by_position
    if plan.T % MASK_BLOCK:
        # Queries of padding must see nothing: their 0 times an infinite key is NaN.
        mask = mask & jnp.broadcast_to(queries < plan.T, shape)
    return mask


def _fast_and_careful(large: Ref, run: Callable[[bool], None]) -> None:
    """run(careful), with products that select only where some number asks for it."""
    lax.cond(large[0] != 0, partial(run, True), partial(run, False))


def _forward_kernel(
    plan: Plan,
    large: Ref,
    counts: Ref,
    lists: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    o: Ref,
    lse: Ref,
    lse_columns: Ref,
) -> None:
    """A program: some blocks of queries of one head."""
    normalizer = plan.normalizer
    t = pl.program_id(2)
    program = (pl.program_id(0) * plan.H + pl.program_id(1)) * _programs(plan) + t
    first_of_program = t * plan.forward.block

    def attend(careful: bool, group: list[_Queries]) -> None:
        def logits(c: Array, queries: _Queries) -> tuple[Array, list[Any]]:
            blocks = _key_blocks(lists, queries, c)
            s = tile.matmul(plan, q[0, queries.rows], _gathered(k, blocks), tile.NT)
            return attention_tile.soft_capped(s * plan.scale, plan.logits_soft_cap), blocks

        def add_values(
            c: Array,
            queries: _Queries,
            carry: tuple,
            s: Array,
            blocks: list[Any],
        ) -> tuple:
            row, weighted_sum, sees = carry
            left = queries.count - c * CHUNK
            mask = _mask(plan, first_of_program + queries.first, blocks, left)
            # Softmax does not ask which key is which.
            added = normalizer.add(row, s, mask, s[:1])
            product = tile.selecting_product(
                plan,
                added.weights[0],
                mask if careful else None,
                _gathered(v, blocks),
            )
            assert added.keep is not None
            weighted_sum = tile.across(added.keep, plan.V) * weighted_sum + product
            if careful:
                seen = jnp.max(mask.astype(jnp.float32), axis=-1, keepdims=True)
                sees = jnp.maximum(sees, seen)
            return added.row, weighted_sum, sees

        def chunk(c: Array, carries: list[tuple]) -> list[tuple]:
            # All products before the first exponential: in this order they overlap.
            of_group = [logits(c, queries) for queries in group]
            return [
                add_values(c, queries, carry, *of_queries)
                for queries, carry, of_queries in zip(group, carries, of_group)
            ]

        zero = jnp.zeros((MASK_BLOCK, LANES), jnp.float32)
        no_sum = jnp.zeros((MASK_BLOCK, plan.V), jnp.float32)
        start = (normalizer.start(zero), no_sum, zero[:, :1])
        ends = lax.fori_loop(0, _num_chunks(group), chunk, [start] * len(group))
        for queries, (row, weighted_sum, sees) in zip(group, ends):
            (output,), (statistic,) = normalizer.finish(row, [weighted_sum])
            if careful:
                # Of logits of -inf alone: 0 / 0.
                undefined = (row[0][:, :1] == -jnp.inf) & (sees > 0)
                output = jnp.where(undefined, jnp.nan, output)
                statistic = jnp.where(undefined, jnp.nan, statistic)
            o[0, queries.rows] = output
            lse_columns[queries.rows] = jnp.broadcast_to(statistic, (MASK_BLOCK, LANES))

    def run(careful: bool) -> None:
        _by_group(plan, program, counts, partial(attend, careful))

    _fast_and_careful(large, run)
    # A column in HBM would fill 128 lanes for each number.
    lse[0, 0] = tile.as_row(lse_columns[:, :1])


def _backward_kernel(
    plan: Plan,
    large: Ref,
    counts: Ref,
    lists: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    do: Ref,
    lse: Ref,
    delta: Ref,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    lse_columns: Ref,
    delta_columns: Ref,
) -> None:
    """A program: some blocks of queries of one head. dk and dv stay in VMEM for the key head."""
    t = pl.program_id(3)
    head = pl.program_id(1) * plan.group + pl.program_id(2)
    program = (pl.program_id(0) * plan.H + head) * _programs(plan) + t
    first_of_program = t * plan.backward.block

    @pl.when((pl.program_id(2) == 0) & (t == 0))
    def start_keys() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    lse_columns[...] = tile.as_column(lse[0, 0])
    delta_columns[...] = tile.as_column(delta[0, 0])

    def add_gradients(careful: bool, group: list[_Queries]) -> None:
        def logits_and_dp(c: Array, queries: _Queries) -> tuple[Array, Array, list[Any]]:
            blocks = _key_blocks(lists, queries, c)
            s = tile.matmul(plan, q[0, queries.rows], _gathered(k, blocks), tile.NT)
            capped = attention_tile.soft_capped(s * plan.scale, plan.logits_soft_cap)
            dp = tile.matmul(plan, do[0, queries.rows], _gathered(v, blocks), tile.NT)
            return capped, dp, blocks

        def add_products(
            c: Array,
            queries: _Queries,
            dq_rows: Array,
            capped: Array,
            dp: Array,
            blocks: list[Any],
        ) -> Array:
            rows = queries.rows
            left = queries.count - c * CHUNK
            mask = _mask(plan, first_of_program + queries.first, blocks, left)
            weights, ds = plan.normalizer.gradient(
                capped,
                mask,
                capped[:1],
                dp,
                [delta_columns[rows]],
                (lse_columns[rows],),
            )
            # 0 times a dp that overflowed, or of a row whose statistics are NaN.
            ds = attention_tile.through_soft_cap(ds, capped, plan.logits_soft_cap)
            weights = attention_tile.selected(weights, mask)
            ds = attention_tile.selected(ds, mask)
            product = partial(tile.selecting_product, plan)
            seen = mask if careful else None
            dv_chunk = product(weights, seen, do[0, rows], tile.TN)
            # The products lack the factor scale: here, and at the end for dq.
            dk_chunk = product(ds, seen, q[0, rows], tile.TN) * plan.scale
            for n, block in enumerate(blocks):
                of_block = slice(n * MASK_BLOCK, (n + 1) * MASK_BLOCK)
                dk[0, block] += dk_chunk[of_block]
                dv[0, block] += dv_chunk[of_block]
            return dq_rows + product(ds, seen, _gathered(k, blocks))

        def chunk(c: Array, sums: list[Array]) -> list[Array]:
            of_group = [logits_and_dp(c, queries) for queries in group]
            return [
                add_products(c, queries, dq_rows, *of_queries)
                for queries, dq_rows, of_queries in zip(group, sums, of_group)
            ]

        no_sum = jnp.zeros((MASK_BLOCK, plan.K), jnp.float32)
        ends = lax.fori_loop(0, _num_chunks(group), chunk, [no_sum] * len(group))
        for queries, dq_rows in zip(group, ends):
            dq[0, queries.rows] = (dq_rows * plan.scale).astype(dq.dtype)

    def run(careful: bool) -> None:
        _by_group(plan, program, counts, partial(add_gradients, careful))

    _fast_and_careful(large, run)
