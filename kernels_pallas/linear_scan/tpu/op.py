"""`linear_scan` on TPU (Pallas, Mosaic), forward and backward: what the kernels cover, views, padding, derivative.

One kernel each way, each moving every input and output once (`kernel.py`); the mathematics is in `tile.py`,
block sizes in `tuning.py`. Saved for the backward pass: the inputs, and the state before each chunk.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in several passes. With
bfloat16 inputs a matmul is one pass, as by XLA's default, and rounds what is multiplied: outputs and gradients are then
2.3e-3 to 3.2e-3 off (relative RMS), where the rounding of a bfloat16 output alone is 1.7e-3. Under
`jax.default_matmul_precision("highest")` they too keep their bits; and in interpret mode, which rounds nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.mesh import varying_axes, varying_like
from kernels_pallas.common.padding import padded
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.tpu import kernel as tpu_kernel
from kernels_pallas.linear_scan.tpu.plan import Inputs, Plan
from kernels_pallas.linear_scan.tpu.tuning import MAX_CHUNK, MAX_D, MIN_CHUNK, schedules
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME

LANES = 128


def unsupported(inputs: ScanInputs, options: ScanOptions) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    q, k, v, log_decay, bonus, initial_state, _ = inputs
    normalize, chunk_size = options.normalize, options.chunk_size
    floats = (q, k, v, log_decay, bonus, initial_state)
    if any(x is not None and x.dtype == jnp.float64 for x in floats):
        return "does not compute in float64"
    if max(q.shape[-1], v.shape[-1] + normalize) > MAX_D:
        return f"takes K and V up to {MAX_D} (with normalize up to {MAX_D - 1}), not {q.shape[-1]} and {v.shape[-1]}"
    if chunk_size is not None and not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        return f"takes a chunk_size from {MIN_CHUNK} to {MAX_CHUNK}, not {chunk_size}"
    return None


def linear_scan(
    inputs: ScanInputs, options: ScanOptions, *, interpret: bool = False
) -> tuple[Array, Array | None]:
    """As `api.linear_scan`, with log_decay None, [B, T, H] or [B, T, H, K] (B may be 1). Returns (o, final state)."""
    q, k, v, log_decay, bonus, initial_state, segment_ids = inputs
    inclusive, scale, reverse, normalize, chunk_size, return_final_state = options
    (B, T, H, K), V, out_dtype = q.shape, v.shape[-1] + normalize, v.dtype
    if normalize:
        v = append_ones(v)
    # Mosaic does not convert to or from float16.
    known = lambda x: x.astype(jnp.float32) if x is not None and x.dtype == jnp.float16 else x
    q, k, v, log_decay, bonus = map(known, (q, k, v, log_decay, bonus))
    plan = _plan(q, k, v, log_decay, segment_ids, chunk_size, interpret)._replace(
        inclusive=inclusive,
        reverse=reverse,
        scale=1.0 if normalize else scale,
        out_dtype=jnp.dtype(jnp.float32)
        if normalize
        else v.dtype,  # a ratio's halves keep float32 until divided
        return_final_state=return_final_state,
        interpret=_interpret(interpret, q),
    )
    rows = max(T, _longest_step(plan))
    flat = partial(_flat, rows=rows)
    starts = None if segment_ids is None else segment_starts(segment_ids, reverse)
    x = Inputs(
        q=flat(q, plan.K),
        k=flat(k, plan.K),
        v=flat(v, plan.V),
        decay=_logs(plan, q, log_decay, rows),
        starts=None if starts is None else padded(starts, 1, rows)[:, None].astype(jnp.float32),
        bonus=None if bonus is None else padded(bonus, 1, plan.K).reshape(1, -1),
        state=None
        if initial_state is None
        else padded(padded(jnp.swapaxes(initial_state, 2, 3), 2, plan.V), 3, plan.K),
    )
    o, final_state = _scan(plan._replace(T=rows), x)
    o = o.reshape(B, rows, H, plan.V)[:, :T, :, :V]
    if final_state is not None:
        final_state = jnp.swapaxes(final_state[:, :, :V, :K], 2, 3)
    return (divide_by_last(o) if normalize else o).astype(out_dtype), final_state


def _plan(q, k, v, log_decay, segment_ids, chunk_size: int | None, interpret) -> Plan:
    """The plan as far as the inputs alone decide it."""
    (_, T, H, _), Hk, Hv = q.shape, k.shape[2], v.shape[2]
    K, V = (-(-x.shape[3] // LANES) * LANES for x in (q, v))
    decay = "none" if log_decay is None and segment_ids is None else "scalar"
    if log_decay is not None and log_decay.ndim == 4:
        decay = "vector"
    chunk = min(chunk_size or MAX_CHUNK, max(MIN_CHUNK, 1 << (T - 1).bit_length()))
    return Plan(
        T=T,
        H=H,
        Hk=Hk,
        Hv=Hv,
        K=K,
        V=V,
        decay=decay,
        chunk=chunk,
        rounds=not interpret and _rounds(q, k, v),
        inclusive=True,
        reverse=False,
        scale=1.0,
        out_dtype=v.dtype,
        return_final_state=False,
        interpret=False,
        **schedules(decay, T, H, Hk, Hv, K, V, chunk),
    )


def _rounds(*arrays: Array) -> bool:
    """Whether matmuls are one pass of bfloat16."""
    one_pass = jax.config.jax_default_matmul_precision in (
        None,
        "default",
        "fastest",
        "bfloat16",
        "BF16_BF16_F32",
    )
    return one_pass and all(x.dtype == jnp.bfloat16 for x in arrays)


def _interpret(interpret: bool, x: Array):
    """The plain interpreter is the quicker one, but knows nothing of varying axes."""
    return pltpu.InterpretParams() if interpret is True and varying_axes(x) else interpret


def _flat(x: Array, D: int, rows: int) -> Array:
    """[B, T, heads, d] -> [B, rows, heads * D]. rows is T but for the shortest T."""
    x = padded(padded(x, 1, rows), 3, D)
    return x.reshape(x.shape[0], rows, -1)


def _logs(plan: Plan, q: Array, log_decay: Array | None, rows: int) -> Array | None:
    """[B, T, H*K] for vector decays, float32 [B or 1, H, T] for scalar ones."""
    if plan.decay == "none":
        return None
    if plan.decay == "vector":
        return _flat(log_decay, plan.K, rows)
    if log_decay is None:  # segments alone
        log_decay = varying_like(jnp.zeros((1, *q.shape[1:3])), q)
    return padded(jnp.swapaxes(log_decay, 1, 2).astype(jnp.float32), 2, rows)


def _longest_step(plan: Plan) -> int:
    """Tokens in a grid step; the shorter of the two divides it."""
    return plan.chunk * max(plan.forward.chunks, plan.backward.chunks)


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, x: Inputs) -> tuple[Array, Array | None]:
    """(o [B, T, H*V], final state [B, H, V, K]). `x.decay` are logs, of every kind."""
    out = tpu_kernel.forward(plan, _kernel_inputs(plan, x), save=False)
    return out["o"], out.get("final")


def _forward(plan: Plan, x: Inputs):
    out = tpu_kernel.forward(plan, _kernel_inputs(plan, x), save=True)
    return (checkpoint_name(out["o"], OUT_NAME), out.get("final")), (
        x,
        checkpoint_name(out["states"], STATES_NAME),
    )


def _backward(plan: Plan, residuals, cotangents):
    x, states = residuals
    do, dfinal = cotangents
    out = tpu_kernel.backward(plan, _kernel_inputs(plan, x), states, do, dfinal)
    return (
        Inputs(
            q=out["dq"],
            k=_sum_of_parts(out["dk"], x.k, plan.Hk),
            v=_sum_of_parts(out["dv"], x.v, plan.Hv),
            decay=_logs_cotangent(plan, x.decay, out.get("ddecay")),
            starts=None,
            bonus=None if x.bonus is None else out["dbonus"].sum(0).astype(x.bonus.dtype),
            state=out.get("dinitial"),
        ),
    )


_scan.defvjp(_forward, _backward)


def _kernel_inputs(plan: Plan, x: Inputs) -> Inputs:
    """Scalar decays become running sums of logs in a chunk; these and starts are cut into chunks.

    They are the inputs that run along lanes, where a block may not end inside the array. Beside q they are small.
    """
    length = -(-plan.T // _longest_step(plan)) * _longest_step(plan)
    in_chunks = lambda rows: padded(rows, 2, length).reshape(*rows.shape[:2], -1, plan.chunk)
    starts = None if x.starts is None else in_chunks(x.starts)
    if plan.decay != "scalar":
        return x._replace(starts=None if starts is None else jnp.swapaxes(starts, 1, 2))
    logs = jnp.maximum(in_chunks(x.decay), tile.LOG_ZERO)
    reads = logs if plan.inclusive else jnp.zeros_like(logs)
    if starts is not None:
        logs, reads = (jnp.where(starts > 0, tile.LOG_ZERO, l) for l in (logs, reads))
    reads, ends = tile.running_sums(logs, reads, plan.reverse)
    sums = ends if plan.inclusive else jnp.concatenate([ends, reads])
    return x._replace(decay=jnp.moveaxis(sums, 0, 3), starts=None)


def _sum_of_parts(parts: Array, x: Array, num_heads: int) -> Array:
    """Shared heads: [B, T, heads * parts * D] float32 -> [B, T, heads * D] in x's dtype."""
    if parts.shape == x.shape:
        return parts
    parts = parts.reshape(*x.shape[:2], num_heads, -1, x.shape[2] // num_heads)
    return parts.sum(3).reshape(x.shape).astype(x.dtype)


def _logs_cotangent(plan: Plan, logs: Array | None, ddecay: Array | None) -> Array | None:
    if plan.decay != "scalar":
        return ddecay
    ddecay = ddecay.reshape(*ddecay.shape[:2], -1)[:, :, : plan.T]
    return ddecay.sum(0, keepdims=True) if len(logs) == 1 else ddecay
