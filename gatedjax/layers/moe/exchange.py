"""Experts over devices: how tokens and experts come together.

For the body of a shard_map over the mesh axis `axis`. Each device holds R tokens of its own and
E / n of the E experts (n devices along the axis). All ways give the same result; they differ in
what is sent, counted here in rows of M channels, per device, one way:

  gather_weights      3 (n - 1) / n E F rows of weights, before this file is reached: nothing to do
  ragged_all_to_all   one for every assignment to another device, about R k (n - 1) / n; TPU and GPU
  all_to_all          R min(k, E / n) (n - 1): buffers for the worst case; exchange_factor
                      makes them smaller and drops what does not fit
  ring                R (n - 1): every token to every device, and the sums back; less than R k where
                      k > n

Weights go along into the experts, so that outputs are not needed again for the weights' gradient.
What "ragged_all_to_all" has received is kept for the backward pass (`DISPATCHED_NAME`): it is sent
once, and so are the results, the gradients of both and of the weights.

Tokens that are the same on every device of the axis (a batch too small to be cut) are not sent:
each device computes what its experts contribute, and the contributions are summed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from gatedjax.config import SparseMoEConfig
from gatedjax.layers.moe.experts import (
    Stacks,
    by_place,
    grouped_mlp,
    mixture,
    sorted_inputs,
    summed_places,
)
from gatedjax.sharding import manual_axes
from kernels_pallas.common.mesh import varying_axes, varying_like
from kernels_pallas.dispatch import target_platform
from kernels_pallas.grouped_matmul import permute_rows, sort_by_group

# What a `jax.checkpoint` policy saves so that no row is sent twice.
DISPATCHED_NAME = "dispatched_rows"
# The rows that a device has room for, of what an even load would send it, where the configuration
# does not say. The worst case is the number of devices, or E / (n k) of them where that is less.
DEFAULT_ROOM = 2.0


class Assigned(NamedTuple):
    """The tokens of a device and their experts; ids count over all devices, E is an empty place."""

    x: Float[Array, "R M"]
    experts: Int[Array, "R k"]
    weights: Float[Array, "R k"]


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


class Transfer(NamedTuple):
    """The plan of one `ragged_all_to_all`, as its arguments have it.

    A number for every other device.
    """

    input_offsets: Int[Array, " n"]
    send_sizes: Int[Array, " n"]
    output_offsets: Int[Array, " n"]
    recv_sizes: Int[Array, " n"]


def device_mixture(
    c: SparseMoEConfig,
    x: Float[Array, "B T M"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    gate: Float[Array, "E M F"] | None,
    up: Float[Array, "E M F"],
    down: Float[Array, "E F M"],
    gate_bias: Float[Array, "E F"] | None,
    up_bias: Float[Array, "E F"] | None,
) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
    """One device's tokens through all experts, or their part of them where it holds them all.

    Args:
      c: the configuration of the layer.
      x: the tokens of the device.
      experts: of each token; ids count over all devices.
      weights: what their outputs are weighted by.
      gate, up, down: the matrices of the device's experts; no gate where experts have none.
      gate_bias, up_bias: their biases.

    Returns:
      The weighted sums, and how many assignments the exchange dropped, on all devices.
    """
    stacks = Stacks(
        gate,
        up,
        down,
        c.activation,
        c.router.weight_input,
        c.swiglu_limit,
        gate_bias,
        up_bias,
    )
    assigned = Assigned(*(a.reshape(-1, a.shape[-1]) for a in (x, experts, weights)))
    expert_axes = manual_axes("expert")
    if expert_axes and c.exchange != "gather_weights":
        (axis,) = expert_axes
        factor = c.exchange_factor
        if c.bias:
            # The biases of all that was chosen are added outside: there is room for all of it.
            factor = float(lax.axis_size(axis))
        y, lost = distributed_mixture(
            assigned,
            stacks,
            axis,
            c.exchange,
            factor,
        )
    else:
        y = mixture(*assigned, stacks)
        lost = jnp.float32(0.0)
    return y.reshape(x.shape).astype(x.dtype), lost


def distributed_mixture(
    assigned: Assigned,
    stacks: Stacks,
    axis: str,
    exchange: str,
    factor: float,
) -> tuple[Float[Array, "R M"], Float[Array, ""]]:
    """`experts.mixture` over the experts of all devices of the axis.

    Args:
      assigned: this device's tokens.
      stacks: this device's experts.
      axis: the mesh axis of the experts.
      exchange: "all_to_all", "ragged_all_to_all" or "ring".
      factor: the size of the buffers, relative to an even load; 0 for the worst case with
        "all_to_all", and for the room of `rows_of_room` with "ragged_all_to_all".

    Returns:
      The weighted sums, float32; and the number of assignments dropped, on all devices with tokens.

    Raises:
      NotImplementedError: exchange "ragged_all_to_all" on CPU.
    """
    none_dropped = jnp.float32(0.0)
    if axis not in varying_axes(assigned.x):
        first = lax.axis_index(axis) * stacks.num_experts
        return lax.psum(mixture(*assigned, stacks, first), axis), none_dropped
    if lax.axis_size(axis) == 1:
        return mixture(*assigned, stacks), none_dropped
    # The ring needs no plan: everybody sees everything and keeps its part.
    if exchange == "ring":
        return _ring(assigned, stacks, axis), none_dropped
    if exchange == "ragged_all_to_all" and target_platform() == "cpu":
        expected = "expected 'all_to_all' or 'ring'"
        raise NotImplementedError(
            f"exchange 'ragged_all_to_all' is not implemented on CPU, {expected}"
        )
    devices = lax.axis_size(axis)
    flat_experts = by_place(assigned.experts)
    # One sort serves both ways: by expert is also by device.
    order, inverse, sizes = sort_by_group(flat_experts, devices * stacks.num_experts)
    tokens, k = assigned.experts.shape
    rows, weights = sorted_inputs(
        assigned.x,
        assigned.weights,
        order,
        inverse,
        stacks,
    )
    outgoing = Outgoing(
        rows=rows,
        weights=weights,
        experts=flat_experts[order],
        sizes=sizes.reshape(devices, -1),
        most_per_device=tokens * min(k, stacks.num_experts),
    )
    send = {
        "all_to_all": _all_to_all,
        "ragged_all_to_all": _ragged_all_to_all,
    }[exchange]
    y, dropped = send(
        outgoing,
        stacks,
        axis,
        factor,
    )
    y = summed_places(permute_rows(y, inverse, order), tokens)
    return y, lax.psum(dropped.astype(jnp.float32), tuple(varying_axes(dropped)))


def _ring(
    assigned: Assigned,
    stacks: Stacks,
    axis: str,
) -> Float[Array, "R M"]:
    everything = Assigned(*(lax.all_gather(a, axis, tiled=True) for a in assigned))
    first = lax.axis_index(axis) * stacks.num_experts
    return lax.psum_scatter(mixture(*everything, stacks, first), axis, tiled=True)


def _all_to_all(
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
    y = swap(_by_expert(received, swap(local_id), weights, stacks))
    dropped = jnp.sum(jnp.maximum(outgoing.counts - slots, 0))
    return take_rows(y, slot_of_row, row_of_slot), dropped


def _ragged_all_to_all(
    outgoing: Outgoing,
    stacks: Stacks,
    axis: str,
    factor: float,
) -> tuple[Float[Array, "Rk M"], Int[Array, ""]]:
    """Exactly the rows there are.

    Received one sender after the other, returned to where they were.
    """
    num_rows = outgoing.rows.shape[0]
    devices = outgoing.counts.shape[0]
    me = lax.axis_index(axis)
    capacity = rows_of_room(num_rows, devices * outgoing.most_per_device, factor)
    # [sender, receiver, expert of the receiver]: rows that there are.
    sizes = lax.all_gather(outgoing.sizes, axis)
    # Tables [sender, receiver]: rows that there are; where they begin at the receiver, which stores
    # the senders' rows one after the other; and how many of them it has capacity for.
    wanted = jnp.sum(sizes, axis=2)
    before = jnp.cumsum(wanted, axis=0) - wanted
    sent = jnp.clip(capacity - before, 0, wanted)
    at_receiver = jnp.minimum(before, capacity)
    # Where the rows for a receiver begin at the sender, whose rows are sorted by receiver.
    at_sender = jnp.cumsum(wanted, axis=1) - wanted
    out = Transfer(
        at_sender[me],
        sent[me],
        at_receiver[me],
        sent[:, me],
    )
    back = Transfer(
        at_receiver[:, me],
        sent[:, me],
        at_sender[:, me],
        sent[me],
    )

    def move(
        a: Array,
        fill: int,
        size: int,
        transfer: Transfer,
    ) -> Array:
        """`size` rows: what is received, and `fill` where nothing is."""
        empty = jnp.full((size, *a.shape[1:]), fill, a.dtype)
        return lax.ragged_all_to_all(
            a,
            varying_like(empty, a),
            *transfer,
            axis_name=axis,
        )

    received = move(
        outgoing.rows,
        0,
        capacity,
        out,
    )
    received = checkpoint_name(received, DISPATCHED_NAME)
    weights = None
    if outgoing.weights is not None:
        weights = move(
            outgoing.weights,
            0,
            capacity,
            out,
        )
        weights = checkpoint_name(weights, DISPATCHED_NAME)
    y = _by_expert(received, experts_of_received(sizes[:, me], capacity), weights, stacks)
    dropped = jnp.sum(outgoing.counts - sent[me])
    return move(
        y,
        0,
        num_rows,
        back,
    ), dropped


def rows_of_room(
    even: int,
    worst: int,
    factor: float,
) -> int:
    """How many rows a device can receive in a ragged exchange.

    Args:
      even: the rows that it gets where all devices get as many.
      worst: the most that can be sent to it.
      factor: of `even`; 0 for `DEFAULT_ROOM`.
    """
    return min(worst, max(1, round((factor or DEFAULT_ROOM) * even)))


def experts_of_received(sizes: Int[Array, "n E/n"], capacity: int) -> Int[Array, " R"]:
    """The expert of each received row, which nobody has to send: E / n for an empty place.

    Args:
      sizes: how many rows each sender has for each expert of this device. They come sorted, the
        senders' one after the other.
      capacity: how many rows there are places for.
    """
    ends = jnp.cumsum(sizes.reshape(-1))
    place = jnp.arange(capacity)
    # Compared with every end, as in `sort_by_group`: there are few.
    passed = jnp.sum(place[:, None] >= ends, axis=1)
    num_experts = sizes.shape[1]
    return jnp.where(place < ends[-1], passed % num_experts, num_experts)


def _by_expert(
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
