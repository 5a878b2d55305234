"""`linear_scan` with its tokens split over a mesh axis: for sequences longer than one device holds.

Every device scans its own tokens from an empty state. What is missing is linear in the state that
the devices before it leave, so it is added afterwards: only states and their decays are exchanged,
forward and backward.

    before = the states left by the devices before, decayed by those between
    o_t   += scale q_t exp(logs accumulated from the device's first token to the read of t) before

Every exponent is a sum of logs <= 0: no decay overflows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.checks import default_scale
from kernels_pallas.common.finite import any_nonfinite, is_finite, poisoned
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.dispatch import Implementation
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.api import linear_scan
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts

# Tokens whose logs are summed by one matmul.
CHUNK = 128


def linear_scan_sharded(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    axis_name: str,
    bonus: Float[Array, "H K"] | None = None,
    inclusive: bool = True,
    initial_state: Float[Array, "B H K Vs"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    reverse: bool = False,
    normalize: bool = False,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K Vs"]]:
    """`linear_scan` inside `shard_map`, with T split over the mesh axis `axis_name`.

    The exchange is one all-gather of [B, H, K, V] float32 states.

    Args:
      q, k, v, log_decay, segment_ids: the tokens of this device, as `linear_scan` takes them.
      axis_name: the mesh axis over which T is split, in order.
      bonus, inclusive, scale, reverse, normalize: as in `linear_scan`.
      initial_state: the state before the whole sequence, the same on every device of the axis.
      return_final_state: also return the state after the whole sequence.
      chunk_size, implementation, interpret: as in `linear_scan`, for each device's own scan.

    Returns:
      o of this device's tokens, or (o, final state); the final state is the same on every device.

    Raises:
      ValueError: as `linear_scan`.
      NotImplementedError: as `linear_scan`.
    """
    out_dtype = v.dtype
    scale = default_scale(scale, q.shape[-1])
    if normalize:
        # Numerator and denominator are added up over devices, in float32, before they are divided.
        v = append_ones(v.astype(jnp.float32))
        scale = 1.0
    # This device's own tokens, from an empty state.
    local_o, local_state = linear_scan(
        q,
        k,
        v,
        log_decay,
        bonus=bonus,
        inclusive=inclusive,
        segment_ids=segment_ids,
        scale=scale,
        reverse=reverse,
        return_final_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
        interpret=interpret,
    )

    starts = None
    if segment_ids is not None:
        starts = _segment_starts_on_axis(segment_ids, reverse, axis_name)
    sees_before = jnp.ones((1, q.shape[1]), bool)
    if starts is not None:
        # Tokens before the first start.
        order = jnp.flip(starts, 1) if reverse else starts
        sees_before = jnp.cumsum(order, 1) == 0
        if reverse:
            sees_before = jnp.flip(sees_before, 1)
    sees_before = varying_like(sees_before, q)
    logs = _accumulated_logs(q, log_decay, starts, inclusive, reverse)
    if initial_state is None:
        initial_state = jnp.zeros_like(local_state)
    first_state = varying_like(initial_state.astype(local_state.dtype), local_state)
    state_before, final_state = _exchange_states(
        logs.total,
        sees_before[:, -1 if not reverse else 0],
        local_state,
        first_state,
        axis_name,
        reverse,
    )

    # What this device's queries read of the state before its first token.
    precision = "highest" if q.dtype.itemsize > 2 else None
    # Selected before and after the product, for its sake and its gradient's.
    sees = sees_before[:, :, None, None]
    reads = scale * q.astype(state_before.dtype) * jnp.exp(logs.at_reads)
    reads = jnp.where(sees, reads, 0.0)
    from_before = jnp.einsum(
        "bthk,bhkv->bthv",
        reads,
        state_before,
        precision=precision,
    )
    from_before = jnp.where(sees, from_before, 0.0)
    o = local_o.astype(from_before.dtype) + from_before
    if normalize:
        o = divide_by_last(o)
    o = o.astype(out_dtype)
    return (o, final_state) if return_final_state else o


def _segment_starts_on_axis(
    segment_ids: Int[Array, "B T"],
    reverse: bool,
    axis_name: str,
) -> Bool[Array, "B T"]:
    """As `segment_starts`, also where a device's first token begins a segment.

    Never at the first token of the whole sequence: that one reads `initial_state`.
    """
    num_devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    # Positions and devices in the order of the recurrence.
    first_token = -1 if reverse else 0
    last_token = 0 if reverse else -1
    first_device = num_devices - 1 if reverse else 0
    to_next_device = -1 if reverse else 1

    # Every device but the first gets the id of the token just before its own.
    pairs = []
    for sender in range(num_devices):
        receiver = sender + to_next_device
        if 0 <= receiver < num_devices:
            pairs.append((sender, receiver))
    id_before = jax.lax.ppermute(
        segment_ids[:, last_token],
        axis_name,
        pairs,
    )

    changes = segment_ids[:, first_token] != id_before
    is_start = changes & (device != first_device)
    starts = segment_starts(segment_ids, reverse)
    return starts.at[:, first_token].set(is_start)


class _AccumulatedLogs(NamedTuple):
    """Sums of logs from the device's first token, in the order of the recurrence.

    Attributes:
      at_reads: up to the read of each token.
      total: up to the state after the device's last token.
    """

    at_reads: Float[Array, "#B T #H #K"]
    total: Float[Array, "#B #H #K"]


def _accumulated_logs(
    q: Array,
    log_decay: Array | None,
    starts: Array | None,
    inclusive: bool,
    reverse: bool,
) -> _AccumulatedLogs:
    logs = _logs_with_all_axes(log_decay, q.shape[1])
    logs = jnp.maximum(logs, tile.LOG_ZERO)
    if starts is not None:
        starts = starts[:, :, None, None]
        # A segment start empties the state: a decay of 0 to what comes before.
        logs = jnp.where(starts, tile.LOG_ZERO, logs)
    sums = _running_sums(logs, reverse)
    last_token = 0 if reverse else -1
    # The last token of the recurrence has all logs in its sum.
    total = sums[:, last_token]
    if inclusive:
        return _AccumulatedLogs(sums, total)

    # An exclusive read sees the sum up to the token before it, and nothing of another segment.
    if reverse:
        shifted = jnp.pad(sums, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]
    else:
        shifted = jnp.pad(sums, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    if starts is not None:
        shifted = shifted + jnp.where(starts, tile.LOG_ZERO, 0.0)
    return _AccumulatedLogs(shifted, total)


def _logs_with_all_axes(log_decay: Array | None, T: int) -> Float[Array, "#B T #H #K"]:
    """A log decay of any rank as [B or 1, T, H or 1, K or 1], in float32 or float64."""
    if log_decay is None:
        return jnp.zeros((1, T, 1, 1))
    logs = log_decay.astype(jnp.promote_types(jnp.float32, log_decay.dtype))
    if logs.ndim == 1:
        H = logs.shape[0]
        return jnp.broadcast_to(logs[:, None], (1, T, H, 1))
    if logs.ndim == 3:
        return logs[..., None]
    return logs


def _running_sums(logs: Float[Array, "B T H K"], reverse: bool) -> Float[Array, "B T H K"]:
    """Sums along T, each token included; from the last token on with `reverse`.

    By matmuls with triangles of ones, in chunks: XLA's cumsum of a long axis is slow on TPU.
    """
    B, T, H, K = logs.shape
    chunks = padded(logs, 1, round_up(T, CHUNK)).reshape(B, -1, CHUNK, H, K)
    num_chunks = chunks.shape[1]

    # Row i has ones at the tokens of the chunk up to i.
    ones = jnp.ones((CHUNK, CHUNK), logs.dtype)
    up_to_token = jnp.triu(ones) if reverse else jnp.tril(ones)
    inside = _sums("ij,bnjhk->bnihk", up_to_token, chunks)

    # Row i has ones at the chunks strictly before i.
    ones = jnp.ones((num_chunks, num_chunks), logs.dtype)
    before_chunk = jnp.triu(ones, 1) if reverse else jnp.tril(ones, -1)
    chunk_totals = chunks.sum(2)
    before = _sums("ij,bjhk->bihk", before_chunk, chunk_totals)

    # Chunks before, plus tokens of the own chunk.
    sums = inside + before[:, :, None]
    return sums.reshape(B, -1, H, K)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    subscripts: str,
    ones: Float[Array, "C C"],
    logs: Array,
) -> Array:
    """A matmul with a matrix of 0 and 1, in which 0 times NaN is 0, and so in its derivative."""

    def product(x: Array) -> Array:
        return jnp.einsum(subscripts, ones, x, precision="highest")

    is_bad = ~is_finite(logs)

    def with_nan(sums: Array) -> Array:
        return poisoned(product(is_bad.astype(logs.dtype)) > 0, sums)

    sums = product(jnp.where(is_bad, 0.0, logs))
    return jax.lax.cond(any_nonfinite(logs), with_nan, lambda sums: sums, sums)


def _sums_forward(subscripts: str, ones: Array, logs: Array):
    return _sums(subscripts, ones, logs), ones


def _sums_backward(subscripts: str, ones: Array, dsums: Array):
    # The same with the matrix transposed: of what comes after, where it was before.
    return jnp.zeros_like(ones), _sums(subscripts, ones.T, dsums)


_sums.defvjp(_sums_forward, _sums_backward)


def _exchange_states(
    log_total: Float[Array, "#B #H #K"],
    is_unbroken: Bool[Array, "#B"],
    state: Float[Array, "B H K V"],
    first_state: Float[Array, "B H K V"],
    axis_name: str,
    reverse: bool,
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H K V"]]:
    """Combines the states of all devices.

    Args:
      log_total: the log of this device's total decay.
      is_unbroken: whether no segment begins on this device.
      state: the state after this device's last token, from an empty state before its first.
      first_state: the state before the whole sequence.
      axis_name: the mesh axis.
      reverse: whether the recurrence goes from the last device to the first.

    Returns:
      The state before this device's first token, and the one after the whole sequence. The latter
      is the same on all devices.
    """
    num_devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    decay = jnp.exp(log_total)[..., None]
    # [num_devices, B, H, ...]: small beside q, k and v of long sequences.
    gathered = jax.lax.all_gather((decay, state, is_unbroken), axis_name)
    decays, states, unbroken = gathered

    # Every device runs the same short recurrence and keeps the state where its own tokens begin.
    devices = list(range(num_devices))
    if reverse:
        devices.reverse()
    running = first_state
    before = jnp.zeros_like(state)
    for i in devices:
        before = jnp.where(device == i, running, before)
        # Selected, not multiplied by a decay of 0: the state may be NaN or have overflowed.
        seen = jnp.where(unbroken[i][:, None, None, None], running, 0.0)
        running = decays[i] * seen + states[i]

    # All devices have the same sum, but only a psum makes it known as such to shard_map.
    last_device = 0 if reverse else num_devices - 1
    after = jnp.where(device == last_device, running, 0.0)
    return before, jax.lax.psum(after, axis_name)
