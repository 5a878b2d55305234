"""`attention` on Hopper GPUs by Mosaic GPU: padding, what NaN does, the derivative.

    forward   `forward.py`: the output gate is its last step
    backward  the xla backend's, from the output and the log-sum-exp that the kernel has saved

The kernel multiplies what a query may not see by a weight of 0, and 0 times NaN is NaN. Such a sum
stays NaN, so y tells: where it is not finite, the xla backend computes the call again, which
selects. Finite results cost one look at y.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import xla
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions, Outputs
from kernels_pallas.attention.kernels import (
    ForwardResult,
    gate_for_kernel,
    gate_kind,
    over_mesh,
    padded_tokens,
)
from kernels_pallas.attention.mosaic_gpu.forward import forward
from kernels_pallas.attention.mosaic_gpu.plan import (
    BLOCK_Q,
    TUNED,
    KernelInputs,
    Plan,
    padded_channels,
)
from kernels_pallas.attention.xla import Saved
from kernels_pallas.common.finite import any_nonfinite, if_bad
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import round_up
from kernels_pallas.common.second_order import kept


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> Outputs:
    """As `api.attention`, with every default filled in. Any T."""

    def attend(part: AttentionInputs) -> Array:
        return _attention(_plan(part, options, interpret), part)

    return over_mesh(attend, inputs)


def _plan(
    inputs: AttentionInputs,
    options: AttentionOptions,
    interpret: bool,
) -> Plan:
    """The static arguments of the rows and heads of one device."""
    _, T, H, K = inputs.q.shape
    Hk = inputs.k.shape[2]
    V = inputs.v.shape[3]
    D = padded_channels(max(K, V))
    config = TUNED[D]
    return Plan(
        options=options,
        T=T,
        # Whole blocks of queries and of keys: both are powers of two.
        length=round_up(T, max(BLOCK_Q, config.block_k)),
        H=H,
        Hk=Hk,
        D=D,
        gate=gate_kind(inputs.gate_logits),
        dtype=jnp.dtype(inputs.q.dtype),
        config=config,
        interpret=interpret,
    )


def _run(plan: Plan, inputs: AttentionInputs, save: bool) -> ForwardResult:
    """The kernel's results, of tokens and channels without padding."""
    kernel_inputs = KernelInputs(
        q=padded_tokens(inputs.q, plan.length, plan.D),
        k=padded_tokens(inputs.k, plan.length, plan.D),
        v=padded_tokens(inputs.v, plan.length, plan.D),
        gate_logits=gate_for_kernel(inputs.gate_logits, plan.length, plan.D),
    )
    result = forward(plan, kernel_inputs, save)
    # `plgpu.kernel` forgets over which mesh axes its results vary.
    result = jax.tree.map(lambda x: varying_like(x, inputs.q), result)
    V = inputs.v.shape[3]
    return ForwardResult(
        y=result.y[:, : plan.T, :, :V],
        outputs={n: o[:, : plan.T, :, :V] for n, o in result.outputs.items()},
        statistics=[x[:, :, : plan.T] for x in result.statistics],
    )


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: AttentionInputs) -> Array:
    """y [B, T, H, V]."""
    y = _run(plan, inputs, save=False).y

    def by_xla(inputs: AttentionInputs) -> Array:
        # The log-sum-exp is not asked for.
        result = xla.attention(inputs, plan.options)
        assert isinstance(result, Array)
        return result

    return if_bad(any_nonfinite(y), by_xla, y, inputs)


def _forward(plan: Plan, inputs: AttentionInputs) -> tuple[Array, tuple[AttentionInputs, Saved]]:
    saved = _saving(plan, inputs)
    # A checkpoint policy that keeps these names runs no kernel again.
    named = Saved(
        y=checkpoint_name(saved.y, xla.OUT_NAME),
        output=checkpoint_name(saved.output, xla.OUT_NAME),
        statistic=checkpoint_name(saved.statistic, xla.STATISTIC_NAME),
    )
    return named.y, (inputs, named)


def _backward(
    plan: Plan,
    residuals: tuple[AttentionInputs, Saved],
    dy: Array,
) -> tuple[AttentionInputs]:
    inputs, saved = residuals
    return (xla.gradient(inputs, plan.options, saved, dy),)


_attention.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _saving(plan: Plan, inputs: AttentionInputs) -> Saved:
    """y and what the backward pass needs.

    Second derivatives differentiate the forward pass of the first ones, so this has a derivative
    too, as `_saving` of the xla backend.
    """
    result = _run(plan, inputs, save=True)
    # [B, H, T] -> [B, T, H]
    statistic = jnp.swapaxes(result.statistics[0], 1, 2)
    saved = Saved(result.y, result.outputs[0], statistic)
    by_xla = partial(xla.attention_saving, options=plan.options)
    return if_bad(any_nonfinite(saved.y), by_xla, saved, inputs)


def _saving_forward(
    plan: Plan,
    inputs: AttentionInputs,
) -> tuple[Saved, tuple[AttentionInputs, Saved]]:
    saved = _saving(plan, inputs)
    return saved, (kept(inputs), saved)


def _saving_backward(
    plan: Plan,
    residuals: tuple[AttentionInputs, Saved],
    cotangents: Saved,
) -> tuple[AttentionInputs]:
    return _backward(plan, residuals, cotangents.y)


_saving.defvjp(_saving_forward, _saving_backward)
