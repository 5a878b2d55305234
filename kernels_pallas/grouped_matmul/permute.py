"""Rows into the order of their groups and back.

With gathers both ways: a scatter-add, which the gradient of a gather would be, is slow on every
accelerator.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import on_auto_axes, varying_like, varying_together
from kernels_pallas.common.precision import accumulator_dtype


def sort_by_group(
    ids: Int[Array, "R"],
    num_groups: int,
) -> tuple[Int[Array, "R"], Int[Array, "R"], Int[Array, "{num_groups}"]]:
    """The permutation that sorts rows by their group.

    Stable: rows of one group keep their order. An id of `num_groups` means no group: such rows come
    last and are not counted, so that `grouped_matmul` gives zeros for them.

    Args:
      ids: the group of each row.
      num_groups: how many groups there are.

    Returns:
      (order, inverse, group_sizes): `ids[order]` is sorted, `order[inverse]` is 0, 1, 2, ...

    Raises:
      ValueError: `ids` is not a vector of integers.
    """
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"sort_by_group: ids: got shape {ids.shape} and dtype {ids.dtype}, "
            "expected [R] integers"
        )
    order = on_auto_axes(_order, ids, ids)
    inverse = on_auto_axes(_order, ids, order)
    # Inside shard_map, jax (0.11, 0.12) takes the indices that argsort sorts along for the same on
    # all devices. Not told otherwise, it would sum gradients over devices before they are put back
    # in order.
    order = varying_like(order, ids)
    inverse = varying_like(inverse, ids)
    # Compared with every group: a histogram would be a scatter-add.
    one_hot = ids[:, None] == jnp.arange(num_groups)[None]
    group_sizes = jnp.sum(one_hot, axis=0, dtype=jnp.int32)
    return order, inverse, group_sizes


def _order(ids: Int[Array, "R"]) -> Int[Array, "R"]:
    return jnp.argsort(ids, stable=True).astype(jnp.int32)


def permute_rows(
    x: Float[Array | np.ndarray, "R *D"],
    order: Int[Array, "Rk"],
    inverse: Int[Array, "Rk"],
    *,
    copies_first: bool = False,
) -> Float[Array, "Rk *D"]:
    """Each row of x repeated k times, k = len(order) / R, then taken in `order`.

    Row i of the result is x[order[i] // k]. To the experts: `permute_rows(x, order, inverse)` with
    `order` over the R k choices of R tokens. Back: with k = 1 and the two exchanged,
    `permute_rows(y, inverse, order)`.

    `order` must be a permutation and `inverse` its inverse, as `sort_by_group` gives them. Then the
    gradient of x is a gather by `inverse` and a sum over the k copies, in float32.

    Args:
      x: the rows.
      order: which copy each row of the result is.
      inverse: where each copy goes.
      copies_first: the copies are numbered as those of a [k, R] array: row i of the result is
        x[order[i] % R]. A sum over k is then one of whole arrays, where a TPU takes neighboring
        rows apart.

    Returns:
      The R k rows.

    Raises:
      ValueError: the lengths do not fit, by name.
    """
    num_rows = x.shape[0] if x.ndim else 0
    if order.ndim != 1 or num_rows == 0 or order.shape[0] % num_rows:
        raise ValueError(
            f"permute_rows: order: got shape {order.shape}, expected [k R] for x of shape {x.shape}"
        )
    if inverse.shape != order.shape:
        raise ValueError(
            f"permute_rows: inverse: got shape {inverse.shape}, expected {order.shape}"
        )
    x = jnp.asarray(x)
    return _permute_rows(copies_first, *varying_together((x, order, inverse)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute_rows(
    copies_first: bool,
    x: Array,
    order: Array,
    inverse: Array,
) -> Array:
    num_rows = x.shape[0]
    if copies_first:
        # Copy j of row i is number j * num_rows + i.
        return _gather(x, order % num_rows)
    # Copy j of row i is number i * copies + j.
    copies = order.shape[0] // num_rows
    return _gather(x, order // copies)


def _forward_saving(
    copies_first: bool,
    x: Array,
    order: Array,
    inverse: Array,
):
    return _permute_rows(copies_first, x, order, inverse), (inverse, x.shape[0])


def _backward(copies_first: bool, residuals: tuple[Array, int], dy: Array):
    inverse, num_rows = residuals
    # Back in the order of the copies.
    dx = _gather(dy, inverse)
    copies = dy.shape[0] // num_rows
    if copies > 1:
        axes = (copies, num_rows) if copies_first else (num_rows, copies)
        by_copy = dx.reshape(*axes, *dy.shape[1:])
        sum_dtype = accumulator_dtype(dy.dtype)
        of_copies = 0 if copies_first else 1
        dx = jnp.sum(by_copy, axis=of_copies, dtype=sum_dtype).astype(dy.dtype)
    return dx, None, None


_permute_rows.defvjp(_forward_saving, _backward)


def _gather(x: Array, index: Int[Array, "Rk"]) -> Array:
    """x[index], without the check that every index lies in x."""

    def gather(x: Array, index: Array) -> Array:
        return x.at[index].get(mode="promise_in_bounds")

    # Split as x is, so that its gradient is, too.
    x = jnp.asarray(x)
    return on_auto_axes(gather, x, x, index)
