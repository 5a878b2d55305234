"""What `delta_scan` on GPU falls back on where something is not finite: the recurrence itself.

Token by token, NaN and Inf reach the tokens that see them and no other. Its time does not matter.
Its memory and the size of its program do: every program with the op has it beside the kernels. So
the rows of the batch go one by one, and the backward pass keeps the states before blocks of tokens,
and those inside of one block at a time.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.delta_scan.gpu.plan import Inputs, Plan
from kernels_pallas.delta_scan.inputs import DeltaStepOptions
from kernels_pallas.delta_scan.reference import recurrence


def outputs(
    plan: Plan,
    return_final_state: bool,
    x: Inputs,
) -> tuple[Array, Array | None]:
    """(o, final state or None), as the kernels return them."""
    o, final_state = _scan(plan, x)
    return o, final_state if return_final_state else None


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
    def of_row(row: Inputs) -> tuple[Array, Array]:
        one = jax.tree.map(lambda array: array[None], row)
        o, final_state = _scan_rows(plan, one)
        return o[0], final_state[0]

    return lax.map(jax.checkpoint(of_row), x._replace(state=state))


def _scan_rows(plan: Plan, x: Inputs) -> tuple[Array, Array]:
    """(o, final state) of some rows of the batch."""
    options = DeltaStepOptions(scale=plan.scale, l2_norm=plan.l2_norm)

    def block(state: Array, tokens: tuple) -> tuple[Array, Array]:
        *arrays, starts = tokens
        # 1 where the state is reset.
        is_start = None if starts is None else starts > 0
        o, new_state = recurrence(arrays, is_start, state, options)
        return new_state, o.astype(plan.out_dtype)

    def in_blocks(rows: Array) -> Array:
        """[B, T, ...] -> [blocks, B, chunk, ...]."""
        blocks = rows.reshape(rows.shape[0], plan.chunks, plan.chunk, *rows.shape[2:])
        return jnp.moveaxis(blocks, 1, 0)

    def tokens_first(rows: Array | None) -> Array | None:
        """[B, H, T] -> [B, T, H]."""
        return None if rows is None else jnp.swapaxes(rows, 1, 2)

    logs = x.logs if plan.decay == "vector" else tokens_first(x.logs)
    # In the order of `DeltaStepInputs`.
    arrays = (x.q, x.k, x.v, tokens_first(x.beta), logs, x.erase, x.write, x.starts)
    assert x.state is not None
    tokens = jax.tree.map(in_blocks, arrays)
    final_state, o = lax.scan(jax.checkpoint(block), x.state, tokens)
    # [blocks, B, chunk, H, V] -> [B, T, H, V]
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], plan.T, *o.shape[3:]), final_state
