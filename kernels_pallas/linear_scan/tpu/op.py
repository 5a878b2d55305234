"""`linear_scan` on TPU (Pallas, Mosaic): what the kernels cover, views, padding, derivative.

One kernel each way (`forward.py`, `backward.py`), each moving every input and output once. The
mathematics is in `tile.py`, `scalar_decay.py` and `vector_decay.py`, block sizes in `tuning.py`.
Saved for the backward pass: the inputs, the state before each chunk, and on chips where that pays
the scores of vector decays.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in
several passes. With bfloat16 inputs a matmul is one pass, as by XLA's default, and rounds its
operands: outputs and gradients are then 2.3e-3 to 3.2e-3 off (relative RMS), where the rounding of
a bfloat16 output alone is 1.7e-3. They keep their bits too under
`jax.default_matmul_precision("highest")`, and in interpret mode, which rounds nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from kernels_pallas.common.derivative import once
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded, power_of_two, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.tpu import LANES, interpret_params
from kernels_pallas.linear_scan import nonfinite, tile
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, decay_kind
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.tpu import backward as backward_kernel
from kernels_pallas.linear_scan.tpu import forward as forward_kernel
from kernels_pallas.linear_scan.tpu.again import gradients_again, outputs_again
from kernels_pallas.linear_scan.tpu.plan import KernelInputs, Plan, Saved
from kernels_pallas.linear_scan.tpu.tuning import MAX_CHUNK, MAX_D, MIN_CHUNK, schedules
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME


def unsupported(inputs: ScanInputs, options: ScanOptions) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    floats = inputs._replace(segment_ids=None)
    if any(x is not None and x.dtype == jnp.float64 for x in floats):
        return "does not compute in float64"
    K = inputs.q.shape[-1]
    V = inputs.v.shape[-1]
    if K > MAX_D or V + options.normalize > MAX_D:
        return f"takes K and V up to {MAX_D} (with normalize up to {MAX_D - 1}), not {K} and {V}"
    chunk_size = options.chunk_size
    if chunk_size is not None and not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        return f"takes a chunk_size from {MIN_CHUNK} to {MAX_CHUNK}, not {chunk_size}"
    return None


def linear_scan(
    inputs: ScanInputs,
    options: ScanOptions,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K Vs"] | None]:
    """As `api.linear_scan`: returns (o, final state)."""
    out_dtype = inputs.v.dtype
    B, T, H, K = inputs.q.shape
    inputs = _supported_arrays(inputs, options)
    V = inputs.v.shape[-1]
    plan = _plan(inputs, options, interpret)

    # The derivative is that of the padded views; reshapes and padding are XLA's.
    o, final_state = _scan(plan, _views(plan, inputs))
    # Drop the padding of T and of channels.
    o = o.reshape(B, plan.T, H, plan.V)[:, :T, :, :V]
    if final_state is not None:
        # [V, K] in the kernels, [K, V] outside.
        final_state = jnp.swapaxes(final_state[:, :, :V, :K], 2, 3)
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), final_state


def _supported_arrays(inputs: ScanInputs, options: ScanOptions) -> ScanInputs:
    """The column of ones, and dtypes that Mosaic knows: it does not convert float16."""

    def convert(x: Array | None) -> Array | None:
        if x is None or x.dtype != jnp.float16:
            return x
        return x.astype(jnp.float32)

    if options.normalize:
        inputs = inputs._replace(v=append_ones(inputs.v))
    return ScanInputs._make(convert(x) for x in inputs)


# --- the static arguments


def _plan(inputs: ScanInputs, options: ScanOptions, interpret: bool) -> Plan:
    _, T, H, K = inputs.q.shape
    Hk = inputs.k.shape[2]
    Hv, V = inputs.v.shape[2:]
    # Channels fill whole registers.
    K = round_up(K, LANES)
    V = round_up(V, LANES)
    decay = decay_kind(inputs.log_decay, inputs.segment_ids)
    # A chunk is a power of two, and not much longer than T.
    chunk = min(options.chunk_size or MAX_CHUNK, max(MIN_CHUNK, power_of_two(T)))
    forward, backward = schedules(decay, T, H, Hk, Hv, K, V, chunk)
    # A block must not be longer than the array: this matters for the shortest T only.
    longest_step = chunk * max(forward.chunks, backward.chunks)
    # Numerator and denominator keep float32 until they are divided.
    out_dtype = jnp.dtype(jnp.float32) if options.normalize else inputs.v.dtype
    return Plan(
        T=max(T, longest_step),
        H=H,
        Hk=Hk,
        Hv=Hv,
        K=K,
        V=V,
        decay=decay,
        inclusive=options.inclusive,
        reverse=options.reverse,
        scale=options.scale,
        chunk=chunk,
        # Interpreted matmuls round nothing.
        rounds=not interpret and one_bfloat16_pass(inputs.q, inputs.k, inputs.v),
        out_dtype=out_dtype,
        return_final_state=options.return_final_state,
        forward=forward,
        backward=backward,
        interpret=interpret_params(interpret, inputs.q),
    )


def _longest_step(plan: Plan) -> int:
    """Tokens in a grid step; the shorter one of the two kernels divides it."""
    return plan.chunk * max(plan.forward.chunks, plan.backward.chunks)


# --- views of the arrays


def _views(plan: Plan, inputs: ScanInputs) -> KernelInputs:
    """What the derivative is taken of: padded views, with logs in `decay` whatever its kind."""
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids, plan.reverse)
        # [B, 1, T]: an axis of heads, all alike. Padding does not start segments.
        starts = padded(starts, 1, plan.T)[:, None].astype(jnp.float32)
    bonus = inputs.bonus
    if bonus is not None:
        # [H, K] -> [1, H * K]
        bonus = padded(bonus, 1, plan.K).reshape(1, -1)
    state = inputs.initial_state
    if state is not None:
        # Transposed, so that a decay of the keys is a row in the kernels.
        state = jnp.swapaxes(state, 2, 3)
        state = padded(padded(state, 2, plan.V), 3, plan.K)
    return KernelInputs(
        q=_tokens_view(plan, inputs.q, plan.K),
        k=_tokens_view(plan, inputs.k, plan.K),
        v=_tokens_view(plan, inputs.v, plan.V),
        decay=_logs_view(plan, inputs),
        starts=starts,
        bonus=bonus,
        state=state,
    )


def _tokens_view(plan: Plan, x: Array, D: int) -> Array:
    """[B, T, heads, d] -> [B, plan.T, heads * D]."""
    # Padded channels are 0: they add nothing to scores, and states there stay 0.
    x = padded(padded(x, 1, plan.T), 3, D)
    return x.reshape(x.shape[0], plan.T, -1)


def _logs_view(plan: Plan, inputs: ScanInputs) -> Array | None:
    """[B, plan.T, H*K] for vector decays, float32 [B or 1, H, plan.T] for scalar ones."""
    log_decay = inputs.log_decay
    if plan.decay == "none":
        return None
    if log_decay is None:
        # Segments alone.
        zeros = jnp.zeros((1, *inputs.q.shape[1:3]))
        log_decay = varying_like(zeros, inputs.q)
    if plan.decay == "vector":
        return _tokens_view(plan, log_decay, plan.K)
    # Tokens along lanes: one row of C for each chunk of each head.
    heads_first = jnp.swapaxes(log_decay, 1, 2).astype(jnp.float32)
    return padded(heads_first, 2, plan.T)


def _kernel_inputs(plan: Plan, x: KernelInputs) -> KernelInputs:
    """Scalar decays become running sums of logs in a chunk; these and starts are split into chunks.

    They are the inputs that run along lanes, where a block may not end inside the array. Beside q
    they are small.
    """
    length = round_up(plan.T, _longest_step(plan))

    def split_into_chunks(rows: Array) -> Array:
        """[B, heads, T] -> [B, heads, N, C]."""
        rows = padded(rows, 2, length)
        return rows.reshape(*rows.shape[:2], -1, plan.chunk)

    starts = x.starts
    if starts is not None:
        starts = split_into_chunks(starts)
    if plan.decay != "scalar":
        if starts is not None:
            # [B, 1, N, C] -> [B, N, 1, C]: a row of C for each chunk.
            starts = jnp.swapaxes(starts, 1, 2)
        return x._replace(starts=starts)

    assert x.decay is not None
    log_decay = jnp.maximum(split_into_chunks(x.decay), tile.LOG_ZERO)
    log_read = log_decay if plan.inclusive else jnp.zeros_like(log_decay)
    if starts is not None:
        # Logs that are NaN or +inf stay what they are: the state must show them.
        is_good = nonfinite.is_good_log(log_decay)
        is_start = starts > 0
        log_decay = jnp.where(is_start & is_good, tile.LOG_ZERO, log_decay)
        log_read = jnp.where(is_start & is_good, tile.LOG_ZERO, log_read)
    at_reads, at_ends = tile.running_sums(
        log_decay,
        log_read,
        plan.reverse,
    )
    # Inclusive reads see the sums that the state does.
    sums = at_ends if plan.inclusive else jnp.concatenate([at_ends, at_reads])
    # [R, B, H, N, C] -> [B, H, N, R, C]. The starts are in the sums now.
    return x._replace(decay=jnp.moveaxis(sums, 0, 3), starts=None)


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, x: KernelInputs) -> tuple[Array, Array | None]:
    """(o [B, T, H*V], final state [B, H, V, K]), of `_views`."""
    out = _run_forward(plan, x, save=False)
    return out["o"], out.get("final")


def _run_forward(plan: Plan, x: KernelInputs, save: bool) -> dict[str, Array]:
    """As the forward kernel, with spoiled rows of "o" and "final" computed again."""
    out = forward_kernel.forward(plan, _kernel_inputs(plan, x), save)
    out["o"], final_state = outputs_again(
        plan,
        x,
        out["check"],
        out["o"],
        out.get("final"),
    )
    if final_state is not None:
        out["final"] = final_state
    return out


def _forward(plan: Plan, x: KernelInputs):
    run = partial(_run_forward, plan, save=True)
    out = once("linear_scan", run, x)
    outputs = (checkpoint_name(out["o"], OUT_NAME), out.get("final"))
    # What is saved of rows that were computed again is the kernel's: of no use.
    saved = Saved(out["states"], out.get("scores"), out["check"])
    return outputs, (x, checkpoint_name(saved, STATES_NAME))


def _backward(plan: Plan, residuals, cotangents) -> tuple[KernelInputs]:
    run = partial(_run_backward, plan)
    return (once("linear_scan", run, *residuals, *cotangents),)


def _run_backward(
    plan: Plan,
    x: KernelInputs,
    saved: Saved,
    do: Array,
    dfinal: Array | None,
) -> KernelInputs:
    """The gradients of `_views`."""
    out = backward_kernel.backward(
        plan,
        _kernel_inputs(plan, x),
        saved,
        do,
        dfinal,
    )
    ddecay = out.get("ddecay")
    if plan.decay == "scalar":
        # [B, H, N, 1, C] -> [B, H, T]
        ddecay = out["ddecay"].reshape(do.shape[0], plan.H, -1)[:, :, : plan.T]
    # Blocks of query heads that share a head left one part each.
    dx = KernelInputs(
        q=out["dq"],
        k=sum_of_parts(out["dk"], x.k, plan.Hk),
        v=sum_of_parts(out["dv"], x.v, plan.Hv),
        decay=ddecay,
        starts=None,
        bonus=out.get("dbonus"),
        state=out.get("dinitial"),
    )
    dx = gradients_again(
        plan,
        x,
        saved.check + out["check"],
        do,
        dfinal,
        dx,
    )

    # One part for each row, of what all rows share.
    if dx.bonus is not None:
        assert x.bonus is not None
        dx = dx._replace(bonus=dx.bonus.sum(0).astype(x.bonus.dtype))
    if dx.decay is not None:
        assert x.decay is not None
        if x.decay.shape[0] != dx.decay.shape[0]:
            dx = dx._replace(decay=dx.decay.sum(0, keepdims=True))
    return dx


_scan.defvjp(_forward, _backward)


def sum_of_parts(parts: Array, x: Array, num_heads: int) -> Array:
    """Shared heads: [B, T, heads * parts * D] float32 -> [B, T, heads * D] in x's dtype."""
    if parts.shape == x.shape:
        return parts
    B, T, width = x.shape
    # The parts of one head are next to each other: [..., heads, parts, D].
    parts = parts.reshape(B, T, num_heads, -1, width // num_heads)
    return parts.sum(3).reshape(x.shape).astype(x.dtype)
