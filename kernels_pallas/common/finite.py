"""NaN and Inf: where they are, and arrays with and without them.

A mask must select, not multiply: 0 times NaN is NaN. Where a matmul has masked rows among its
operands, the fast paths multiply all the same, and look at a result that every operand goes into. A
value that is not finite there means that a careful path has to compute the piece once more.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


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
