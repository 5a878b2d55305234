"""`attention` on TPU (Pallas, Mosaic): what the kernels cover, their views, the derivative.

One kernel each way, which computes each tile once: `forward.py`, `backward.py`; under a block mask
those of `block_mask.py`. How logits become
weights is in `normalizers/base.py`, the mathematics of a tile in `tile.py`, block sizes in
`tuning.py`; `attention/kernels.py` says what is saved for the backward pass. The output gate is the
forward kernel's last step and the backward kernel's first.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in
several passes. With bfloat16 inputs a matmul is one pass and rounds weights and the gradients of
logits, as every flash kernel does. Under `jax.default_matmul_precision("highest")` they too keep
their bits; and in interpret mode, which rounds nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention import reference
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions, Outputs
from kernels_pallas.attention.kernels import (
    ForwardResult,
    Residuals,
    gate_kind,
    over_mesh,
    residuals,
    unsupported_arrays,
)
from kernels_pallas.attention.tpu import block_mask
from kernels_pallas.attention.tpu.backward import backward
from kernels_pallas.attention.tpu.forward import forward
from kernels_pallas.attention.tpu.plan import LANES, KernelInputs, KernelOutputs, Plan
from kernels_pallas.attention.tpu.tile import off_tpu, on_tpu
from kernels_pallas.attention.tpu.tuning import MAX_D, schedules
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.precision import one_bfloat16_pass
from kernels_pallas.common.second_order import differentiable_gradient, kept
from kernels_pallas.common.tpu import Interpret, interpret_params, without_float16


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    refusal = unsupported_arrays(
        inputs.q,
        inputs.k,
        inputs.v,
        options.normalizer,
        MAX_D,
    )
    if refusal is None and inputs.block_mask is not None:
        refusal = block_mask.unsupported(inputs, options)
    return refusal


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    interpret: Interpret = False,
) -> Outputs:
    """As `api.attention`, with every default filled in. Any T, any S."""

    def attend(part: AttentionInputs) -> Outputs:
        return _attend(part, options, interpret)

    return over_mesh(attend, inputs)


def _attend(
    inputs: AttentionInputs,
    options: AttentionOptions,
    interpret: Interpret,
) -> Outputs:
    """y [B, T, H, V] of the rows and heads of one device; with `return_lse` lse [B, H, T] too."""
    if inputs.block_mask is not None:
        return block_mask.attention(inputs, options, interpret)
    B, T, H, _ = inputs.q.shape
    V = inputs.v.shape[3]
    plan = make_plan(inputs, options, interpret)
    result = _attention(plan, kernel_inputs(plan, inputs))
    y, lse = result if isinstance(result, tuple) else (result, None)
    y = y.reshape(
        B,
        T,
        H,
        plan.V,
    )
    # Without the channels of padding.
    y = y[..., :V].astype(inputs.v.dtype)
    return y if lse is None else (y, lse[:, :, 0])


def make_plan(
    inputs: AttentionInputs,
    options: AttentionOptions,
    interpret: Interpret,
) -> Plan:
    """The static arguments of the kernels for a call."""
    _, T, H, K = inputs.q.shape
    S = inputs.k.shape[1]
    num_keys = None if S == T else S
    V = inputs.v.shape[3]
    q = without_float16(inputs.q)
    k = without_float16(inputs.k)
    v = without_float16(inputs.v)
    # A block is a range of columns, which must begin and end at whole registers.
    padded_K = round_up(K, LANES)
    padded_V = round_up(V, LANES)
    return Plan(
        normalizer=on_tpu(options.normalizer),
        causal=options.causal,
        window=options.window,
        logits_soft_cap=options.logits_soft_cap,
        scale=options.scale,
        T=T,
        H=H,
        Hk=inputs.k.shape[2],
        K=padded_K,
        V=padded_V,
        gate=gate_kind(inputs.gate_logits),
        segments=inputs.segment_ids is not None,
        slopes=inputs.alibi_slopes is not None,
        rounds=_rounds(interpret, q, k, v),
        out_dtype=jnp.dtype(v.dtype),
        interpret=interpret_params(interpret, q),
        num_keys=num_keys,
        may_see_nothing=not inputs.sees_itself and _is_masked(inputs, options),
        return_lse=options.return_lse,
        **schedules(T, padded_K, padded_V, options.window, num_keys),
    )


def kernel_inputs(plan: Plan, inputs: AttentionInputs) -> KernelInputs:
    """The arrays of a call as the kernels take them."""
    return KernelInputs(
        q=_heads_as_columns(without_float16(inputs.q), plan.K),
        k=_heads_as_columns(without_float16(inputs.k), plan.K),
        v=_heads_as_columns(without_float16(inputs.v), plan.V),
        gate_logits=_gate_for_kernel(plan, inputs.gate_logits),
        sink_logits=_as_float32(inputs.sink_logits),
        alibi_slopes=_as_float32(inputs.alibi_slopes),
        segment_ids=_along_lanes(inputs.segment_ids),
        key_segment_ids=_along_lanes(inputs.key_segment_ids),
    )


def _is_masked(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether anything hides keys of another sequence."""
    return options.window is not None or inputs.segment_ids is not None


def _along_lanes(segment_ids: Array | None) -> Array | None:
    """[B, 1, T]: tokens along lanes, as every number by token."""
    return None if segment_ids is None else segment_ids[:, None].astype(jnp.int32)


def _as_float32(x: Array | None) -> Array | None:
    return None if x is None else x.astype(jnp.float32)


def _heads_as_columns(x: Array, width: int) -> Array:
    """[B, T, heads, D] -> [B, T, heads * width], the channels of every head padded with zeros."""
    B, T, _, _ = x.shape
    return padded(x, 3, width).reshape(
        B,
        T,
        -1,
    )


def _gate_for_kernel(plan: Plan, gate_logits: Array | None) -> Array | None:
    """[B, T, H*V], or for a gate by head [B, H, 1, T]: tokens along lanes."""
    if gate_logits is None:
        return None
    if plan.gate == "element":
        return _heads_as_columns(without_float16(gate_logits), plan.V)
    B, T, H, _ = gate_logits.shape
    # [B, T, H, 1] -> [B, H, 1, T]
    by_head = jnp.swapaxes(gate_logits, 1, 2).reshape(
        B,
        H,
        1,
        T,
    )
    return by_head.astype(jnp.float32)


def _rounds(interpret: Interpret, *arrays: Array) -> bool:
    """Whether matmuls are one pass of bfloat16."""
    # The interpreter rounds nothing, so that tests can compare with the reference closely.
    return not interpret and one_bfloat16_pass(*arrays)


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: KernelInputs) -> KernelOutputs:
    """y [B, T, H*V]; with `return_lse` (y, lse), lse [B, H, 1, T]."""
    return _results(plan, forward(plan, inputs, save=False))


def _results(plan: Plan, result: ForwardResult) -> KernelOutputs:
    # What softmax saves of a row is its log-sum-exp.
    return (result.y, result.statistics[0]) if plan.return_lse else result.y


def _forward(plan: Plan, inputs: KernelInputs) -> tuple[KernelOutputs, Residuals]:
    result = _saving(plan, inputs)
    y, saved = residuals(result, inputs, plan.normalizer)
    return _results(plan, result._replace(y=y, statistics=saved.statistics)), saved


def _backward(plan: Plan, saved: Residuals, dy: KernelOutputs) -> tuple[KernelInputs]:
    gradients = differentiable_gradient(
        partial(backward, plan),
        partial(_plain, plan),
        saved,
        saved.inputs,
        dy,
    )
    return (gradients,)


def _plain(plan: Plan, inputs: KernelInputs) -> KernelOutputs:
    """`_attention` for second derivatives."""
    B = inputs.q.shape[0]
    gate_logits = inputs.gate_logits
    if gate_logits is not None and plan.gate == "element":
        gate_logits = columns_as_heads(gate_logits, plan.V)
    elif gate_logits is not None:
        # [B, H, 1, T] -> [B, T, H, 1]
        gate_logits = jnp.moveaxis(gate_logits, 3, 1)
    segment_ids = inputs.segment_ids
    key_segment_ids = inputs.key_segment_ids
    result = reference.attention_by_blocks(
        AttentionInputs(
            q=columns_as_heads(inputs.q, plan.K),
            k=columns_as_heads(inputs.k, plan.K),
            v=columns_as_heads(inputs.v, plan.V),
            gate_logits=gate_logits,
            sink_logits=inputs.sink_logits,
            alibi_slopes=inputs.alibi_slopes,
            segment_ids=None if segment_ids is None else segment_ids[:, 0],
            key_segment_ids=None if key_segment_ids is None else key_segment_ids[:, 0],
        ),
        AttentionOptions(
            normalizer=off_tpu(plan.normalizer),
            causal=plan.causal,
            window=plan.window,
            logits_soft_cap=plan.logits_soft_cap,
            scale=plan.scale,
            return_lse=plan.return_lse,
        ),
    )
    y, lse = result if isinstance(result, tuple) else (result, None)
    y = y.reshape(
        B,
        plan.T,
        -1,
    )
    return y if lse is None else (y, lse[:, :, None])


def columns_as_heads(x: Array, width: int) -> Array:
    """[B, T, heads * width] -> [B, T, heads, width]."""
    B, T, _ = x.shape
    return x.reshape(
        B,
        T,
        -1,
        width,
    )


_attention.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _saving(plan: Plan, inputs: KernelInputs) -> ForwardResult:
    """y and what the backward pass needs.

    Second derivatives differentiate the forward pass of the first ones, so this has a derivative
    too: that of y. The rest depends on the inputs as well, but `differentiable_gradient` counts
    that as the inputs' own.
    """
    return forward(plan, inputs, save=True)


def _saving_forward(plan: Plan, inputs: KernelInputs) -> tuple[ForwardResult, Residuals]:
    result = _saving(plan, inputs)
    _, saved = residuals(result, kept(inputs), plan.normalizer)
    return result, saved


def _saving_backward(
    plan: Plan,
    saved: Residuals,
    cotangents: ForwardResult,
) -> tuple[KernelInputs]:
    return _backward(plan, saved, _results(plan, cotangents))


_saving.defvjp(_saving_forward, _saving_backward)
