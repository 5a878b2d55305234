"""`attention` on GPU (Pallas, Triton): what the kernels cover, padding, the derivative.

    forward   `forward.py`: the output gate is its last step
    by rows   here, in XLA: the gate's gradient, do, sum(do o), everything that needs no keys
    dq        `backward.py`
    dk, dv    `backward.py`
    decoding  `step.py`

`attention/kernels.py` says what is saved for the backward pass, `matmuls.py` how matrices are
multiplied. Head sizes are padded to powers of two, T to whole blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.attention.gpu import backward
from kernels_pallas.attention.gpu.backward import RowGradients
from kernels_pallas.attention.gpu.exponentials import exponentials, in_unit
from kernels_pallas.attention.gpu.forward import forward
from kernels_pallas.attention.gpu.matmuls import EXACT, matmuls, operands
from kernels_pallas.attention.gpu.plan import KernelInputs, Plan, unsupported_by_kernels
from kernels_pallas.attention.gpu.tuning import Schedule, largest, padded_channels, schedule
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions, Outputs
from kernels_pallas.attention.kernels import (
    Residuals,
    gate_for_kernel,
    gate_kind,
    over_mesh,
    padded_tokens,
    residuals,
    unsupported_other_keys,
)
from kernels_pallas.common.padding import padded, round_up


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call of `attention`, or None when it can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    refusal = unsupported_other_keys(inputs, options)
    if refusal is None:
        refusal = unsupported_by_kernels(q, k, v, options.normalizer)
    if refusal is not None:
        return refusal
    most = largest(matmuls(q, k, v))
    K = q.shape[-1]
    V = v.shape[-1]
    if max(K, V) > most:
        return f"takes K and V of {q.dtype} up to {most}, not {K} and {V}"
    return None


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> Outputs:
    """As `api.attention`, with every default filled in. Any T."""

    def attend(part: AttentionInputs) -> Array:
        return _attend(part, options, interpret)

    return over_mesh(attend, inputs)


def _attend(inputs: AttentionInputs, options: AttentionOptions, interpret: bool) -> Array:
    """y [B, T, H, V] of the rows and heads of one device."""
    _, T, H, K = inputs.q.shape
    Hk = inputs.k.shape[2]
    V = inputs.v.shape[3]
    padded_K = padded_channels(K)
    padded_V = padded_channels(V)
    kind = matmuls(inputs.q, inputs.k, inputs.v)
    operand, precision = operands(interpret, kind)
    kernel_schedule = schedule(
        padded_K,
        padded_V,
        kind,
        options.normalizer.sums,
        T,
    )
    taken = exponentials(options.normalizer, exact=kind == EXACT, interpret=interpret)
    plan = Plan(
        normalizer=taken.in_kernel,
        normalizer_around=taken.around,
        causal=options.causal,
        window=options.window,
        logits_soft_cap=in_unit(options.logits_soft_cap, taken.unit),
        scale=options.scale,
        unit=taken.unit,
        T=T,
        length=_padded_length(T, kernel_schedule),
        H=H,
        Hk=Hk,
        K=padded_K,
        V=padded_V,
        gate=gate_kind(inputs.gate_logits),
        segments=inputs.segment_ids is not None,
        slopes=inputs.alibi_slopes is not None,
        operand=operand,
        precision=precision,
        out_dtype=jnp.dtype(inputs.v.dtype),
        schedule=kernel_schedule,
        interpret=interpret,
    )
    segment_ids = inputs.segment_ids
    if segment_ids is not None:
        # Padding with the last id does not widen the bounds of the last block.
        segment_ids = segment_ids.astype(jnp.int32)
        segment_ids = padded(segment_ids, 1, plan.length, mode="edge")
    kernel_inputs = KernelInputs(
        q=padded_tokens(inputs.q, plan.length, padded_K),
        k=padded_tokens(inputs.k, plan.length, padded_K),
        v=padded_tokens(inputs.v, plan.length, padded_V),
        gate_logits=gate_for_kernel(inputs.gate_logits, plan.length, padded_V),
        sink_logits=as_float32(inputs.sink_logits),
        alibi_slopes=as_float32(inputs.alibi_slopes),
        segment_ids=segment_ids,
    )
    # Without the tokens and channels of padding.
    y = _attention(plan, kernel_inputs)
    return y[:, :T, :, :V]


def _padded_length(T: int, kernel_schedule: Schedule) -> int:
    """T in whole blocks of every kernel: block sizes are powers of two, so of the largest."""
    largest_block = 0
    for config in kernel_schedule:
        if config is not None:
            largest_block = max(largest_block, config.block_q, config.block_k)
    return round_up(T, largest_block)


def as_float32(x: Array | None) -> Array | None:
    """In float32; None stays."""
    return None if x is None else x.astype(jnp.float32)


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: KernelInputs) -> Array:
    """y [B, T, H, V]."""
    return forward(plan, inputs, save=False).y


def _forward(plan: Plan, inputs: KernelInputs) -> tuple[Array, Residuals]:
    result = forward(plan, inputs, save=True)
    return residuals(result, inputs, plan.normalizer)


def _backward(plan: Plan, saved: Residuals, dy: Array) -> tuple[KernelInputs]:
    inputs: KernelInputs = saved.inputs
    do, deltas, dgate = _gradients_by_row(
        plan,
        inputs.gate_logits,
        saved.outputs,
        dy,
    )
    rows = RowGradients(do, deltas, saved.statistics)
    dq, dslopes_by_row = backward.dq(plan, inputs, rows)
    dk, dv = backward.dkv(plan, inputs, rows)
    # A sink has no keys, so its gradient needs rows alone.
    dsinks = None
    if inputs.sink_logits is not None:
        # [1, H, 1] against the rows' [B, H, T].
        sinks = plan.unit * inputs.sink_logits[None, :, None]
        by_row = plan.normalizer_around.sink_gradient(
            sinks,
            deltas,
            tuple(saved.statistics),
        )
        dsinks = by_row.sum((0, 2))
    dslopes = None
    if dslopes_by_row is not None:
        dslopes = dslopes_by_row.sum((0, 2))
    gradients = KernelInputs(
        q=dq,
        k=dk,
        v=dv,
        gate_logits=dgate,
        sink_logits=dsinks,
        alibi_slopes=dslopes,
        segment_ids=None,
    )
    return (gradients,)


_attention.defvjp(_forward, _backward)


def _gradients_by_row(
    plan: Plan,
    gate_logits: Array | None,
    outputs: dict[int, Array],
    dy: Array,
) -> tuple[Array, list[Array], Array | None]:
    """What depends on rows alone.

    y = o sigmoid(gate), so dgate = dy o sigmoid'(gate): nothing is divided by a gate that may be 0.

    Args:
      plan: the static arguments.
      gate_logits: as the kernel takes them.
      outputs: of the normalizer, by number, [B, T, H, V].
      dy: the gradient of y, [B, T, H, V].

    Returns:
      do, the gradient of the ungated output; sum(do * output) for each output in
      `Normalizer.deltas`, [B, H, T]; the gradient of gate_logits, or None.
    """
    do = dy
    dy = dy.astype(jnp.float32)
    # do in float32, but with the values that the kernels multiply.
    rounded_do = dy
    dgate = None
    if gate_logits is not None:
        gate = jax.nn.sigmoid(gate_logits.astype(jnp.float32))
        # sigmoid' = sigmoid (1 - sigmoid)
        slope = gate * (1 - gate)
        if plan.gate == "head":
            # [B, T, H] -> [B, H, T], the layout of the kernel's gate.
            products = jnp.sum(dy * outputs[0], axis=3)
            dgate = jnp.swapaxes(products, 1, 2) * slope
            # [B, H, T] -> [B, T, H, 1]
            gate = jnp.swapaxes(gate, 1, 2)[..., None]
        else:
            dgate = (dy * outputs[0] * slope).astype(gate_logits.dtype)
        rounded_do = dy * gate
        # Once here, instead of in every tile that multiplies it.
        do = rounded_do.astype(plan.operand)
    if do.dtype == jnp.bfloat16:
        # The deltas are of do as the tensor core will see it. Otherwise dp - delta, which is small
        # by cancellation, would have the error of the rounding. XLA may leave out a conversion to
        # bfloat16 and back, but not this.
        rounded_do = lax.reduce_precision(rounded_do, exponent_bits=8, mantissa_bits=7)
    deltas = []
    for n in plan.normalizer.deltas:
        # [B, T, H] -> [B, H, T], the layout of statistics.
        delta = jnp.sum(rounded_do * outputs[n], axis=3)
        deltas.append(jnp.swapaxes(delta, 1, 2))
    return do, deltas, dgate
