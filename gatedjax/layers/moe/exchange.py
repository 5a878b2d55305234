"""Experts over devices: how tokens and experts come together.

Here the ways part; those that send rows are `exchange_buffers` and `exchange_ragged`.

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
What "ragged_all_to_all" has received is kept for the backward pass (its DISPATCHED_NAME): it is
sent once, and so are the results, the gradients of both and of the weights.

Tokens that are the same on every device of the axis (a batch too small to be cut) are not sent:
each device computes what its experts contribute, and the contributions are summed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from gatedjax.config import SparseMoEConfig
from gatedjax.layers.moe.exchange_buffers import all_to_all
from gatedjax.layers.moe.exchange_ragged import ragged_all_to_all
from gatedjax.layers.moe.exchanged_rows import Outgoing
from gatedjax.layers.moe.experts import (
    Stacks,
    by_place,
    mixture,
    sorted_inputs,
    summed_places,
)
from gatedjax.per_shard import manual_axes
from kernels_pallas.common.mesh import varying_axes
from kernels_pallas.dispatch import target_platform
from kernels_pallas.grouped_matmul import permute_rows, sort_by_group


class Assigned(NamedTuple):
    """The tokens of a device and their experts; ids count over all devices, E is an empty place."""

    x: Float[Array, "R M"]
    experts: Int[Array, "R k"]
    weights: Float[Array, "R k"]


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
        "all_to_all": all_to_all,
        "ragged_all_to_all": ragged_all_to_all,
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
