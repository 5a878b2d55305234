"""What `delta_scan` on GPU falls back on where something is not finite: the recurrence itself.

Token by token, NaN and Inf reach the tokens that see them and no other. Its time does not matter.
Its memory and the size of its program do: every program with the op has it beside the kernels. So
the rows of the batch go one by one, and the backward pass keeps the states before blocks of tokens,
and those inside of one block at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.rows import row_by_row
from kernels_pallas.delta_scan.gpu.plan import Inputs, Plan
from kernels_pallas.delta_scan.inputs import DeltaStepOptions
from kernels_pallas.delta_scan.reference import recurrence_in_blocks


def outputs(
    plan: Plan,
    x: Inputs,
) -> tuple[Array, Array | None]:
    """(o, final state or None), as the kernels return them."""
    o, final_state = _scan(plan, x)
    return o, final_state if plan.return_final_state else None


def gradients(
    plan: Plan,
    x: Inputs,
    cotangents: tuple[Array, Array | None],
) -> Inputs:
    """The cotangents of the inputs for those of `outputs`."""
    do, dfinal = cotangents

    def run(floats: Inputs) -> tuple[Array, Array]:
        return _scan(plan, floats._replace(starts=x.starts))

    # Starts take no part in the derivative.
    (_, final_state), vjp = jax.vjp(run, x._replace(starts=None))
    if dfinal is None:
        dfinal = jnp.zeros_like(final_state)
    (found,) = vjp((do, dfinal))
    starts = None if x.starts is None else jnp.zeros_like(x.starts)
    return found._replace(starts=starts)


def _scan(plan: Plan, x: Inputs) -> tuple[Array, Array]:
    """(o, final state)."""
    state = x.state
    if state is None:
        zeros = jnp.zeros((x.q.shape[0], plan.H, plan.K, plan.V), jnp.float32)
        state = varying_like(zeros, x.q)

    # A row at a time: its states are what takes the memory.
    return row_by_row(jax.checkpoint(partial(_scan_rows, plan)), x._replace(state=state))


def _scan_rows(plan: Plan, x: Inputs) -> tuple[Array, Array]:
    """(o, final state) of some rows of the batch."""
    options = DeltaStepOptions(scale=plan.scale, l2_norm=plan.l2_norm)

    def tokens_first(rows: Array | None) -> Array | None:
        """[B, H, T] -> [B, T, H]."""
        return None if rows is None else jnp.swapaxes(rows, 1, 2)

    logs = x.logs if plan.decay == "vector" else tokens_first(x.logs)
    # In the order of `DeltaStepInputs`.
    arrays = (x.q, x.k, x.v, tokens_first(x.beta), logs, x.erase, x.write)
    # 1 where the state is reset.
    starts = None if x.starts is None else x.starts > 0
    assert x.state is not None
    o, final_state = recurrence_in_blocks(arrays, starts, x.state, options, plan.chunk)
    return o.astype(plan.out_dtype), final_state
