"""Rows to experts on other devices, exactly those that there are."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from gatedjax.layers.moe.exchanged_rows import Outgoing, by_expert
from gatedjax.layers.moe.experts import Stacks
from kernels_pallas.common.mesh import varying_like

# What a `jax.checkpoint` policy saves so that no row is sent twice.
DISPATCHED_NAME = "dispatched_rows"

# The rows that a device has room for, of what an even load would send it, where the configuration
# does not say. The worst case is the number of devices, or E / (n k) of them where that is less.
DEFAULT_ROOM = 2.0


class Transfer(NamedTuple):
    """The plan of one `ragged_all_to_all`, as its arguments have it.

    A number for every other device.
    """

    input_offsets: Int[Array, " n"]
    send_sizes: Int[Array, " n"]
    output_offsets: Int[Array, " n"]
    recv_sizes: Int[Array, " n"]


def ragged_all_to_all(
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
    y = by_expert(received, experts_of_received(sizes[:, me], capacity), weights, stacks)
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
