"""`attention` under a block mask on TPU: a block of queries meets the blocks of keys that are on.

Mask blocks are too small to be tiles of the other kernels, where every tile is a step of the grid:
here a program has the keys and values of a whole head in VMEM, copied once for all query heads that
use them, and several blocks of queries. For each of these it goes through a list, made by XLA, of
the blocks of keys that are on and not hidden by position (`block_lists.py`): a chunk of them at a
time becomes one matrix. What is off is neither computed nor read; nothing depends on how the blocks
that are on lie.

Grid: (batch, heads, programs of queries). The backward kernel has (batch, key heads, query heads of
the key head, programs of queries), and sums dk and dv of the head in VMEM, block by block.

The kernels know softmax without a sink, and return its output and log-sum-exp. A gate and a sink
follow in XLA: a sink is a part of the softmax that has no value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention import reference
from kernels_pallas.attention.inputs import (
    MASK_BLOCK,
    AttentionInputs,
    AttentionOptions,
    Outputs,
)
from kernels_pallas.attention.merge import merge_attention
from kernels_pallas.attention.normalizers.base import Softmax
from kernels_pallas.attention.tpu import block_lists, tile
from kernels_pallas.attention.tpu.block_mask_kernels import backward_kernel, forward_kernel
from kernels_pallas.attention.tpu.plan import LANES, Plan, Schedule
from kernels_pallas.attention.xla import OUT_NAME, STATISTIC_NAME
from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like, varying_like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.second_order import differentiable_gradient
from kernels_pallas.common.tpu import (
    VMEM_LIMIT,
    Interpret,
    in_hbm,
    interpret_params,
    without_float16,
)

# Of VMEM, for keys, values and their gradients: the rest is for a program's queries.
KEYS_BYTES = 48 * 2**20


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
    # Float16 is converted to float32.
    all_bfloat16 = inputs.k.dtype == inputs.v.dtype == jnp.bfloat16
    itemsize = 2 if all_bfloat16 else 4
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
    q, k, v = (without_float16(x) for x in (inputs.q, inputs.k, inputs.v))
    T = q.shape[1]
    rows = min(block_lists.MAX_ROWS, round_up(T, LANES))
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
        of_sink = jnp.zeros_like(o), jnp.broadcast_to(sink, lse.shape)
        o, lse = merge_attention([(o, lse), of_sink])
    if inputs.gate_logits is not None:
        o = o * jax.nn.sigmoid(inputs.gate_logits.astype(jnp.float32))
    y = o.astype(inputs.v.dtype)
    return (y, lse) if options.return_lse else y


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


# --- calls


class _Steering(NamedTuple):
    """What kernels read from SMEM before anything else."""

    # Whether some number needs careful products, [1].
    large: Int[Array, "1"]
    # Of `block_lists.Lists`.
    counts: Int[Array, "N"]


def _has_large(*arrays: Array) -> Int[Array, "1"]:
    """Whether a product of some arrays' numbers may be NaN or infinite; for SMEM."""
    # As `tile.has_large`, but once for the call.
    limit = 2.0**tile.LARGE_EXPONENT
    large = [jnp.logical_not(jnp.all(jnp.abs(x) < limit)) for x in arrays]
    return jnp.any(jnp.stack(large)).astype(jnp.int32).reshape(1)


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
    length = block_lists.num_programs(plan) * rows
    num_keys = round_up(plan.S, MASK_BLOCK)

    lists = block_lists.lists_of(plan, mask)

    def by_query(b: Array, h: Array, t: Array, *_: Any) -> tuple:
        return b, t, h

    def by_key(b: Array, h: Array, t: Array, *_: Any) -> tuple:
        return b, 0, h // plan.group

    def by_program(b: Array, h: Array, t: Array, *_: Any) -> tuple:
        return ((b * H + h) * block_lists.num_programs(plan) + t,)

    o, lse = _call(
        plan,
        partial(forward_kernel, plan),
        _Steering(_has_large(q, k, v), lists.counts),
        grid=(B, H, block_lists.num_programs(plan)),
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
    length = block_lists.num_programs(plan) * rows
    num_keys = round_up(plan.S, MASK_BLOCK)
    # As the matrix unit will see it: dp - delta is small by cancellation.
    do = do.astype(jnp.bfloat16 if plan.rounds else jnp.float32)
    delta = jnp.sum(do.astype(jnp.float32) * o, axis=-1)
    # ds = p (dp - sum(do o) + dlse)
    delta = jnp.swapaxes(delta, 1, 2) - dlse

    lists = block_lists.lists_of(plan, mask)

    def head(hk: Array, g: Array) -> Array:
        return hk * plan.group + g

    def by_query(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return b, t, head(hk, g)

    def by_key(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return b, 0, hk

    def number_by_query(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return b, head(hk, g), 0, t

    def by_program(b: Array, hk: Array, g: Array, t: Array, *_: Any) -> tuple:
        return ((b * H + head(hk, g)) * block_lists.num_programs(plan) + t,)

    queries = pl.BlockSpec((1, rows, plan.K), by_query)
    outputs = pl.BlockSpec((1, rows, plan.V), by_query)
    keys = pl.BlockSpec((1, num_keys, plan.K), by_key)
    values = pl.BlockSpec((1, num_keys, plan.V), by_key)
    numbers = pl.BlockSpec((1, 1, 1, rows), number_by_query)
    dq, dk, dv = _call(
        plan,
        partial(backward_kernel, plan),
        _Steering(_has_large(q, k, v, do, delta), lists.counts),
        grid=(B, Hk, plan.group, block_lists.num_programs(plan)),
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
    return pl.BlockSpec((block_lists.list_words(plan),), index, memory_space=pltpu.SMEM)


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
