"""`delta_scan` on TPU (Pallas, Mosaic): what the kernels cover, views, padding, derivative.

One kernel each way (`forward.py`, `backward.py`), each moving every input and output once. The
mathematics is in `tile.py`, `scalar_decay.py` and `vector_decay.py`, block sizes in `tuning.py`.
Saved for the backward pass: the inputs, and the state before each chunk.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in
several passes. With bfloat16 inputs a matmul is one pass and rounds its operands, except for the
inverse of the triangular system: see `tile.py`. They keep their bits too under
`jax.default_matmul_precision("highest")`, and in interpret mode, which rounds nothing.

The kernels multiply by masks and decays of 0, which lets a NaN through into other documents and to
earlier tokens. Whatever is not finite stays in the state, so they look at the last state, and a
call that finds something there is computed once more by the XLA path, which knows who may see it.
"""

from functools import partial
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.common.finite import any_counted
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded, power_of_two, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.rows import row_by_row
from kernels_pallas.common.tpu import LANES, interpret_params, without_float16
from kernels_pallas.common.two_paths import Paths, Scanned, with_careful_path
from kernels_pallas.delta_scan import xla
from kernels_pallas.delta_scan.inputs import DeltaInputs, DeltaOptions
from kernels_pallas.delta_scan.tpu import backward as backward_kernel
from kernels_pallas.delta_scan.tpu import forward as forward_kernel
from kernels_pallas.delta_scan.tpu.plan import KernelInputs, Plan, Saved
from kernels_pallas.delta_scan.tpu.tuning import MAX_CHUNK, MAX_K, MAX_V, MIN_CHUNK, schedules
from kernels_pallas.delta_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.linear_scan import tile as scan_tile
from kernels_pallas.linear_scan.inputs import decay_kind
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.tpu.op import sum_of_parts

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
    return None


def delta_scan(
    inputs: DeltaInputs,
    options: DeltaOptions,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """As `api.delta_scan`: returns (o, final state), None for a state that is not asked for."""
    out_dtype = inputs.v.dtype
    B, T, H, V = inputs.v.shape
    K = inputs.q.shape[-1]
    inputs = jax.tree.map(without_float16, inputs)
    plan = _plan(inputs, options, interpret)

    # The derivative is that of the padded views; reshapes and padding are XLA's.
    o, final_state = _scan(plan, _views(plan, inputs))
    # Drop the padding of T and of channels.
    o = o.reshape(B, plan.T, H, plan.V)[:, :T, :, :V]
    if final_state is not None:
        # [V, K] in the kernels, [K, V] outside.
        final_state = jnp.swapaxes(final_state[:, :, :V, :K], 2, 3)
    return o.astype(out_dtype), final_state


# --- the static arguments


def _plan(inputs: DeltaInputs, options: DeltaOptions, interpret: bool) -> Plan:
    _, T, H, V = inputs.v.shape
    Hq, K = inputs.q.shape[2:]
    Hk = inputs.k.shape[2]
    # Channels fill whole registers.
    K = round_up(K, LANES)
    V = round_up(V, LANES)
    decay = decay_kind(inputs.log_decay, inputs.segment_ids)
    rows = [] if inputs.beta is None else ["beta"]
    if decay == "scalar":
        rows += ["coarse", "fine"]
    elif inputs.segment_ids is not None:
        rows.append("start")
    # A chunk is a power of two, and not much longer than T.
    chunk = min(options.chunk_size or MAX_CHUNK, max(MIN_CHUNK, power_of_two(T)))
    # Interpreted matmuls round nothing.
    rounds = not interpret and one_bfloat16_pass(inputs.q, inputs.k, inputs.v)
    forward, backward = schedules(
        decay,
        T,
        H,
        Hq,
        Hk,
        K,
        V,
        chunk,
        rounds,
    )
    # A block must not be longer than the array: this matters for the shortest T only.
    longest_step = chunk * max(forward.chunks, backward.chunks)
    return Plan(
        T=max(T, longest_step),
        H=H,
        Hq=Hq,
        Hk=Hk,
        K=K,
        V=V,
        decay=decay,
        rows=tuple(rows),
        scale=options.scale,
        l2_norm=options.l2_norm,
        chunk=chunk,
        rounds=rounds,
        out_dtype=inputs.v.dtype,
        return_final_state=options.return_final_state,
        forward=forward,
        backward=backward,
        interpret=interpret_params(interpret, inputs.q),
    )


# --- views of the arrays


class Views(NamedTuple):
    """What the derivative is taken of: the arrays of a call, padded.

    Attributes:
      decay: logs of any kind of decay, whole registers for vector ones.
      starts: 1 where a document starts, else 0.
    """

    q: Float[Array, "B T Hq*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T H*V"]
    beta: Float[Array, "B T H"] | None
    decay: Float[Array, "B T H*K"] | Float[Array, "B T H"] | None
    erase: Float[Array, "B T H*K"] | None
    write: Float[Array, "B T H*V"] | None
    starts: Float[Array, "B T"] | None
    state: Float[Array, "B H V K"] | None


def _views(plan: Plan, inputs: DeltaInputs) -> Views:
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids, reverse=False)
        # Padding does not start documents.
        starts = padded(starts, 1, plan.T).astype(jnp.float32)
    state = inputs.initial_state
    if state is not None:
        # Transposed, so that a decay of the keys is a row in the kernels.
        state = jnp.swapaxes(state, 2, 3)
        state = padded(padded(state, 2, plan.V), 3, plan.K)
    return Views(
        q=_tokens_view(plan, inputs.q, plan.K),
        k=_tokens_view(plan, inputs.k, plan.K),
        v=_tokens_view(plan, inputs.v, plan.V),
        beta=_rows_view(plan, inputs.beta),
        decay=_logs_view(plan, inputs),
        erase=_tokens_view(plan, inputs.erase, plan.K),
        write=_tokens_view(plan, inputs.write, plan.V),
        starts=starts,
        state=state,
    )


@overload
def _tokens_view(plan: Plan, x: Array, D: int) -> Array: ...
@overload
def _tokens_view(plan: Plan, x: None, D: int) -> None: ...
def _tokens_view(plan: Plan, x: Array | None, D: int) -> Array | None:
    """[B, T, heads, d] -> [B, plan.T, heads * D]."""
    if x is None:
        return None
    # Padded channels are 0: they add nothing to scores, and states there stay 0. A padded token
    # erases and writes nothing and does not decay the state.
    x = padded(padded(x, 1, plan.T), 3, D)
    return x.reshape(x.shape[0], plan.T, -1)


def _rows_view(plan: Plan, x: Array | None) -> Array | None:
    """[B, T, H] -> [B, plan.T, H]."""
    if x is None:
        return None
    return padded(x.astype(jnp.float32), 1, plan.T)


def _logs_view(plan: Plan, inputs: DeltaInputs) -> Array | None:
    """The logs of the decays; segments alone have logs of 0."""
    log_decay = inputs.log_decay
    if plan.decay == "none":
        return None
    if plan.decay == "vector":
        return _tokens_view(plan, log_decay, plan.K)
    if log_decay is None:
        log_decay = varying_like(jnp.zeros(inputs.v.shape[:3]), inputs.v)
    return _rows_view(plan, log_decay)


def _kernel_inputs(plan: Plan, x: Views) -> KernelInputs:
    """Rows of C numbers for each chunk: these run along lanes, where no block may end inside."""
    longest_step = plan.chunk * max(plan.forward.chunks, plan.backward.chunks)
    length = round_up(plan.T, longest_step)

    def split_into_chunks(rows: Array) -> Array:
        """[B, T, heads] -> [B, heads, N, C]."""
        rows = jnp.swapaxes(padded(rows, 1, length), 1, 2)
        return rows.reshape(*rows.shape[:2], -1, plan.chunk)

    rows = []
    if x.beta is not None:
        rows.append(split_into_chunks(x.beta))
    if plan.decay == "scalar":
        assert x.decay is not None
        log_decay = jnp.maximum(x.decay, scan_tile.LOG_ZERO)
        if x.starts is not None:
            log_decay = jnp.where(x.starts[..., None] > 0, scan_tile.LOG_ZERO, log_decay)
        log_decay = split_into_chunks(log_decay)
        # Queries and erase keys see the state after the token's own decay.
        sums, _ = scan_tile.running_sums(log_decay, log_decay)
        rows += [sums[0], sums[1]]
    elif x.starts is not None:
        starts = split_into_chunks(x.starts[..., None])
        rows.append(jnp.broadcast_to(starts, (starts.shape[0], plan.H, *starts.shape[2:])))
    return KernelInputs(
        q=x.q,
        k=x.k,
        v=x.v,
        decay=x.decay if plan.decay == "vector" else None,
        erase=x.erase,
        write=x.write,
        rows=jnp.stack(rows, 3) if rows else None,
        state=x.state,
    )


# --- the derivative


def _forward(plan: Plan, x: Views, save: bool) -> Scanned:
    """By the kernel: o [B, T, H*V], final state [B, H, V, K]."""
    out = forward_kernel.forward(plan, _kernel_inputs(plan, x), save=save)
    # Values that are not finite reach the states.
    saved = None
    if save:
        saved = Saved(out["states"], out["inverses"], out.get("scores"))
    return Scanned(out["o"], out.get("final"), saved, any_counted(out["flags"]))


def _backward(
    plan: Plan,
    x: Views,
    saved: Saved,
    cotangents: tuple[Array, Array | None],
) -> tuple[Views, Bool[Array, ""]]:
    """The gradients of `_views` by the kernel, and whether something in them is not finite."""
    do, dfinal = cotangents
    out = backward_kernel.backward(
        plan,
        _kernel_inputs(plan, x),
        saved,
        do,
        dfinal,
    )
    # Queries and cotangents that are not finite reach dstate.
    return _gradient(plan, x, out), any_counted(out["flags"])


def _gradient(plan: Plan, x: Views, out: dict[str, Array]) -> Views:
    """The kernel's results in the shapes of the views."""

    def per_token(rows: Array | None) -> Array | None:
        """[B, H, N, 1, C] -> [B, T, H]."""
        if rows is None:
            return None
        B = rows.shape[0]
        return jnp.swapaxes(rows.reshape(B, plan.H, -1), 1, 2)[:, : plan.T]

    ddecay = out.get("ddecay")
    if plan.decay == "scalar":
        ddecay = per_token(out["dlog"])
    return Views(
        # Blocks of states that share a head left one part each.
        q=sum_of_parts(out["dq"], x.q, plan.Hq),
        k=sum_of_parts(out["dk"], x.k, plan.Hk),
        v=out["dv"],
        beta=per_token(out.get("dbeta")),
        decay=ddecay,
        erase=out.get("derase"),
        write=out.get("dwrite"),
        starts=None,
        state=out.get("dinitial"),
    )


# --- numbers that are not finite


def _by_xla(plan: Plan, x: Views) -> tuple[Array, Array | None]:
    """As `_scan`, by the XLA path, a row at a time: every program sets aside the memory for it."""
    return row_by_row(partial(_rows_by_xla, plan), x)


def _rows_by_xla(plan: Plan, x: Views) -> tuple[Array, Array | None]:
    B = x.q.shape[0]

    def heads(view: Array | None, D: int) -> Array | None:
        if view is None:
            return None
        return view.reshape(B, plan.T, -1, D)

    state = x.state
    if state is None:
        zeros = jnp.zeros((B, plan.H, plan.V, plan.K))
        state = varying_like(zeros, x.q)
    segment_ids = None
    if x.starts is not None:
        segment_ids = jnp.cumsum(x.starts.astype(jnp.int32), axis=1)
    is_vector = plan.decay == "vector"
    q = heads(x.q, plan.K)
    k = heads(x.k, plan.K)
    v = heads(x.v, plan.V)
    assert q is not None and k is not None and v is not None
    inputs = DeltaInputs(
        q=q,
        k=k,
        v=v,
        beta=x.beta,
        log_decay=heads(x.decay, plan.K) if is_vector else x.decay,
        erase=heads(x.erase, plan.K),
        write=heads(x.write, plan.V),
        initial_state=jnp.swapaxes(state, 2, 3),
        segment_ids=segment_ids,
    )
    options = DeltaOptions(
        scale=plan.scale,
        l2_norm=plan.l2_norm,
        chunk_size=None,
        return_final_state=plan.return_final_state,
    )
    o, final_state = xla.delta_scan(inputs, options)
    o = o.reshape(B, plan.T, -1).astype(plan.out_dtype)
    if not plan.return_final_state:
        return o, None
    return o, jnp.swapaxes(final_state, 2, 3)


def _gradient_by_xla(plan: Plan, x: Views, cotangents: tuple[Array, Array | None]) -> Views:
    """The cotangents of `x`, likewise."""

    def of_rows(rows: tuple[Views, tuple[Array, Array | None]]) -> Views:
        x, cotangents = rows
        starts = x.starts

        def run(floats: Views) -> tuple[Array, Array | None]:
            return _rows_by_xla(plan, floats._replace(starts=starts))

        _, vjp = jax.vjp(run, x._replace(starts=None))
        (dx,) = vjp(cotangents)
        return dx

    return row_by_row(of_rows, (x, cotangents))


_scan = with_careful_path(
    OP,
    Paths(_forward, _backward, _by_xla, _gradient_by_xla),
    OUT_NAME,
    STATES_NAME,
)
