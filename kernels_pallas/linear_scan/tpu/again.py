"""Rows that a kernel of `linear_scan` spoiled, computed once more by the XLA path.

A kernel multiplies a chunk as a whole, with zeros where a token does not see another, and 0 times
NaN is NaN. It cannot afford to look for that in every step, so it only leaves sums behind that are
not finite where anything was not ("check"). Rows of the batch with such sums are computed again by
a path where NaN and Inf reach what sees them, and nothing else (`../nonfinite.py`). The loop over
them has no turn where all is finite: it costs a look at one number, and its carry stays where it
lies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.finite import is_finite
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.linear_scan import xla
from kernels_pallas.linear_scan.group import Tokens
from kernels_pallas.linear_scan.tpu.plan import KernelInputs, Plan

# Sums of a kernel by row and block of heads, see `Grid.check`.
type Check = Float[Array, "B blocks 8 128"]


def outputs_again(
    plan: Plan,
    x: KernelInputs,
    check: Check,
    o: Float[Array, "B T H*V"],
    final_state: Float[Array, "B H V K"] | None,
) -> tuple[Array, Array | None]:
    """(o, final state) of the forward kernel, with spoiled rows computed again."""

    def outputs_of(row: Array) -> tuple[Array, Array | None]:
        return _outputs(plan, _row_of(x, row))

    return _replace_rows(check, outputs_of, (o, final_state))


def gradients_again(
    plan: Plan,
    x: KernelInputs,
    check: Check,
    do: Float[Array, "B T H*V"],
    dfinal: Float[Array, "B H V K"] | None,
    dx: KernelInputs,
) -> KernelInputs:
    """The gradients of the backward kernel, likewise.

    Args:
      plan: the static arguments.
      x: the arrays of the call, as views.
      check: the sum of what both kernels found: the saved states of spoiled rows are spoiled too.
      do, dfinal: the cotangents of o and of the final state.
      dx: the gradients, one part for each row also of what all rows share.

    Returns:
      As `dx`.
    """

    def gradients_of(row: Array) -> KernelInputs:
        _, vjp = jax.vjp(lambda x: _outputs(plan, x), _row_of(x, row))
        dfinal_of_row = None if dfinal is None else _slice(dfinal, row)
        (dx_of_row,) = vjp((_slice(do, row), dfinal_of_row))
        dbonus = dx_of_row.bonus
        if dbonus is not None:
            # [1, H*K] -> [1, 1, H*K]
            dbonus = dbonus[None]
        return dx_of_row._replace(starts=None, bonus=dbonus)

    return _replace_rows(check, gradients_of, dx)


def _replace_rows[Arrays](
    check: Check,
    compute: Callable[[Int[Array, ""]], Arrays],
    arrays: Arrays,
) -> Arrays:
    """Arrays of B rows each, with `compute(row)` in place of the rows that are spoiled."""
    num_rows = check.shape[0]

    def is_any_left(carry: tuple[Array, Array, Arrays]) -> Array:
        return carry[0]

    def replace_one(carry: tuple[Array, Array, Arrays]) -> tuple[Array, Array, Arrays]:
        _, next_row, arrays = carry
        is_spoiled = ~is_finite(jnp.sum(check, axis=(1, 2, 3)))
        is_left = is_spoiled & (jnp.arange(num_rows, dtype=jnp.int32) >= next_row)
        # The first of those that are left.
        row = jnp.argmax(is_left).astype(jnp.int32)

        def replaced(whole: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(
                whole,
                part.astype(whole.dtype),
                row,
                axis=0,
            )

        arrays = jax.tree.map(replaced, arrays, compute(row))
        return jnp.sum(is_left, dtype=jnp.int32) > 1, row + 1, arrays

    # One sum is all that is looked at where everything is finite: what a loop begins with takes
    # about a microsecond for each operation, however small.
    is_any = ~is_finite(jnp.sum(check))
    next_row = varying_like(jnp.int32(0), check)
    return jax.lax.while_loop(is_any_left, replace_one, (is_any, next_row, arrays))[2]


def _row_of(x: KernelInputs, row: Array) -> KernelInputs:
    """One row of the batch, of length 1. The bonus is that of all rows, and decays may be."""
    decay = x.decay
    if decay is not None and decay.shape[0] > 1:
        decay = _slice(decay, row)
    return KernelInputs(
        q=_slice(x.q, row),
        k=_slice(x.k, row),
        v=_slice(x.v, row),
        decay=decay,
        starts=None if x.starts is None else _slice(x.starts, row),
        bonus=x.bonus,
        state=None if x.state is None else _slice(x.state, row),
    )


def _slice(x: Array, row: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0)


def _outputs(plan: Plan, x: KernelInputs) -> tuple[Array, Array | None]:
    """What the forward kernel computes, by the XLA path."""

    def heads(x: Array, num_heads: int) -> Array:
        """[B, T, heads * D] -> [B, T, heads, D]"""
        return x.reshape(*x.shape[:2], num_heads, -1)

    log_decay = x.decay
    if log_decay is not None and plan.decay == "vector":
        log_decay = heads(log_decay, plan.H)
    elif log_decay is not None:
        # [B, H, T] -> [B, T, H]
        log_decay = jnp.swapaxes(log_decay, 1, 2)
    tokens = Tokens(
        q=heads(x.q, plan.H),
        k=heads(x.k, plan.Hk),
        v=heads(x.v, plan.Hv),
        log_decay=log_decay,
        starts=None if x.starts is None else x.starts[:, 0] > 0,
    )
    state = x.state
    if state is None:
        zeros = jnp.zeros((x.q.shape[0], plan.H, plan.V, plan.K), jnp.float32)
        state = varying_like(zeros, x.q)
    o, final_state = xla.recurrence(
        tokens,
        None if x.bonus is None else x.bonus.reshape(plan.H, plan.K),
        # [V, K] in the kernels, [K, V] outside.
        jnp.swapaxes(state, 2, 3),
        inclusive=plan.inclusive,
        scale=plan.scale,
        reverse=plan.reverse,
        chunk_size=None,
        out_dtype=plan.out_dtype,
    )
    o = o.reshape(*o.shape[:2], -1)
    if not plan.return_final_state:
        return o, None
    return o, jnp.swapaxes(final_state, 2, 3)
