"""The output matrix over devices: whole for a loop over tokens, its gradient by groups of rows."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.per_shard import sum_of_parts
from gatedjax.sharding import is_cut, parts


def gathered(weights: Float[Array, "X M"], hidden: Float[Array, "..."]) -> Float[Array, "X M"]:
    """The output matrix along the whole width, before a loop would gather it each time."""
    return nn.with_logical_constraint(weights.astype(hidden.dtype), ("vocab", None))


def through_products(
    dlogits: Float[Array, "tokens X"],
    hidden: Float[Array, "tokens M"],
    weights: Float[Array, "X M"],
    groups: int,
) -> tuple[Float[Array, "tokens M"], Float[Array, "P X M"]]:
    """Gradients by hidden states and by the output matrix, from those of their products.

    Args:
      dlogits: in hidden's dtype.
      hidden: the hidden states of a chunk.
      weights: the output matrix.
      groups: of rows.
    """
    dhidden = jnp.einsum("nx,xm->nm", dlogits, weights)
    dweights = jnp.einsum(
        "pnx,pnm->pxm",
        dlogits.reshape(groups, -1, dlogits.shape[-1]),
        hidden.reshape(groups, -1, hidden.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    return dhidden, dweights


def groups_of_rows(rows: int) -> int:
    """Rows of the same devices are a group: a loop over chunks then adds up without any traffic."""
    groups = parts("batch")
    return groups if rows % groups == 0 else 1


def by_group(gradients: Float[Array, "P X M"]) -> Float[Array, "P X M"]:
    """Each group's gradient on the devices of its rows."""
    if gradients.shape[0] == 1:
        return gradients
    return nn.with_logical_constraint(gradients, ("batch", "vocab", None))


def added_up(gradients: Float[Array, "P X M"], dtype: Any) -> Float[Array, "X M"]:
    """The gradient of the output matrix; groups are added in `dtype`."""
    # One group is added to nothing, and stays float32.
    if gradients.shape[0] > 1:
        gradients = gradients.astype(dtype)
    return _sum_of_groups(gradients)


def _sum_of_groups(gradients: Float[Array, "P X M"]) -> Float[Array, "X M"]:
    """The gradient, cut over devices as the matrix is."""
    groups, vocab, width = gradients.shape
    names = ("vocab", "embed_vocab")
    # Where the sequence is cut, the same axis cuts the width too.
    is_by_device = groups == parts("batch") and parts("length") == 1
    if is_by_device and is_cut("embed_vocab", width) and vocab % parts("vocab") == 0:
        return sum_of_parts(gradients, names)
    return nn.with_logical_constraint(jnp.sum(gradients, axis=0), names)
