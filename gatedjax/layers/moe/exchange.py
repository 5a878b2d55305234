"""Experts over devices: how tokens and experts meet. For the body of a shard_map over the mesh axis `axis`.

Each device holds R tokens of its own and E / n of the E experts (n devices along the axis). All ways give the same
result; they differ in what travels, counted here in rows of M channels, per device, one way:

  gather_weights      3 (n - 1) / n E F rows of weights, before this file is reached: nothing to do here
  ragged_all_to_all   as many as there are assignments to other devices, about R k (n - 1) / n; TPU and GPU only
  all_to_all          R min(k, E / n) (n - 1): room for the worst case; exchange_factor limits it, drops what is over
  ring                R (n - 1): every token to every device, and the sums back; less than R k where k > n

Tokens that are the same on every device of the axis (a batch too small to be cut) go nowhere: each device computes what
its experts contribute, and the contributions are summed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from gatedjax.layers.moe.experts import Stacks, combine, grouped_mlp, mixture, sorted_inputs
from kernels_pallas.common.mesh import varying_axes, varying_like
from kernels_pallas.dispatch import target_platform
from kernels_pallas.ops import permute_rows, sort_by_group


class Assigned(NamedTuple):
    """The tokens of a device and where they go; ids count over all devices, E is an empty place."""

    x: Float[Array, "R M"]
    experts: Int[Array, "R k"]
    weights: Float[Array, "R k"]


def distributed_mixture(
    assigned: Assigned, stacks: Stacks, axis: str, exchange: str, factor: float
) -> tuple[Float[Array, "R M"], Float[Array, ""]]:
    """`experts.mixture` over the experts of all devices of the axis; and the number of assignments dropped, on all
    devices that hold tokens.

    Raises:
      NotImplementedError: exchange "ragged_all_to_all" on CPU.
    """
    if axis not in varying_axes(assigned.x):
        first = lax.axis_index(axis) * stacks.num_experts
        return lax.psum(mixture(*assigned, stacks, first), axis), jnp.float32(0.0)
    if lax.axis_size(axis) == 1:
        return mixture(*assigned, stacks), jnp.float32(0.0)
    if exchange == "ring":
        return _ring(assigned, stacks, axis), jnp.float32(0.0)
    if exchange == "ragged_all_to_all" and target_platform() == "cpu":
        raise NotImplementedError(
            "exchange 'ragged_all_to_all' is not implemented on CPU, expected 'all_to_all' or 'ring'"
        )
    send = {"all_to_all": _through_buffers, "ragged_all_to_all": _one_by_one}[exchange]
    ways = lax.axis_size(axis)
    order, inverse, sizes = sort_by_group(assigned.experts.reshape(-1), ways * stacks.num_experts)
    rows = sorted_inputs(assigned.x, assigned.weights, order, inverse, stacks)
    ids = assigned.experts.reshape(-1)[order]
    to = jnp.sum(sizes.reshape(ways, -1), axis=1)  # rows for each device, which come in this order
    y, lost = send(rows, ids, to, assigned.experts.shape, stacks, axis, factor)
    y = combine(permute_rows(y, inverse, order), assigned.weights, stacks)
    return y, lax.psum(lost.astype(jnp.float32), tuple(varying_axes(lost)))


def _ring(assigned: Assigned, stacks: Stacks, axis: str) -> Float[Array, "R M"]:
    everything = (lax.all_gather(a, axis, tiled=True) for a in assigned)
    y = mixture(*everything, stacks, lax.axis_index(axis) * stacks.num_experts)
    return lax.psum_scatter(y, axis, tiled=True)


def _through_buffers(
    rows, ids, to: Int[Array, "n"], shape: tuple[int, int], stacks: Stacks, axis: str, factor: float
):
    """A buffer of equal room for every device; results come back in the same places."""
    ways, room = to.shape[0], shape[0] * min(shape[1], stacks.num_experts)
    if factor:
        room = min(room, max(1, round(factor * rows.shape[0] / ways)))
    start = jnp.cumsum(to) - to
    slot = jnp.arange(room)
    row_of_slot = jnp.where(slot < to[:, None], start[:, None] + slot, -1).reshape(-1)
    device = jnp.minimum(ids // stacks.num_experts, ways - 1)
    place = jnp.arange(rows.shape[0]) - start[device]
    fits = (place < room) & (ids < ways * stacks.num_experts)
    slot_of_row = jnp.where(fits, device * room + place, -1)
    swap = lambda a: lax.all_to_all(a, axis, 0, 0, tiled=True)
    local = jnp.where(row_of_slot < 0, stacks.num_experts, ids[row_of_slot] % stacks.num_experts)
    y = swap(_by_expert(swap(take_rows(rows, row_of_slot, slot_of_row)), swap(local), stacks))
    return take_rows(y, slot_of_row, row_of_slot), jnp.sum(jnp.maximum(to - room, 0))


def _one_by_one(
    rows, ids, to: Int[Array, "n"], shape: tuple[int, int], stacks: Stacks, axis: str, factor: float
):
    """Exactly the rows there are: received one sender after the other, returned to where they were."""
    ways, me = to.shape[0], lax.axis_index(axis)
    room = ways * shape[0] * min(shape[1], stacks.num_experts)
    if factor:
        room = min(room, max(1, round(factor * rows.shape[0])))
    wanted = lax.all_gather(to, axis)  # [sender, receiver]
    before = jnp.cumsum(wanted, axis=0) - wanted
    sent = jnp.clip(room - before, 0, wanted)  # the receiver's room goes to the senders in order
    at_receiver = jnp.minimum(before, room)
    at_sender = jnp.cumsum(wanted, axis=1) - wanted
    out = (at_sender[me], sent[me], at_receiver[me], sent[:, me])
    back = (at_receiver[:, me], sent[:, me], at_sender[:, me], sent[me])
    move = lambda a, fill, size, sizes: lax.ragged_all_to_all(
        a, varying_like(jnp.full((size, *a.shape[1:]), fill, a.dtype), a), *sizes, axis_name=axis
    )
    local = move(ids % stacks.num_experts, stacks.num_experts, room, out)
    y = _by_expert(move(rows, 0, room, out), local, stacks)
    return move(y, 0, rows.shape[0], back), jnp.sum(to - sent[me])


def _by_expert(
    rows: Float[Array, "S M"], ids: Int[Array, "S"], stacks: Stacks
) -> Float[Array, "S M"]:
    """Received rows through this device's experts, in the order in which they came."""
    order, inverse, sizes = sort_by_group(ids, stacks.num_experts)
    return permute_rows(
        grouped_mlp(permute_rows(rows, order, inverse), sizes, stacks), inverse, order
    )


def take_rows(
    x: Float[Array, "R M"], index: Int[Array, "S"], back: Int[Array, "R"]
) -> Float[Array, "S M"]:
    """x[index], 0 where the index is -1. `back` is the way back: the place of row r in the result, -1 if it has none.

    The gradient is then a gather as well.
    """
    return _take_rows(*(varying_like(a, x, index, back) for a in (x, index, back)))


@jax.custom_vjp
def _take_rows(x: Array, index: Array, back: Array) -> Array:
    return jnp.where(index[:, None] < 0, 0, x[index])


_take_rows.defvjp(
    lambda x, index, back: (_take_rows(x, index, back), (index, back)),
    lambda residuals, dy: (_take_rows(dy, residuals[1], residuals[0]), None, None),
)
