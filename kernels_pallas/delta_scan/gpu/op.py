"""`delta_scan` on GPU (Pallas, Triton): coverage, padding, and the derivative around the kernels.

Three kernels forward and four backward besides, so that none needs more registers than a thread
has:

    scores             parallel over chunks    both scores of a chunk, its reads, erases and writes
    inverse            parallel over chunks    the inverse of its triangular system
    scan               through the chunks      the changes W, o and the states
    scores and inverse again, then the scan backward: dU and the states' cotangents
    through changes    parallel over chunks    W again, dv, the scores' cotangents
    through terms      parallel over chunks    dq, dk, those of the erase keys, weights and logs

Where B x H is small, segments of T are scanned side by side: see `scan.py`.

Saved for the backward pass: the inputs, and the state before each chunk. With bfloat16 inputs what
is multiplied is rounded to bfloat16, with float16 ones to TF32; with float32 inputs matmuls keep
all bits, in three passes of TF32, and so do those of the inverse with any inputs. Exponentials are
those of CUDA's library with float32 inputs, and else a single instruction of the chip.

The kernels multiply whole chunks, in which NaN and Inf of a token would reach tokens that do not
see it. They count what is not finite at the end: in the state, which keeps what went through it,
and in the gradients. Where there is any, `careful` computes the call again, token by token.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.common.finite import any_counted
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded, power_of_two, round_up
from kernels_pallas.common.two_paths import Paths, Scanned, with_careful_path
from kernels_pallas.delta_scan.gpu import backward as gpu_backward
from kernels_pallas.delta_scan.gpu import careful, intra_chunk, tuning
from kernels_pallas.delta_scan.gpu import scan as gpu_scan
from kernels_pallas.delta_scan.gpu.plan import Inputs, Plan, Rows
from kernels_pallas.delta_scan.gpu.scan import Chunks
from kernels_pallas.delta_scan.gpu.tuning import MAX_CHUNK, MAX_K, MAX_V, MIN_CHUNK
from kernels_pallas.delta_scan.inputs import DeltaInputs, DeltaOptions
from kernels_pallas.delta_scan.normalize import L2_EPSILON, l2_normalized
from kernels_pallas.delta_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.linear_scan.gpu.decays import decays_of, dlogs_of, padded_logs
from kernels_pallas.linear_scan.gpu.plan import (
    beyond_indices,
    matmuls,
    padded_state,
    padded_tokens,
    sum_of_heads,
    whole_blocks,
)
from kernels_pallas.linear_scan.inputs import decay_kind
from kernels_pallas.linear_scan.reference import segment_starts

OP = "delta_scan"


def unsupported(inputs: DeltaInputs, options: DeltaOptions) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    floats = inputs._replace(segment_ids=None)
    if any(x is not None and x.dtype == jnp.float64 for x in floats):
        return "does not compute in float64"
    K = inputs.q.shape[-1]
    V = inputs.v.shape[-1]
    if K > MAX_K or V > MAX_V:
        return f"takes K up to {MAX_K} and V up to {MAX_V}, not {K} and {V}"
    chunk_size = options.chunk_size
    if chunk_size is not None and not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        return f"takes a chunk_size from {MIN_CHUNK} to {MAX_CHUNK}, not {chunk_size}"
    return beyond_indices(_plan(inputs, options, interpret=False), inputs.q.shape[0])


def delta_scan(
    inputs: DeltaInputs,
    options: DeltaOptions,
    *,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """As `api.delta_scan`.

    Args:
      inputs: the arrays of the call.
      options: the static arguments.
      interpret: whether the kernels run in interpret mode.

    Returns:
      o [B, T, H, V] in v's dtype, and the final state or None.
    """
    T, K = inputs.q.shape[1], inputs.q.shape[3]
    V = inputs.v.shape[3]
    plan = _plan(inputs, options, interpret)
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids, reverse=False)
    x = Inputs(
        q=padded_tokens(plan.T, inputs.q, plan.K),
        k=padded_tokens(plan.T, inputs.k, plan.K),
        v=padded_tokens(plan.T, inputs.v, plan.V),
        beta=None if inputs.beta is None else _heads_first(plan, inputs.beta),
        logs=padded_logs(plan.of_decays, inputs.v, inputs.log_decay, starts),
        erase=None if inputs.erase is None else padded_tokens(plan.T, inputs.erase, plan.K),
        write=None if inputs.write is None else padded_tokens(plan.T, inputs.write, plan.V),
        starts=None if starts is None else padded(starts, 1, plan.T).astype(jnp.float32),
        state=padded_state(plan, inputs.initial_state),
    )
    o, final_state = _scan(plan, x)
    if final_state is not None:
        final_state = final_state[:, :, :K, :V]
    return o[:, :T, :, :V], final_state


def _plan(inputs: DeltaInputs, options: DeltaOptions, interpret: bool) -> Plan:
    """The static arguments and the sizes that they and the shapes decide."""
    q, k, v = inputs.q, inputs.k, inputs.v
    B, T, H, _ = v.shape
    K = whole_blocks(q.shape[3])
    V = whole_blocks(v.shape[3])
    decay = decay_kind(inputs.log_decay, inputs.segment_ids)
    operand, precision = matmuls(interpret, q, k, v)
    is_exact = precision == lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    schedule = tuning.schedule(decay, operand.itemsize)
    # A short sequence is one chunk, of a power of two.
    chunk = min(options.chunk_size or schedule.chunk, max(MIN_CHUNK, power_of_two(T)))
    programs = B * H * (V // tuning.scan_block_v(schedule, K, V))
    segments = tuning.segments(schedule, programs, -(-T // chunk))
    return Plan(
        T=round_up(T, chunk * segments),
        H=H,
        Hq=q.shape[2],
        Hk=k.shape[2],
        K=K,
        V=V,
        decay=decay,
        scale=options.scale,
        l2_norm=options.l2_norm,
        chunk=chunk,
        segments=segments,
        operand=operand,
        precision=precision,
        # Interpreted there is no such instruction.
        fast_exp=not (interpret or is_exact),
        out_dtype=v.dtype,
        schedule=schedule,
        return_final_state=options.return_final_state,
        interpret=interpret,
    )


# --- arrays as the kernels take them


def _heads_first(plan: Plan, rows: Float[Array, "B T H"]) -> Float[Array, "B H Tp"]:
    return jnp.swapaxes(padded(rows.astype(jnp.float32), 1, plan.T), 1, 2)


def _rows(plan: Plan, x: Inputs) -> Rows:
    """`Rows` of the inputs."""

    def in_chunks(rows: Array) -> Array:
        return rows.reshape(*rows.shape[:2], plan.chunks, plan.chunk)

    def one_over_length(tokens: Array) -> Array:
        """[B, T, heads, K] -> [B, heads, N, C]."""
        # Small beside q: the kernels multiply q as it lies in memory.
        squares = jnp.sum(jnp.square(tokens.astype(jnp.float32)), axis=-1)
        return in_chunks(jnp.swapaxes(lax.rsqrt(squares + L2_EPSILON), 1, 2))

    if plan.l2_norm:
        q_factor = plan.scale * one_over_length(x.q)
        k_factor = one_over_length(x.k)
    else:
        shape = (x.q.shape[0], plan.Hq, plan.chunks, plan.chunk)
        q_factor = varying_like(jnp.full(shape, plan.scale, jnp.float32), x.q)
        k_factor = None
    return Rows(
        q_factor=q_factor,
        k_factor=k_factor,
        beta=None if x.beta is None else in_chunks(x.beta),
        decays=decays_of(plan.of_decays, x.logs, x.starts),
    )


def _chunks(plan: Plan, x: Inputs, rows: Rows) -> Chunks:
    """Runs the kernels over chunks, and gathers what the forward scan goes through."""
    made = intra_chunk.terms(plan, x, rows)
    value_factor = rows.beta if x.write is None else None
    if made.reads is not None:
        assert made.erases is not None and made.writes is not None
        return Chunks(
            reads=made.reads,
            erases=made.erases,
            writes=made.writes,
            read_scores=made.read_scores,
            below=made.below,
            values=x.v,
            value_weights=x.write,
            value_factor=value_factor,
            total=rows.decays.total,
            read_factor=None,
            erase_factor=None,
            write_factor=None,
            initial=x.state,
        )
    # With scalar decays factors of the tokens do the rest.
    decays = rows.decays
    erase_factor = decays.read_factor
    if x.erase is None:
        erase_factor = _product(plan, rows.beta, rows.k_factor, decays.read_factor)
    return Chunks(
        reads=x.q,
        erases=x.k if x.erase is None else x.erase,
        writes=x.k,
        read_scores=made.read_scores,
        below=made.below,
        values=x.v,
        value_weights=x.write,
        value_factor=value_factor,
        total=decays.total,
        read_factor=_product(plan, rows.q_factor, decays.read_factor),
        erase_factor=erase_factor,
        write_factor=_product(plan, rows.k_factor, decays.write_factor),
        initial=x.state,
    )


def _product(plan: Plan, *factors: Float[Array, "B _ N C"] | None) -> Array | None:
    """The product of factors of shared heads and of own ones, one for each state."""
    product = None
    for factor in factors:
        if factor is not None:
            of_states = jnp.repeat(factor, plan.group(factor.shape[1]), axis=1)
            product = of_states if product is None else product * of_states
    return product


# --- the derivative


def _forward(plan: Plan, x: Inputs, save: bool) -> Scanned:
    """By the kernels: o [B, T, H, V] in plan.out_dtype, final state [B, H, K, V] float32."""
    out = gpu_scan.scan(
        plan,
        _chunks(plan, x, _rows(plan, x)),
        plan.out_dtype,
        backward=False,
        save=save,
        final=plan.return_final_state,
    )
    return Scanned(out["out"], out.get("final"), out.get("states"), any_counted(out["bad"]))


def _backward(
    plan: Plan,
    x: Inputs,
    states: Array,
    cotangents: tuple[Array, Array | None],
) -> tuple[Inputs, Bool[Array, ""]]:
    """The cotangents of the inputs, by the kernels, and whether one is not finite."""
    do, dfinal = cotangents
    rows = _rows(plan, x)
    chunks = _chunks(plan, x, rows)
    # The scan backward goes through the cotangents of o in place of v.
    of_cotangents = chunks._replace(
        values=do,
        value_weights=None,
        value_factor=None,
        initial=dfinal,
    )
    out = gpu_scan.scan(
        plan,
        of_cotangents,
        plan.operand,
        backward=True,
        save=True,
        final=x.state is not None,
    )
    # dU has the place that o has on the way forward.
    dwritten = out["out"]
    changed = gpu_backward.through_changes(plan, x, chunks, do, dwritten, states)
    through = gpu_backward.through_terms(
        plan,
        x,
        rows,
        do,
        dwritten,
        changed,
        states,
        out["states"],
    )
    gradients = Inputs(
        q=_through_length(plan, x.q, through["dq"]),
        k=_through_length(plan, x.k, through["dk"]),
        v=changed["dv"],
        beta=_dbeta(x.beta, changed, through),
        logs=dlogs_of(plan.of_decays, x.logs, through),
        erase=through.get("derase"),
        write=changed.get("dwrite"),
        starts=None if x.starts is None else jnp.zeros_like(x.starts),
        state=out.get("final"),
    )
    return gradients, any_counted(out["bad"], through["bad"])


def _through_length(
    plan: Plan,
    x: Float[Array, "B T Hx K"],
    parts: Float[Array, "B T H K"],
) -> Array:
    """What x receives: the sum over the states that share a head, then through its length.

    For y = x / |x| and parts that count 1 / |x| as a constant, dx = dx - y (y dx).
    """
    if not plan.l2_norm:
        return sum_of_heads(parts, x)
    dx = sum_of_heads(parts.astype(jnp.float32), x.astype(jnp.float32))
    y = l2_normalized(x.astype(jnp.float32))
    along = jnp.sum(y * dx, axis=-1, keepdims=True)
    return (dx - y * along).astype(x.dtype)


def _dbeta(
    beta: Float[Array, "B H T"] | None,
    changed: dict[str, Array],
    through: dict[str, Array],
) -> Array | None:
    """What beta receives as the weight of v, as that of the erase key, or as both."""
    if beta is None:
        return None
    parts = []
    if "dbeta" in changed:
        parts.append(changed["dbeta"])
    if "dbeta" in through:
        # One part for each block of K.
        parts.append(through["dbeta"].sum(3))
    return sum(parts[1:], parts[0]).reshape(beta.shape)


_scan = with_careful_path(
    OP,
    Paths(_forward, _backward, careful.outputs, careful.gradients),
    OUT_NAME,
    STATES_NAME,
)
