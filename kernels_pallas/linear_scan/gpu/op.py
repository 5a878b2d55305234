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

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.common.finite import any_counted
from kernels_pallas.common.padding import padded, power_of_two, round_up
from kernels_pallas.common.two_paths import Paths, Scanned, with_careful_path
from kernels_pallas.linear_scan.gpu import backward as gpu_backward
from kernels_pallas.linear_scan.gpu import careful, intra_chunk, tuning
from kernels_pallas.linear_scan.gpu import scan as gpu_scan
from kernels_pallas.linear_scan.gpu.decays import (
    Decays,
    decays_of,
    dlogs_of,
    padded_logs,
)
from kernels_pallas.linear_scan.gpu.plan import (
    Inputs,
    Plan,
    beyond_indices,
    matmuls,
    padded_state,
    padded_tokens,
    sum_of_heads,
    whole_blocks,
)
from kernels_pallas.linear_scan.gpu.scan import Chunks
from kernels_pallas.linear_scan.gpu.tuning import MAX_CHUNK, MAX_D, MIN_CHUNK
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, decay_kind
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME

OP = "linear_scan"


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
    return beyond_indices(_plan(inputs, options, interpret=False), q.shape[0])


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
        q=padded_tokens(plan.T, q, plan.K),
        k=padded_tokens(plan.T, inputs.k, plan.K),
        v=padded_tokens(plan.T, v, plan.V),
        logs=padded_logs(plan, q, log_decay, starts),
        starts=_starts_in_order(plan, starts),
        bonus=None if bonus is None else padded(bonus, 1, plan.K),
        state=padded_state(plan, initial_state),
    )
    o, final_state = _scan(plan, x)
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
    decay = decay_kind(inputs.log_decay, inputs.segment_ids)
    operand, precision = matmuls(interpret, q, k, v)
    is_exact = precision == lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    schedule = tuning.schedule(decay, operand.itemsize, is_exact)
    # A short sequence is one chunk, of a power of two.
    shortest = max(MIN_CHUNK, power_of_two(T))
    chunk = min(options.chunk_size or schedule.chunk, shortest)
    programs = B * H * (V // tuning.scan_block_v(schedule, K, V))
    segments = tuning.segments(schedule, programs, -(-T // chunk))
    length = chunk * segments
    # The two halves of a fraction keep float32 until they are divided.
    out_dtype = jnp.dtype(jnp.float32) if options.normalize else v.dtype
    return Plan(
        T=round_up(T, length),
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
        return_final_state=options.return_final_state,
        interpret=interpret,
    )


# --- arrays as the kernels take them


def _starts_in_order(
    plan: Plan,
    starts: Bool[Array, "B T"] | None,
) -> Float[Array, "B Tp"] | None:
    """`Inputs.starts`."""
    if starts is None:
        return None
    in_order = plan.in_order(padded(starts, 1, plan.T), 1)
    return in_order.astype(jnp.float32)


# --- the derivative


def _forward(plan: Plan, x: Inputs, save: bool) -> Scanned:
    """By the kernels: o [B, T, H, V] in plan.out_dtype, final state [B, H, K, V] float32."""
    decays = decays_of(plan, x.logs, x.starts)
    out = _scan_segments(
        plan,
        _chunks(plan, x, decays),
        decays,
        x.state,
        plan.out_dtype,
        backward=False,
        save=save,
        final=plan.return_final_state,
    )
    return Scanned(out["o"], out.get("final"), out.get("states"), any_counted(out["bad"]))


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


def _backward(
    plan: Plan,
    x: Inputs,
    states: Array,
    cotangents: tuple[Array, Array | None],
) -> tuple[Inputs, Bool[Array, ""]]:
    """The cotangents of the inputs, by the kernels, and whether one is not finite."""
    do, dfinal = cotangents
    decays = decays_of(plan, x.logs, x.starts)
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


_scan = with_careful_path(
    OP,
    Paths(_forward, _backward, careful.outputs, careful.gradients),
    OUT_NAME,
    STATES_NAME,
)
