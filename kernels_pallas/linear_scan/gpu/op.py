"""`linear_scan` on GPU (Pallas, Triton), forward and backward: what the kernels cover, views,
padding, derivative.

Three stages forward and four backward, so that none needs more registers than a thread has:

    scores           parallel over chunks    scores in a chunk, decayed reads and writes
    scan             walks the chunks        o and the states; where B x H is small, segments of T side by side
    scan, backward   walks them back         dv and the states' cotangents
    through scores   parallel over chunks    dq, dk, the logs' cotangents

Saved for the backward pass: the inputs, and the state before each chunk. With bfloat16 inputs what
is multiplied is rounded to bfloat16, with float16 ones to TF32; with float32 inputs matmuls keep
all bits, in three passes of TF32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.gpu import (
    backward as gpu_back,
)
from kernels_pallas.linear_scan.gpu import (
    scan as gpu_scan,
)
from kernels_pallas.linear_scan.gpu import (
    scores as gpu_scores,
)
from kernels_pallas.linear_scan.gpu import (
    tuning as gpu_tuning,
)
from kernels_pallas.linear_scan.gpu.plan import Inputs, Plan
from kernels_pallas.linear_scan.gpu.scan import Walk
from kernels_pallas.linear_scan.gpu.scores import Decays
from kernels_pallas.linear_scan.gpu.tile import SUBTOTAL
from kernels_pallas.linear_scan.gpu.tuning import MAX_CHUNK, MAX_D, MIN_CHUNK
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME, _ratio, _with_ones


def unsupported(
    q, k, v, log_decay, initial_state, normalize: bool, chunk_size: int | None
) -> str | None:
    """Why this room cannot take a call, or None when it can."""
    if any(x is not None and x.dtype == jnp.float64 for x in (q, k, v, log_decay, initial_state)):
        return "does not compute in float64"
    if max(q.shape[-1], v.shape[-1] + normalize) > MAX_D:
        return f"takes K and V up to {MAX_D} (with normalize up to {MAX_D - 1}), not {q.shape[-1]} and {v.shape[-1]}"
    if chunk_size is not None and not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        return f"takes a chunk_size from {MIN_CHUNK} to {MAX_CHUNK}, not {chunk_size}"
    plan = _plan(q, k, v, log_decay, None, chunk_size, interpret=False)
    largest = q.shape[0] * plan.H * max(plan.T * max(plan.K, plan.V), plan.chunks * plan.K * plan.V)
    if largest >= 2**31:
        return (
            f"takes arrays, states before each chunk included, below 2**31 elements, not {largest}"
        )
    return None


def linear_scan(
    q,
    k,
    v,
    log_decay,
    bonus,
    initial_state,
    segment_ids,
    *,
    inclusive: bool,
    scale: float,
    reverse: bool,
    normalize: bool,
    chunk_size: int | None,
    return_final_state: bool,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """As `api.linear_scan`, with log_decay None, [B, T, H] or [B, T, H, K] (B may be 1). Returns
    (o, final state).
    """
    (_, T, _, K), V, out_dtype = q.shape, v.shape[-1] + normalize, v.dtype
    if normalize:
        v = _with_ones(v)
    plan = _plan(q, k, v, log_decay, segment_ids, chunk_size, interpret)._replace(
        inclusive=inclusive,
        reverse=reverse,
        scale=1.0 if normalize else scale,
        out_dtype=jnp.dtype(jnp.float32)
        if normalize
        else v.dtype,  # a ratio's halves keep float32 until divided
    )
    starts = None if segment_ids is None else segment_starts(segment_ids, reverse)
    logs = _logs(plan, q, log_decay, starts)
    keep_starts = starts is not None and not inclusive
    x = Inputs(
        q=padded(padded(q, 1, plan.T), 3, plan.K),
        k=padded(padded(k, 1, plan.T), 3, plan.K),
        v=padded(padded(v, 1, plan.T), 3, plan.V),
        logs=logs,
        starts=_in_order(plan, padded(starts, 1, plan.T), 1).astype(jnp.float32)
        if keep_starts
        else None,
        bonus=None if bonus is None else padded(bonus, 1, plan.K),
        state=None
        if initial_state is None
        else padded(padded(initial_state, 2, plan.K), 3, plan.V),
    )
    o, final_state = _scan(plan, return_final_state, x)
    if final_state is not None:
        final_state = final_state[:, :, :K, :V]
    o = o[:, :T, :, :V]
    return (_ratio(o) if normalize else o).astype(out_dtype), final_state


def _plan(q, k, v, log_decay, segment_ids, chunk_size: int | None, interpret: bool) -> Plan:
    """The plan as far as the inputs alone decide it."""
    (B, T, H, _), (K, V) = q.shape, (_whole_blocks(x.shape[3]) for x in (q, v))
    decay = "none" if log_decay is None and segment_ids is None else "scalar"
    if log_decay is not None and log_decay.ndim == 4:
        decay = "vector"
    schedule = gpu_tuning.schedule(decay)
    chunk = min(chunk_size or schedule.chunk, max(MIN_CHUNK, 1 << (T - 1).bit_length()))
    walks = B * H * (V // gpu_tuning.scan_block_v(schedule, K, V))
    segments = gpu_tuning.segments(schedule, walks, -(-T // chunk))
    operand, precision = _matmuls(interpret, q, k, v)
    length = chunk * segments
    return Plan(
        T=-(-T // length) * length,
        H=H,
        Hk=k.shape[2],
        Hv=v.shape[2],
        K=K,
        V=V,
        decay=decay,
        inclusive=True,
        reverse=False,
        scale=1.0,
        chunk=chunk,
        segments=segments,
        operand=operand,
        precision=precision,
        out_dtype=v.dtype,
        schedule=schedule,
        interpret=interpret,
    )


def _whole_blocks(D: int) -> int:
    """Blocks are powers of two from 16 on; more than 32 wide ones are filled to halves of 64."""
    return max(16, 1 << (D - 1).bit_length()) if D <= 32 else -(-D // 32) * 32


def _matmuls(interpret: bool, *arrays: Array) -> tuple[jnp.dtype, object]:
    """What is multiplied, and how exactly. Interpreted matmuls round nothing."""
    if interpret:
        return jnp.dtype(jnp.float32), lax.Precision.HIGHEST
    one_pass = jax.config.jax_default_matmul_precision in (
        None,
        "default",
        "fastest",
        "bfloat16",
        "BF16_BF16_F32",
    )
    if one_pass and all(x.dtype == jnp.bfloat16 for x in arrays):
        return jnp.dtype(jnp.bfloat16), None
    narrow = one_pass and all(x.dtype.itemsize == 2 for x in arrays)
    preset = lax.DotAlgorithmPreset
    return jnp.dtype(jnp.float32), preset.TF32_TF32_F32 if narrow else preset.TF32_TF32_F32_X3


def _in_order(plan: Plan, x: Array, axis: int) -> Array:
    """A small array in the order of the recurrence."""
    return jnp.flip(x, axis) if plan.reverse else x


def _logs(plan: Plan, q: Array, log_decay: Array | None, starts: Array | None) -> Array | None:
    """What the state meets, differentiable: [B, T, H, K] as in memory, or float32 [B or 1, H, T] in
    order.
    """
    if plan.decay == "none":
        return None
    if log_decay is None:  # segments alone
        log_decay = varying_like(jnp.zeros((1, *q.shape[1:3])), q)
    logs = jnp.maximum(log_decay, tile.LOG_ZERO)
    if starts is not None:
        logs = jnp.where(
            starts.reshape(*starts.shape, *[1] * (logs.ndim - 2)),
            jnp.asarray(tile.LOG_ZERO, logs.dtype),
            logs,
        )
    if plan.decay == "vector":
        return padded(padded(logs, 1, plan.T), 3, plan.K)
    return _in_order(plan, padded(jnp.swapaxes(logs.astype(jnp.float32), 1, 2), 2, plan.T), 2)


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(plan: Plan, return_final_state: bool, x: Inputs) -> tuple[Array, Array | None]:
    """(o [B, T, H, V] in plan.out_dtype, final state [B, H, K, V] float32)."""
    out, _ = _run(plan, x, return_final_state, save=False)
    return out


def _forward(plan: Plan, return_final_state: bool, x: Inputs):
    (o, final), states = _run(plan, x, return_final_state, save=True)
    return (checkpoint_name(o, OUT_NAME), final), (x, checkpoint_name(states, STATES_NAME))


def _run(plan: Plan, x: Inputs, return_final_state: bool, save: bool):
    decays = _decays(plan, x)
    walk = _walk(plan, x, decays, gpu_scores.scores(plan, x, decays))
    out = _walked(
        plan,
        walk,
        decays,
        x.state,
        plan.out_dtype,
        backward=False,
        save=save,
        final=return_final_state,
    )
    return (out["o"], out.get("final")), out.get("states")


def _walk(plan: Plan, x: Inputs, decays: Decays, scored: dict[str, Array]) -> Walk:
    reads, writes = (scored["reads"], scored["writes"]) if plan.decay == "vector" else (x.q, x.k)
    return Walk(
        reads,
        writes,
        scored["out"],
        x.v,
        decays.total,
        decays.read_factor,
        decays.write_factor,
        None,
    )


def _walked(
    plan: Plan,
    walk: Walk,
    decays: Decays,
    first: Array | None,
    dtype,
    *,
    backward: bool,
    save: bool,
    final: bool,
):
    """The scan kernel; in two passes over segments where there are several. `final` is then [B, H,
    K, V].
    """
    if plan.segments == 1:
        walk = walk._replace(initial=None if first is None else first[:, :, None])
        out = gpu_scan.scan(plan, walk, dtype, backward=backward, save=save, final=final)
        return out | ({"final": out["final"][:, :, 0]} if final else {})
    alone = walk._replace(scores=None)
    summaries = gpu_scan.scan(plan, alone, dtype, backward=backward, save=False, final=True)[
        "final"
    ]
    initial, last = gpu_scan.combined(_segment_logs(plan, decays), summaries, first, backward)
    out = gpu_scan.scan(
        plan, walk._replace(initial=initial), dtype, backward=backward, save=save, final=False
    )
    return out | ({"final": last} if final else {})


def _segment_logs(plan: Plan, decays: Decays) -> Array | None:
    """[B or 1, H, segments, K or 1]: the logs of all of a segment."""
    if decays.log_total is None:
        return None
    logs = decays.log_total
    return logs.reshape(*logs.shape[:2], plan.segments, -1, logs.shape[3]).sum(3)


def _decays(plan: Plan, x: Inputs) -> Decays:
    """What the kernels read of the logs. Beside q these arrays are small: 1/8 of the logs, or one
    number a token.
    """
    if plan.decay == "none":
        return Decays()
    if plan.decay == "vector":
        eights = (
            x.logs.astype(jnp.float32)
            .reshape(x.logs.shape[0], -1, SUBTOTAL, *x.logs.shape[2:])
            .sum(2)
        )
        log_total = eights.reshape(eights.shape[0], plan.chunks, -1, *eights.shape[2:]).sum(2)
        log_total = jnp.swapaxes(_in_order(plan, log_total, 1), 1, 2)
        return Decays(logs=x.logs, subtotals=eights, starts=x.starts, log_total=log_total)
    in_chunks = lambda rows: rows.reshape(*rows.shape[:2], plan.chunks, plan.chunk)
    logs = reads = in_chunks(x.logs)
    if not plan.inclusive:
        reads = jnp.zeros_like(logs)
        if x.starts is not None:
            reads = reads + jnp.where(in_chunks(x.starts[:, None]) > 0, tile.LOG_ZERO, 0.0)
            logs = jnp.broadcast_to(logs, reads.shape)
    reads, ends = tile.running_sums(logs, reads)
    last = ends[..., -1:]
    return Decays(
        sums=jnp.moveaxis(jnp.concatenate([reads, ends]), 0, 3),
        read_factor=jnp.exp(reads.sum(0)),
        write_factor=jnp.exp((last - ends).sum(0)),
        log_total=last.sum(0),
    )


def _backward(plan: Plan, return_final_state: bool, residuals, cotangents):
    x, states = residuals
    do, dfinal = cotangents
    decays = _decays(plan, x)
    walk = _walk(plan, x, decays, gpu_scores.scores(plan, x, decays))
    back = Walk(
        reads=walk.writes,
        writes=walk.reads,
        scores=walk.scores,
        values=do,
        total=walk.total,
        read_factor=walk.write_factor,
        write_factor=walk.read_factor,
        initial=None,
    )
    dtype = x.v.dtype if plan.Hv == plan.H else jnp.float32
    out = _walked(
        plan, back, decays, dfinal, dtype, backward=True, save=True, final=x.state is not None
    )
    through = gpu_back.through_scores(plan, x, decays, do, states, out["states"])
    return (
        Inputs(
            q=through["dq"],
            k=_sum_of_heads(through["dk"], x.k),
            v=_sum_of_heads(out["o"], x.v),
            logs=_logs_cotangent(plan, x.logs, through),
            starts=None,
            bonus=None if x.bonus is None else through["dbonus"].sum((0, 2)).astype(x.bonus.dtype),
            state=out.get("final"),
        ),
    )


_scan.defvjp(_forward, _backward)


def _sum_of_heads(parts: Array, x: Array) -> Array:
    """Shared heads: a part from each query head [B, T, H, D] float32 -> [B, T, Hx, D] in x's
    dtype.
    """
    if parts.shape == x.shape:
        return parts
    B, T, heads, D = x.shape
    return parts.reshape(B, T, heads, -1, D).sum(3).astype(x.dtype)


def _logs_cotangent(plan: Plan, logs: Array | None, through: dict[str, Array]) -> Array | None:
    """Scalar ones from what is left of each token, see `backward`: the formula is
    `tile.vector_dlogs`.
    """
    if plan.decay != "scalar":
        return through.get("dlogs")
    readers, writers, writes, total = jnp.moveaxis(
        through["rows"].sum(3), 3, 0
    )  # [B, H, N, C] each
    C, precise = plan.chunk, partial(jnp.einsum, "ij,...j->...i", precision="highest")
    later, balance = jnp.triu(jnp.ones((C, C)), 1), readers - writers
    dlogs = (
        total
        + precise(later, balance)
        + precise(later.T, writes)
        + (balance if plan.inclusive else -writers)
    )
    dlogs = dlogs.reshape(*dlogs.shape[:2], plan.T)
    return dlogs.sum(0, keepdims=True) if len(logs) == 1 else dlogs
