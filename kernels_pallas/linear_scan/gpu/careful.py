"""What `linear_scan` on GPU falls back on where something is not finite: the recurrence itself.

Token by token, NaN and Inf reach the tokens that see them and no other. Its time does not matter.
Its memory and the size of its program do: every program with the op has it beside the kernels. So
the rows of the batch go one by one, and the backward pass keeps the states before blocks of tokens,
and those inside of one block at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.rows import row_by_row
from kernels_pallas.linear_scan.gpu.plan import Inputs, Plan
from kernels_pallas.linear_scan.inputs import StepInputs, StepOptions
from kernels_pallas.linear_scan.reference import linear_scan_step


class _Floats(NamedTuple):
    """The differentiable arrays of `Inputs`."""

    q: Array
    k: Array
    v: Array
    logs: Array | None
    bonus: Array | None
    state: Array | None


class _Token(NamedTuple):
    """One token of every row, or many of them along a first axis."""

    q: Array
    k: Array
    v: Array
    log_decay: Array | None
    start: Array | None


def outputs(
    plan: Plan,
    x: Inputs,
) -> tuple[Array, Array | None]:
    """(o, final state or None), as the kernels return them."""
    o, final_state = _scan(plan, x, _floats(x))
    return o, final_state if plan.return_final_state else None


def gradients(
    plan: Plan,
    x: Inputs,
    cotangents: tuple[Array, Array | None],
) -> Inputs:
    """The cotangents of the inputs for those of `outputs`."""
    do, dfinal = cotangents

    def run(floats: _Floats) -> tuple[Array, Array]:
        return _scan(plan, x, floats)

    (_, final_state), vjp = jax.vjp(run, _floats(x))
    if dfinal is None:
        dfinal = jnp.zeros_like(final_state)
    (found,) = vjp((do, dfinal))
    starts = None if x.starts is None else jnp.zeros_like(x.starts)
    return Inputs(starts=starts, **found._asdict())


def _floats(x: Inputs) -> _Floats:
    return _Floats(
        q=x.q,
        k=x.k,
        v=x.v,
        logs=x.logs,
        bonus=x.bonus,
        state=x.state,
    )


def _scan(
    plan: Plan,
    x: Inputs,
    floats: _Floats,
) -> tuple[Array, Array]:
    """(o, final state), for these values of the inputs."""
    B = x.q.shape[0]
    logs = floats.logs
    if logs is not None:
        # Of one row for the whole batch.
        logs = jnp.broadcast_to(logs, (B, *logs.shape[1:]))
    state = floats.state
    if state is None:
        zeros = jnp.zeros((B, plan.H, plan.K, plan.V), jnp.float32)
        state = varying_like(zeros, x.q)

    def of_rows(rows: tuple[_Floats, Array | None]) -> tuple[Array, Array]:
        row_floats, starts = rows
        return _scan_rows(plan, row_floats._replace(bonus=floats.bonus), starts)

    rows = floats._replace(logs=logs, state=state, bonus=None)
    return row_by_row(jax.checkpoint(of_rows), (rows, x.starts))


def _scan_rows(
    plan: Plan,
    floats: _Floats,
    starts: Array | None,
) -> tuple[Array, Array]:
    """(o, final state) of some rows of the batch."""
    options = StepOptions(plan.inclusive, plan.scale, normalize=False)

    def step(state: Array, token: _Token) -> tuple[Array, Array]:
        if token.start is not None:
            is_start = token.start[:, None, None, None] > 0
            state = jnp.where(is_start, jnp.zeros_like(state), state)
        inputs = StepInputs(
            q=token.q,
            k=token.k,
            v=token.v,
            log_decay=token.log_decay,
            bonus=floats.bonus,
            state=state,
        )
        o, new_state = linear_scan_step(inputs, options)
        return new_state, o.astype(plan.out_dtype)

    def block(state: Array, tokens: _Token) -> tuple[Array, Array]:
        return lax.scan(step, state, tokens)

    def in_blocks(rows: Array) -> Array:
        """[B, T, ...] -> [blocks, chunk, B, ...]."""
        first = jnp.moveaxis(rows, 1, 0)
        return first.reshape(plan.chunks, plan.chunk, *first.shape[1:])

    assert floats.state is not None
    tokens = jax.tree.map(in_blocks, _tokens(plan, floats, starts))
    final_state, o = lax.scan(jax.checkpoint(block), floats.state, tokens)
    o = o.reshape(plan.T, *o.shape[2:])
    return _in_order(plan, jnp.moveaxis(o, 0, 1)), final_state


def _tokens(
    plan: Plan,
    floats: _Floats,
    starts: Array | None,
) -> _Token:
    """[B, T, ...] each, in the order of the recurrence."""
    logs = floats.logs
    if logs is not None:
        # Scalar ones are in that order already.
        is_vector = plan.decay == "vector"
        logs = _in_order(plan, logs) if is_vector else jnp.swapaxes(logs, 1, 2)
    return _Token(
        q=_in_order(plan, floats.q),
        k=_in_order(plan, floats.k),
        # A fraction's halves are not rounded to v's dtype.
        v=_in_order(plan, floats.v).astype(jnp.float32),
        log_decay=logs,
        start=starts,
    )


def _in_order(plan: Plan, rows: Array) -> Array:
    return jnp.flip(rows, 1) if plan.reverse else rows
