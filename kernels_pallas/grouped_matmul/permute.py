"""Rows into the order of their groups and back, with gathers both ways: a scatter-add is slow on every accelerator."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import varying_like


def sort_by_group(
    ids: Int[Array, "R"], num_groups: int
) -> tuple[Int[Array, "R"], Int[Array, "R"], Int[Array, "{num_groups}"]]:
    """Returns (order, inverse, group_sizes): `ids[order]` is sorted, `order[inverse]` is 0, 1, 2, ...

    Stable: rows of one group keep their order. An id of `num_groups` means no group: such rows come last and are not
    counted, so that `grouped_matmul` gives zeros for them.

    Raises:
      ValueError: `ids` is not a vector of integers.
    """
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"sort_by_group: ids: got shape {ids.shape} and dtype {ids.dtype}, expected [R] integers"
        )
    # Inside shard_map, jax takes the indices that argsort sorts along for the same on all devices (0.11, 0.12): told
    # nothing else, it would sum gradients over devices before they are put back in order.
    order = varying_like(jnp.argsort(ids, stable=True).astype(jnp.int32), ids)
    inverse = varying_like(jnp.argsort(order).astype(jnp.int32), ids)
    group_sizes = jnp.sum(ids[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    return order, inverse, group_sizes


def permute_rows(
    x: Float[Array, "R *D"], order: Int[Array, "Rk"], inverse: Int[Array, "Rk"]
) -> Float[Array, "Rk *D"]:
    """Each row of x repeated k times, k = len(order) / R, then taken in `order`: row i is x[order[i] // k].

    To the experts: `permute_rows(x, order, inverse)` with `order` over the R k choices of R tokens. Back: with k = 1
    and the two exchanged, `permute_rows(y, inverse, order)`. `order` must be a permutation and `inverse` its inverse,
    as `sort_by_group` gives them: then dx is a gather by `inverse` and a sum over the k copies, in float32.

    Raises:
      ValueError: the lengths do not fit, by name.
    """
    rows = x.shape[0] if x.ndim else 0
    if order.ndim != 1 or rows == 0 or order.shape[0] % rows:
        raise ValueError(
            f"permute_rows: order: got shape {order.shape}, expected [k R] for x of shape {x.shape}"
        )
    if inverse.shape != order.shape:
        raise ValueError(
            f"permute_rows: inverse: got shape {inverse.shape}, expected {order.shape}"
        )
    return _permute_rows(*(varying_like(a, x, order, inverse) for a in (x, order, inverse)))


@jax.custom_vjp
def _permute_rows(x: Array, order: Array, inverse: Array) -> Array:
    return _gather(x, order // (order.shape[0] // x.shape[0]))


def _forward_saving(x, order, inverse):
    return _permute_rows(x, order, inverse), (inverse, x.shape[0])


def _backward(residuals, dy):
    inverse, rows = residuals
    dx = _gather(dy, inverse)
    if rows != dy.shape[0]:
        dx = dx.reshape(rows, -1, *dy.shape[1:])
        dx = jnp.sum(dx, axis=1, dtype=jnp.promote_types(jnp.float32, dy.dtype)).astype(dy.dtype)
    return dx, None, None


_permute_rows.defvjp(_forward_saving, _backward)


def _gather(x: Array, index: Array) -> Array:
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds")
