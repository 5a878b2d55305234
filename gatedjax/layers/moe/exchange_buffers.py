"""Rows to experts on other devices, in a buffer of equal size for every device."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from gatedjax.layers.moe.exchanged_rows import Outgoing, by_expert
from gatedjax.layers.moe.experts import Stacks
from kernels_pallas.common.mesh import varying_like


def all_to_all(
    outgoing: Outgoing,
    stacks: Stacks,
    axis: str,
    factor: float,
) -> tuple[Float[Array, "Rk M"], Int[Array, ""]]:
    """A buffer of equal size for every device; results come back in the same places."""
    num_rows = outgoing.rows.shape[0]
    devices = outgoing.counts.shape[0]
    slots = outgoing.most_per_device
    if factor:
        slots = min(slots, max(1, round(factor * num_rows / devices)))
    # The rows for device d are those from start[d] on, counts[d] of them.
    start = jnp.cumsum(outgoing.counts) - outgoing.counts
    # Slot s of the buffer for device d holds row start[d] + s, if there are so many.
    slot = jnp.arange(slots)
    is_filled = slot < outgoing.counts[:, None]
    row_of_slot = jnp.where(is_filled, start[:, None] + slot, -1).reshape(-1)
    # And the other way round. Empty places have an id past the last expert and belong to no device.
    device = jnp.minimum(outgoing.experts // stacks.num_experts, devices - 1)
    place = jnp.arange(num_rows) - start[device]
    is_expert = outgoing.experts < devices * stacks.num_experts
    slot_of_row = jnp.where((place < slots) & is_expert, device * slots + place, -1)

    def swap(buffers: Array) -> Array:
        """Every device gets from every other the buffer meant for it."""
        return lax.all_to_all(
            buffers,
            axis,
            split_axis=0,
            concat_axis=0,
            tiled=True,
        )

    # Ids within the device that holds the expert; an empty slot is an empty place there.
    local_id = outgoing.experts[row_of_slot] % stacks.num_experts
    local_id = jnp.where(row_of_slot < 0, stacks.num_experts, local_id)
    # There, through the experts, and back into the slots that the rows came from.
    received = swap(take_rows(outgoing.rows, row_of_slot, slot_of_row))
    weights = None
    if outgoing.weights is not None:
        in_slots = take_rows(outgoing.weights[:, None], row_of_slot, slot_of_row)
        weights = swap(in_slots)[:, 0]
    y = swap(by_expert(received, swap(local_id), weights, stacks))
    dropped = jnp.sum(jnp.maximum(outgoing.counts - slots, 0))
    return take_rows(y, slot_of_row, row_of_slot), dropped


def take_rows(
    x: Float[Array, "R M"],
    index: Int[Array, " S"],
    inverse: Int[Array, " R"],
) -> Float[Array, "S M"]:
    """x[index], 0 where the index is -1.

    `inverse` leads back: the place of row r in the result, -1 if it has none. With it the gradient
    is a gather as well, not a scatter.
    """
    arrays = (x, index, inverse)
    return _take_rows(*(varying_like(a, *arrays) for a in arrays))


@jax.custom_vjp
def _take_rows(
    x: Array,
    index: Array,
    inverse: Array,
) -> Array:
    return jnp.where(index[:, None] < 0, 0, x[index])


def _take_rows_forward(
    x: Array,
    index: Array,
    inverse: Array,
):
    return _take_rows(x, index, inverse), (index, inverse)


def _take_rows_backward(residuals: tuple[Array, Array], dy: Array):
    index, inverse = residuals
    return _take_rows(dy, inverse, index), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
