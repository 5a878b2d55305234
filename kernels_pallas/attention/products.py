"""Matrix products of a tile that select: what a row does not see is left out, whatever it holds.

A weight of 0 is not enough, because 0 times NaN is NaN. Where everything is finite, these are the
plain products, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from kernels_pallas.attention.inputs import statistics_dtype


def matmul(
    subscripts: str,
    x: Array,
    y: Array,
    dtype: jnp.dtype,
) -> Array:
    """An einsum of two operands, accumulated and returned in `dtype`.

    Two of 16 bits are multiplied as such. One of 16 bits with one of 32 takes part in float32 at
    the machine's default precision: exact on a CPU, TF32 on a GPU, rounded to bfloat16 by a TPU.
    Two of 32 bits are multiplied in float32 everywhere.

    Args:
      subscripts: as of `jnp.einsum`.
      x, y: the operands, of any float dtypes.
      dtype: of the accumulator and the result.

    Returns:
      The product.

    Raises:
      ValueError: shapes that the subscripts do not fit.
    """
    # None is the machine's default.
    precision = None
    if min(x.dtype.itemsize, y.dtype.itemsize) > 2:
        precision = "highest"
    # Of float16 with bfloat16 only float32 has every number.
    common = x.dtype if x.dtype == y.dtype else statistics_dtype(x, y)
    return jnp.einsum(
        subscripts,
        x.astype(common),
        y.astype(common),
        precision=precision,
        preferred_element_type=dtype,
    )


def without_special(x: Array) -> Array:
    """`x` with zeros for what is not finite."""
    # NaN is not below infinity either.
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0)


def special_products(
    weights: Array,
    seen: Array,
    x: Array,
    product: Callable[[Array, Array], Array],
) -> Array:
    """What the entries of `x` that are not finite add to product(weights, x), by IEEE's rules.

    Only pairs that are seen count. A weight of 0 makes NaN of an infinity, and so do infinities of
    both signs.

    Args:
      weights: 0 where a pair is not seen.
      seen: the mask, of the shape of `weights`.
      x: the other operand.
      product: the matrix product, which must be exact for small integers.

    Returns:
      0, infinity or NaN everywhere, of the product's shape.
    """
    dtype = weights.dtype
    x = x.astype(dtype)
    is_special = jnp.logical_not(jnp.abs(x) < jnp.inf).astype(dtype)
    infinity = (x == jnp.inf).astype(dtype) - (x == -jnp.inf).astype(dtype)
    sign = jnp.where(seen, jnp.sign(weights), 0)
    # How many special entries each sum meets, and how many infinities with their signs.
    count = product(seen.astype(dtype), is_special)
    balance = product(sign, infinity)
    # All of one sign, or else NaN: there was a NaN, a weight of 0 or the other sign.
    one_sign = jnp.abs(balance) == count
    special = jnp.where(one_sign, balance * jnp.inf, jnp.nan)
    return jnp.where(count == 0, 0, special)


def selecting_product(
    weights: Array,
    seen: Array,
    x: Array,
    product: Callable[[Array, Array], Array],
) -> Array:
    """product(weights, x), in which a row of `x` that is not seen does not count.

    Where all of `x` is finite, that is the product itself, bit for bit.

    Args:
      weights: of a tile's pairs, 0 where a pair is not seen.
      seen: the mask, which broadcasts to the weights.
      x: the other operand, a row for each key or for each query of the tile.
      product: the matrix product, as the machine does it, over one axis of the weights.

    Returns:
      The product, of which entries that are not finite are in the rows that see one of `x`.
    """
    finite_sum = product(weights, without_special(x))
    mask = jnp.broadcast_to(seen, weights.shape)
    return finite_sum + special_products(weights, mask, x, product).astype(finite_sum.dtype)


class Factors(NamedTuple):
    """The operands of a product, as `selecting_product` takes them."""

    weights: Array
    x: Array
    product: Callable[[Array, Array], Array]


def selecting_products(
    factors: Sequence[Factors],
    seen: Array | None,
    any_special: Array | Callable[..., Array] | None,
) -> list[Array]:
    """`selecting_product` of each of some factors, at the cost of plain ones where all is finite.

    Args:
      factors: of all products of a tile, which share one branch.
      seen: the mask; None if every pair is seen.
      any_special: whether any `x` may have an entry that is not finite; or a function that tells
        it of the plain products, where those are much smaller than what is multiplied.

    Returns:
      The products.
    """
    plain = [product(weights, x) for weights, x, product in factors]
    if seen is None or any_special is None:
        return plain
    mask = seen
    if callable(any_special):
        # A weight of 0 hides nothing: its product with what is not finite is NaN.
        any_special = any_special(*plain)

    def careful() -> list[Array]:
        return [selecting_product(weights, mask, x, product) for weights, x, product in factors]

    return jax.lax.cond(any_special, careful, lambda: plain)


def has_special(*arrays: Array) -> Bool[Array, ""]:
    """Whether any entry of some arrays is NaN or infinite."""
    found = [jnp.logical_not(jnp.all(jnp.abs(x) < jnp.inf)) for x in arrays]
    return jnp.any(jnp.stack(found))


def selected(x: Array, seen: Array | None) -> Array:
    """`x`, 0 where a pair is not seen."""
    return x if seen is None else jnp.where(seen, x, 0)
