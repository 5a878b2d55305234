"""NaN and Inf: where they are, and arrays with and without them.

A mask must select, not multiply: 0 times NaN is NaN. Where a matmul has masked rows among its
operands, the fast paths multiply all the same, and look at a result that every operand goes into. A
value that is not finite there means that a careful path has to compute the piece once more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Bool, Float, Int


def any_nonfinite(*arrays: Array | None) -> Bool[Array, ""]:
    """Whether an element of any of `arrays` is NaN or infinite: one flag, also under `vmap`.

    A sum of finite elements that overflows counts too: the careful path is then taken in vain.
    """
    flag = jnp.zeros((), bool)
    for x in arrays:
        if x is not None:
            total = jnp.sum(jax.lax.stop_gradient(x).astype(jnp.float32))
            flag = flag | ~jnp.isfinite(total)
    return _any_of_batch(flag)


def any_counted(*counts: Int[Array, "..."]) -> Bool[Array, ""]:
    """Whether a kernel has counted anything: one flag, also under `vmap`."""
    flag = jnp.zeros((), bool)
    for count in counts:
        flag = flag | jnp.any(count > 0)
    return _any_of_batch(flag)


def if_bad[Tree](
    is_bad: Bool[Array, ""],
    careful: Callable[..., Tree],
    fast: Tree,
    *args: Any,
) -> Tree:
    """`fast`, or where something in it is bad, `careful(*args)`.

    Args:
      is_bad: whether anything is; one flag, or both would always be computed.
      careful: gives the same as the fast path, and NaN where it belongs.
      fast: the fast path's results.
      *args: of `careful`.

    Returns:
      The results. A number that is finite on both paths was not reached by one that is not: there
      it is the fast path's, to the bit what it always is.
    """

    def choose(slow: Array, quick: Array) -> Array:
        return jnp.where(is_finite(slow) & is_finite(quick), quick, slow)

    def step(carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
        flag, results = carry
        slow = careful(*jax.tree.map(_row_major, args))
        results = jax.tree.map(_row_major, jax.tree.map(choose, slow, results))
        # And: the type of the flag inside of a `shard_map` stays.
        return flag & False, results

    # A loop of one step or none, whose results lie where the fast path has put them. The results of
    # a `cond` are another array: XLA copies the fast path's.
    _, results = jax.lax.while_loop(lambda carry: carry[0], step, (is_bad, fast))
    return results


def _row_major(x: Array) -> Array:
    """`x` in the layout in which kernels take and leave it. Else XLA may give a loop's body another
    one, and copy what goes into the loop and comes out of it whether or not the body runs.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_batching.custom_vmap
def _any_of_batch(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """The flag itself. Under `vmap` one for all rows: a `cond` by it remains one."""
    return flag


@_any_of_batch.def_vmap
def _any_of_rows(
    axis_size: int,
    in_batched: list[bool],
    flag: Bool[Array, "rows"],
) -> tuple[Array, bool]:
    # The rows may be those of an outer vmap's inner one: this rule is then applied again.
    return _any_of_batch(jnp.any(flag)), False


def cleaned(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`x` with 0 in place of NaN and Inf."""
    return jnp.where(is_finite(x), x, jnp.zeros_like(x))


def is_finite(x: Float[Array, "*axes"]) -> Bool[Array, "*axes"]:
    """Where `x` is neither NaN nor infinite. As comparisons, which Mosaic knows for any dtype."""
    # NaN compares as false.
    return jnp.abs(x) < jnp.inf


def poisoned(bad: Bool[Array, "*some"], x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`x` with NaN where `bad`, which broadcasts."""
    return jnp.where(bad, jnp.asarray(jnp.nan, x.dtype), x)
