"""What leaves a device for the experts of others, and what becomes of it where it arrives."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.moe.experts import (
    Stacks,
    grouped_mlp,
)
from kernels_pallas.grouped_matmul import permute_rows, sort_by_group


class Outgoing(NamedTuple):
    """A device's assignments, sorted by expert and therefore by the device that holds it."""

    rows: Float[Array, "kR M"]
    weights: Float[Array, " kR"] | None  # of their results
    experts: Int[Array, " kR"]
    sizes: Int[Array, "n E/n"]  # rows for each expert
    most_per_device: int  # a token goes to a device at most once for each of its experts

    @property
    def counts(self) -> Int[Array, " n"]:
        """Rows for each device. A device holds neighbors: its rows are the sum of their groups."""
        return jnp.sum(self.sizes, axis=1)


def by_expert(
    rows: Float[Array, "R M"],
    ids: Int[Array, " R"],
    weights: Float[Array, " R"] | None,
    stacks: Stacks,
) -> Float[Array, "R M"]:
    """Received rows through this device's experts, in the order in which they came.

    Args:
      rows: that came.
      ids: of their experts, among this device's; its number of experts for an empty place.
      weights: of their results.
      stacks: the experts.
    """
    order, inverse, sizes = sort_by_group(ids, stacks.num_experts)
    if weights is not None:
        weights = permute_rows(weights, order, inverse)
    y = grouped_mlp(permute_rows(rows, order, inverse), sizes, stacks, weights)
    return permute_rows(y, inverse, order)
