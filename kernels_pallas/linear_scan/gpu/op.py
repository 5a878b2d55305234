"""`linear_scan` on GPU (Pallas, Triton): coverage, padding, and the derivative around the kernels.

Two kernels forward and three backward, so that none needs more registers than a thread has:

    products           parallel over chunks    products in a chunk, decayed reads and writes
    scan               through the chunks      o and the states
    products again, then the scan backward     dv and the states' cotangents
    through products   parallel over chunks    dq, dk, the logs' cotangents

Where B x H is small, segments of T are scanned side by side, in two passes: each segment alone from
an empty state, then all of them from the states that follow from that.

Saved for the backward pass: the inputs, and the state before each chunk. With bfloat16 inputs what
is multiplied is rounded to bfloat16, with float16 ones to TF32; with float32 inputs matmuls keep
all bits, in three passes of TF32. Exponentials are then those of CUDA's library, and else a single
instruction of the chip.

The kernels multiply whole chunks, in which NaN and Inf of a token would reach tokens that do not
see it. They count what is not finite at the end: in the state, which keeps what went through it,
and in the gradients. Where there is any, `careful` computes the call again, token by token.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from kernels_pallas.common.derivative import once
from kernels_pallas.common.finite import any_counted, if_bad
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded
from kernels_pallas.common.precision import one_pass_allowed
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.gpu import backward as gpu_backward
from kernels_pallas.linear_scan.gpu import careful, intra_chunk, tuning
from kernels_pallas.linear_scan.gpu import scan as gpu_scan
from kernels_pallas.linear_scan.gpu.intra_chunk import Decays, clamped_logs
from kernels_pallas.linear_scan.gpu.plan import Inputs, Plan
from kernels_pallas.linear_scan.gpu.scan import Chunks
from kernels_pallas.linear_scan.gpu.tile import SUBTOTAL
from kernels_pallas.linear_scan.gpu.tuning import MAX_CHUNK, MAX_D, MIN_CHUNK
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME

OP = "linear_scan"
# Triton's indices are 32-bit.
MAX_ELEMENTS = 2**31


def unsupported(inputs: ScanInputs, options: ScanOptions) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    q, k, v, log_decay, bonus, initial_state, _ = inputs
    floats = (q, k, v, log_decay, bonus, initial_state)
    if any(x is not None and x.dtype == jnp.float64 for x in floats):
        return "does not compute in float64"
    K = q.shape[-1]
    V = v.shape[-1]
    if max(K, V + options.normalize) > MAX_D:
        most = f"K and V up to {MAX_D} (with normalize up to {MAX_D - 1})"
        return f"takes {most}, not {K} and {V}"
    chunk_size = options.chunk_size
    if chunk_size is not None and not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        return f"takes a chunk_size from {MIN_CHUNK} to {MAX_CHUNK}, not {chunk_size}"
    plan = _plan(inputs, options, interpret=False)
    tokens = plan.T * max(plan.K, plan.V)
    states = plan.chunks * plan.K * plan.V
    largest = q.shape[0] * plan.H * max(tokens, states)
    if largest >= MAX_ELEMENTS:
        return f"takes arrays and saved states below 2**31 elements, not {largest}"
    return None


def linear_scan(
    inputs: ScanInputs, options: ScanOptions, *, interpret: bool = False
) -> tuple[Array, Array | None]:
    """As `api.linear_scan`.

    Args:
      inputs: log_decay is None, [B, T, H] or [B, T, H, K], where B may be 1.
      options: the static arguments.
      interpret: whether the kernels run in interpret mode.

    Returns:
      o [B, T, H, V] in v's dtype, and the final state or None.
    """
    q, _, v, log_decay, bonus, initial_state, segment_ids = inputs
    T, K = q.shape[1], q.shape[3]
    out_dtype = v.dtype
    if options.normalize:
        v = append_ones(v)
        inputs = inputs._replace(v=v)
    V = v.shape[3]
    plan = _plan(inputs, options, interpret)
    starts = None
    if segment_ids is not None:
        starts = segment_starts(segment_ids, options.reverse)
    x = Inputs(
        q=_padded_tokens(plan, q, plan.K),
        k=_padded_tokens(plan, inputs.k, plan.K),
        v=_padded_tokens(plan, v, plan.V),
        logs=_logs(plan, q, log_decay, starts),
        starts=_starts_in_order(plan, starts),
        bonus=None if bonus is None else padded(bonus, 1, plan.K),
        state=_padded_state(plan, initial_state),
    )
    o, final_state = _scan(plan, options.return_final_state, x)
    if final_state is not None:
        final_state = final_state[:, :, :K, :V]
    o = o[:, :T, :, :V]
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), final_state


def _plan(inputs: ScanInputs, options: ScanOptions, interpret: bool) -> Plan:
    """The static arguments and the sizes that they and the shapes decide."""
    q, k, v = inputs.q, inputs.k, inputs.v
    B, T, H, _ = q.shape
    K = whole_blocks(q.shape[3])
    V = whole_blocks(v.shape[3])
    decay = _decay_kind(inputs)
    operand, precision = matmuls(interpret, q, k, v)
    is_exact = precision == lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    schedule = tuning.schedule(decay, operand.itemsize, is_exact)
    # A short sequence is one chunk, of a power of two.
    shortest = max(MIN_CHUNK, 1 << (T - 1).bit_length())
    chunk = min(options.chunk_size or schedule.chunk, shortest)
    programs = B * H * (V // tuning.scan_block_v(schedule, K, V))
    segments = tuning.segments(schedule, programs, -(-T // chunk))
    length = chunk * segments
    # The two halves of a fraction keep float32 until they are divided.
    out_dtype = jnp.dtype(jnp.float32) if options.normalize else v.dtype
    return Plan(
        T=-(-T // length) * length,
        H=H,
        Hk=k.shape[2],
        Hv=v.shape[2],
        K=K,
        V=V,
        decay=decay,
        inclusive=options.inclusive,
        reverse=options.reverse,
        scale=1.0 if options.normalize else options.scale,
        chunk=chunk,
        segments=segments,
        operand=operand,
        precision=precision,
        # Interpreted there is no such instruction.
        fast_exp=not (interpret or is_exact),
        out_dtype=out_dtype,
        schedule=schedule,
        interpret=interpret,
    )


def _decay_kind(inputs: ScanInputs) -> Literal["vector", "scalar", "none"]:
    """Segments without decays are scalar decays: 0 where a document begins, else 1."""
    log_decay = inputs.log_decay
    if log_decay is not None and log_decay.ndim == 4:
        return "vector"
    if log_decay is None and inputs.segment_ids is None:
        return "none"
    return "scalar"


def whole_blocks(D: int) -> int:
    """D filled up to a power of two from 16 on, or above 32 to a multiple of 32."""
    if D <= 32:
        return max(16, 1 << (D - 1).bit_length())
    return -(-D // 32) * 32


def matmuls(interpret: bool, *arrays: Array) -> tuple[Any, Any]:
    """The dtype of what is multiplied, and the precision. Interpreted matmuls round nothing."""
    if interpret:
        return jnp.dtype(jnp.float32), lax.Precision.HIGHEST
    is_one_pass = one_pass_allowed()
    if is_one_pass and all(x.dtype == jnp.bfloat16 for x in arrays):
        return jnp.dtype(jnp.bfloat16), None
    preset = lax.DotAlgorithmPreset
    # float16 has 10 bits of fraction, as TF32.
    if is_one_pass and all(x.dtype.itemsize == 2 for x in arrays):
        return jnp.dtype(jnp.float32), preset.TF32_TF32_F32
    return jnp.dtype(jnp.float32), preset.TF32_TF32_F32_X3


# --- arrays as the kernels take them


def _padded_tokens(plan: Plan, x: Array, width: int) -> Array:
    return padded(padded(x, 1, plan.T), 3, width)


def _padded_state(plan: Plan, state: Array | None) -> Array | None:
    if state is None:
        return None
    return padded(padded(state, 2, plan.K), 3, plan.V)


def _in_order(plan: Plan, x: Array, axis: int) -> Array:
    """A small array in the order of the recurrence."""
    return jnp.flip(x, axis) if plan.reverse else x


def _starts_in_order(
    plan: Plan,
    starts: Bool[Array, "B T"] | None,
) -> Float[Array, "B Tp"] | None:
    """`Inputs.starts`."""
    if starts is None:
        return None
    in_order = _in_order(plan, padded(starts, 1, plan.T), 1)
    return in_order.astype(jnp.float32)


def _logs(
    plan: Plan,
    q: Array,
    log_decay: Array | None,
    starts: Bool[Array, "B T"] | None,
) -> Array | None:
    """`Inputs.logs`. Differentiable."""
    if plan.decay == "none":
        return None
    if plan.decay == "vector":
        assert log_decay is not None
        return _padded_tokens(plan, log_decay, plan.K)
    if log_decay is None:
        # Segments alone.
        zeros = jnp.zeros((1, *q.shape[1:3]), jnp.float32)
        log_decay = varying_like(zeros, q)
    logs = jnp.maximum(log_decay.astype(jnp.float32), tile.LOG_ZERO)
    if starts is not None:
        # The lesser of the two, so that a log that is NaN remains one.
        logs = jnp.where(starts[:, :, None], jnp.minimum(logs, tile.LOG_ZERO), logs)
    heads_first = jnp.swapaxes(logs, 1, 2)
    return _in_order(plan, padded(heads_first, 2, plan.T), 2)


def _decays(plan: Plan, x: Inputs) -> Decays:
    """What the kernels read of the logs.

    Beside q these arrays are small: 1/8 of the logs, or a few numbers a token.
    """
    if plan.decay == "none":
        return Decays()
    assert x.logs is not None
    if plan.decay == "vector":
        return vector_decays(plan, x.logs, x.starts)
    return scalar_decays(plan, x.logs, x.starts)


def vector_decays(
    plan: Plan,
    logs: Array,
    starts: Array | None,
) -> Decays:
    rows, _, H, K = logs.shape
    is_start = None
    if starts is not None:
        is_start = _in_order(plan, starts, 1)[:, :, None, None] > 0
    # As the kernels do it: never an array of its own.
    clamped = clamped_logs(logs.astype(jnp.float32), is_start)
    eights = clamped.reshape(rows, -1, SUBTOTAL, H, K)
    subtotals = eights.sum(2)
    log_total = subtotals.reshape(rows, plan.chunks, -1, H, K).sum(2)
    log_total = jnp.swapaxes(_in_order(plan, log_total, 1), 1, 2)
    return Decays(logs=logs, subtotals=subtotals, starts=starts, log_total=log_total)


def scalar_decays(
    plan: Plan,
    logs: Array,
    starts: Array | None,
) -> Decays:
    def in_chunks(rows: Array) -> Array:
        return rows.reshape(*rows.shape[:2], plan.chunks, plan.chunk)

    logs = in_chunks(logs)
    reads = logs
    if not plan.inclusive:
        # An exclusive read includes nothing of its own log, but the reset of its segment.
        reads = jnp.zeros_like(logs)
        if starts is not None:
            is_start = in_chunks(starts[:, None]) > 0
            log_zero = jnp.asarray(tile.LOG_ZERO, logs.dtype)
            reads = jnp.where(is_start, log_zero, reads)
            logs = jnp.broadcast_to(logs, reads.shape)
    # Coarse and fine parts, [2, B, H, N, C] each.
    reads, ends = tile.running_sums(logs, reads)
    last = ends[..., -1:]
    return Decays(
        sums=jnp.moveaxis(jnp.concatenate([reads, ends]), 0, 3),
        read_factor=jnp.exp(reads.sum(0)),
        write_factor=jnp.exp((last - ends).sum(0)),
        log_total=last.sum(0),
    )


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    plan: Plan,
    return_final_state: bool,
    x: Inputs,
) -> tuple[Array, Array | None]:
    """(o [B, T, H, V] in plan.out_dtype, final state [B, H, K, V] float32)."""
    outputs, _ = _checked(plan, return_final_state, x, save=False)
    return outputs


def _forward(plan: Plan, return_final_state: bool, x: Inputs):
    (o, final_state), saved = _checked(plan, return_final_state, x, save=True)
    # The name also of the flag, or it alone would have the kernel run again.
    residuals = [checkpoint_name(array, STATES_NAME) for array in saved]
    return (checkpoint_name(o, OUT_NAME), final_state), (x, *residuals)


def _checked(
    plan: Plan,
    return_final_state: bool,
    x: Inputs,
    *,
    save: bool,
) -> tuple[tuple[Array, Array | None], tuple[Array | None, Bool[Array, ""]]]:
    """((o, final state), (the state before each chunk or None, whether one is not finite))."""
    run = partial(_run, plan, return_final_state=return_final_state, save=save)
    outputs, states, is_bad = once(OP, run, x)
    carefully = partial(careful.outputs, plan, return_final_state)
    return if_bad(is_bad, partial(once, OP, carefully), outputs, x), (states, is_bad)


def _run(
    plan: Plan,
    x: Inputs,
    *,
    return_final_state: bool,
    save: bool,
) -> tuple[tuple[Array, Array | None], Array | None, Bool[Array, ""]]:
    """((o, final state), the state before each chunk or None, whether one is not finite)."""
    decays = _decays(plan, x)
    out = _scan_segments(
        plan,
        _chunks(plan, x, decays),
        decays,
        x.state,
        plan.out_dtype,
        backward=False,
        save=save,
        final=return_final_state,
    )
    return (out["o"], out.get("final")), out.get("states"), any_counted(out["bad"])


def _chunks(plan: Plan, x: Inputs, decays: Decays) -> Chunks:
    """Runs the kernel of products, and gathers what the forward scan goes through."""
    made = intra_chunk.products(plan, x, decays)
    # With scalar decays reads are q and writes are k, and factors do the rest.
    return Chunks(
        reads=made.get("reads", x.q),
        writes=made.get("writes", x.k),
        products=made["out"],
        values=x.v,
        total=decays.total,
        read_factor=decays.read_factor,
        write_factor=decays.write_factor,
        initial=None,
    )


def _scan_segments(
    plan: Plan,
    chunks: Chunks,
    decays: Decays,
    first: Array | None,
    out_dtype,
    *,
    backward: bool,
    save: bool,
    final: bool,
) -> dict[str, Array]:
    """The scan kernel, in two passes where there are several segments.

    Args:
      first: the state before the first segment [B, H, K, V]; None for zeros.
      out_dtype, backward, save, final: as `scan.scan`; the `final` that is returned is
        [B, H, K, V].
    """
    scan = partial(gpu_scan.scan, plan, backward=backward)
    if plan.segments == 1:
        initial = None if first is None else first[:, :, None]
        out = scan(chunks._replace(initial=initial), out_dtype, save=save, final=final)
        if final:
            out["final"] = out["final"][:, :, 0]
        return out
    # Each segment from zeros, without outputs; their final states tell where each begins.
    alone = scan(chunks._replace(products=None), out_dtype, save=False, final=True)
    segment_logs = _segment_logs(plan, decays)
    initial, last = gpu_scan.combined(segment_logs, alone["final"], first, backward)
    out = scan(chunks._replace(initial=initial), out_dtype, save=save, final=False)
    if final:
        out["final"] = last
    return out


def _segment_logs(plan: Plan, decays: Decays) -> Float[Array, "_ H G _"] | None:
    """The logs of each whole segment."""
    logs = decays.log_total
    if logs is None:
        return None
    rows, H, _, width = logs.shape
    return logs.reshape(rows, H, plan.segments, -1, width).sum(3)


def _backward(plan: Plan, return_final_state: bool, residuals, cotangents):
    x, states, is_bad = residuals
    gradients, is_bad_here = once(OP, partial(_gradients, plan), x, states, cotangents)

    # What was not finite on the way forward is not counted again on the way back.
    is_bad = is_bad | is_bad_here
    carefully = partial(careful.gradients, plan)
    return (if_bad(is_bad, partial(once, OP, carefully), gradients, x, cotangents),)


def _gradients(
    plan: Plan,
    x: Inputs,
    states: Array,
    cotangents: tuple[Array, Array | None],
) -> tuple[Inputs, Bool[Array, ""]]:
    """The cotangents of the inputs, by the kernels, and whether one is not finite."""
    do, dfinal = cotangents
    decays = _decays(plan, x)
    forward = _chunks(plan, x, decays)
    assert forward.reads is not None
    # dv = A^T do + writes dS: the forward scan with reads and writes, v and do exchanged.
    exchanged = forward._replace(
        reads=forward.writes,
        writes=forward.reads,
        values=do,
        read_factor=forward.write_factor,
        write_factor=forward.read_factor,
    )
    # Query heads that share a value head add up their parts afterwards: in float32.
    dv_dtype = x.v.dtype if plan.Hv == plan.H else jnp.float32
    out = _scan_segments(
        plan,
        exchanged,
        decays,
        dfinal,
        dv_dtype,
        backward=True,
        save=True,
        final=x.state is not None,
    )
    through = gpu_backward.through_products(plan, x, decays, do, states, out["states"])
    dbonus = None
    if x.bonus is not None:
        dbonus = through["dbonus"].sum((0, 2)).astype(x.bonus.dtype)
    gradients = Inputs(
        q=through["dq"],
        k=sum_of_heads(through["dk"], x.k),
        v=sum_of_heads(out["o"], x.v),
        logs=dlogs_of(plan, x.logs, through),
        starts=None if x.starts is None else jnp.zeros_like(x.starts),
        bonus=dbonus,
        state=out.get("final"),
    )
    return gradients, any_counted(out["bad"], through["bad"])


_scan.defvjp(_forward, _backward)


def sum_of_heads(parts: Float[Array, "B T H D"], x: Float[Array, "B T Hx D"]) -> Array:
    """Sums the parts that query heads contribute to a shared head, in x's dtype."""
    if parts.shape == x.shape:
        return parts
    B, T, heads, D = x.shape
    return (
        parts.reshape(
            B,
            T,
            heads,
            -1,
            D,
        )
        .sum(3)
        .astype(x.dtype)
    )


def dlogs_of(plan: Plan, logs: Array | None, through: dict[str, Array]) -> Array | None:
    """What each log receives. The formula is `gpu.tile.vector_dlogs`.

    The kernel has done it for vector decays. For scalar ones it left four numbers of each token, in
    blocks of K.
    """
    if plan.decay != "scalar":
        return through.get("dlogs")
    assert logs is not None
    of_tokens = through["rows"].sum(3)
    # [B, H, N, C] each.
    readers, writers, writes, total = jnp.moveaxis(of_tokens, 3, 0)
    later = jnp.triu(jnp.ones((plan.chunk, plan.chunk), jnp.float32), 1)
    balance = readers - writers

    def summed(which: Array, rows: Array) -> Array:
        return jnp.einsum("ij,...j->...i", which, rows, precision="highest")

    own = balance if plan.inclusive else -writers
    dlogs = total + summed(later, balance) + summed(later.T, writes) + own
    dlogs = dlogs.reshape(*dlogs.shape[:2], plan.T)
    if logs.shape[0] == 1:
        # One row of logs for the whole batch.
        return dlogs.sum(0, keepdims=True)
    return dlogs
