"""Rows that a kernel of `linear_scan` spoiled, computed once more by the XLA path.

A kernel multiplies a chunk as a whole, with zeros where a token does not see another, and 0 times
NaN is NaN. It cannot afford to look for that in every step, so it only leaves sums behind that are
not finite where anything was not ("check"). Rows of the batch with such sums are computed again by
a path where NaN and Inf reach what sees them, and nothing else (`../nonfinite.py`), a few heads at
a time: XLA sets memory aside for it whether it runs or not. The loop over them has no turn where
all is finite: it costs a look at B numbers, and its carry stays where it lies.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

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

    def outputs_of(place: _Place) -> tuple[Array, Array | None]:
        return _outputs(plan, _inputs_at(plan, x, place))

    return _replace_parts(plan, check, outputs_of, (o, final_state), (2, 1))


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

    def gradients_of(place: _Place) -> KernelInputs:
        _, vjp = jax.vjp(lambda x: _outputs(plan, x), _inputs_at(plan, x, place))
        dfinal_here = None if dfinal is None else place.slice(dfinal, 1)
        (dx_here,) = vjp((place.slice(do, 2), dfinal_here))
        dbonus = dx_here.bonus
        if dbonus is not None:
            # [1, heads * K] -> [1, 1, heads * K]
            dbonus = dbonus[None]
        return dx_here._replace(starts=None, bonus=dbonus)

    axes = _head_axes(plan, bonus_axis=2)
    return _replace_parts(plan, check, gradients_of, dx, axes)


class _Place(NamedTuple):
    """One row of the batch, and one of `num_groups` groups of heads."""

    row: Int[Array, ""]
    group: Int[Array, ""]
    num_groups: int

    def slice(self, x: Array, head_axis: int | None) -> Array:
        """What of `x` lies there, as a row. Arrays that all rows share have one row."""
        starts, sizes = self._bounds(x, head_axis)
        return jax.lax.dynamic_slice(x, starts, sizes)

    def update(self, x: Array, part: Array, head_axis: int | None) -> Array:
        """`x` with `part` there."""
        starts, _ = self._bounds(x, head_axis)
        return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), starts)

    def _bounds(self, x: Array, head_axis: int | None) -> tuple[list[Array], list[int]]:
        zero = jnp.int32(0)
        starts = [zero] * x.ndim
        sizes = list(x.shape)
        if x.shape[0] > 1:
            starts[0] = self.row
            sizes[0] = 1
        if head_axis is not None:
            sizes[head_axis] //= self.num_groups
            starts[head_axis] = self.group * jnp.int32(sizes[head_axis])
        return starts, sizes


def _num_groups(plan: Plan) -> int:
    """Into how many parts query, key and value heads can all be split."""
    return math.gcd(plan.H, plan.Hk, plan.Hv)


def _head_axes(plan: Plan, bonus_axis: int) -> tuple[int | None, ...]:
    """The axis of every array of `KernelInputs` along which its heads lie."""
    decay_axis = 2 if plan.decay == "vector" else 1
    # q, k, v, decay, starts, bonus, state
    return 2, 2, 2, decay_axis, None, bonus_axis, 1


def _inputs_at(plan: Plan, x: KernelInputs, place: _Place) -> KernelInputs:
    parts = []
    for array, axis in zip(x, _head_axes(plan, bonus_axis=1)):
        parts.append(None if array is None else place.slice(array, axis))
    return KernelInputs._make(parts)


def _replace_parts[Arrays: tuple](
    plan: Plan,
    check: Check,
    compute: Callable[[_Place], Arrays],
    arrays: Arrays,
    head_axes: tuple[int | None, ...],
) -> Arrays:
    """Arrays of B rows each, with `compute` of them in place of the rows that are spoiled."""
    num_groups = _num_groups(plan)
    row_numbers = jnp.arange(check.shape[0], dtype=jnp.int32)

    def is_any_left(carry: tuple[Array, Array, Arrays]) -> Array:
        return jnp.any(~is_finite(carry[0]))

    def replace_one(carry: tuple[Array, Array, Arrays]) -> tuple[Array, Array, Arrays]:
        sums, group, arrays = carry
        # The first row that is left.
        row = jnp.argmax(~is_finite(sums)).astype(jnp.int32)
        place = _Place(row, group, num_groups)

        replaced = []
        for whole, new, axis in zip(arrays, compute(place), head_axes):
            replaced.append(None if whole is None else place.update(whole, new, axis))
        arrays = jax.tree.unflatten(jax.tree.structure(arrays), jax.tree.leaves(replaced))

        # A row is left until its last group of heads.
        is_last = group == num_groups - 1
        is_done = is_last & (row_numbers == row)
        sums = jnp.where(is_done, jnp.zeros_like(sums), sums)
        return sums, jnp.where(is_last, 0, group + 1), arrays

    # B sums are all that is looked at where everything is finite: what a loop begins with takes
    # about a microsecond for each operation, however small.
    sums = jnp.sum(check, axis=(1, 2, 3))
    first_group = varying_like(jnp.int32(0), check)
    return jax.lax.while_loop(is_any_left, replace_one, (sums, first_group, arrays))[2]


def _outputs(plan: Plan, x: KernelInputs) -> tuple[Array, Array | None]:
    """What the forward kernel computes of some of the heads, by the XLA path."""
    num_groups = _num_groups(plan)
    H = plan.H // num_groups

    def heads(x: Array, num_heads: int) -> Array:
        """[B, T, heads * D] -> [B, T, heads, D]"""
        return x.reshape(*x.shape[:2], num_heads, -1)

    log_decay = x.decay
    if log_decay is not None and plan.decay == "vector":
        log_decay = heads(log_decay, H)
    elif log_decay is not None:
        # [B, H, T] -> [B, T, H]
        log_decay = jnp.swapaxes(log_decay, 1, 2)
    tokens = Tokens(
        q=heads(x.q, H),
        k=heads(x.k, plan.Hk // num_groups),
        v=heads(x.v, plan.Hv // num_groups),
        log_decay=log_decay,
        starts=None if x.starts is None else x.starts[:, 0] > 0,
    )
    state = x.state
    if state is None:
        zeros = jnp.zeros((1, H, plan.V, plan.K), jnp.float32)
        state = varying_like(zeros, x.q)
    o, final_state = xla.recurrence(
        tokens,
        None if x.bonus is None else x.bonus.reshape(H, plan.K),
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
