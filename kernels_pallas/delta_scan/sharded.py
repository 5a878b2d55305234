"""`delta_scan` with its tokens split over a mesh axis: for sequences longer than one device holds.

What a device's tokens do to the state is an affine map of the state before them:

    after = M before + N

Every device finds its own M [K, K] and N [K, V] by one scan, from a state of V + K columns that is
empty on the left and the identity on the right. These maps are gathered, every device applies those
of the devices before it, and a second scan of its own tokens starts from the right state.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.delta_scan.api import delta_scan
from kernels_pallas.dispatch import Implementation
from kernels_pallas.linear_scan.sharded import segment_starts_on_axis


def delta_scan_sharded(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"] | None = None,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    axis_name: str,
    erase: Float[Array, "B T H K"] | None = None,
    write: Float[Array, "B T H V"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    l2_norm: bool = False,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`delta_scan` inside `shard_map`, with T split over the mesh axis `axis_name`.

    Two scans of each device's tokens; the exchange is one all-gather of [B, H, K, K + V] float32.

    Args:
      q, k, v, beta, log_decay, erase, write, segment_ids: the tokens of this device, as
        `delta_scan` takes them.
      axis_name: the mesh axis over which T is split, in order.
      initial_state: the state before the whole sequence, the same on every device of the axis.
      scale, l2_norm: as in `delta_scan`.
      return_final_state: also return the state after the whole sequence.
      chunk_size, implementation, interpret: as in `delta_scan`, for each device's own scans.

    Returns:
      o of this device's tokens, or (o, final state); the final state is the same on every device.

    Raises:
      ValueError: as `delta_scan`.
      NotImplementedError: as `delta_scan`.
    """
    B, T, H, V = v.shape
    K = q.shape[-1]

    # The map of this device's tokens: v is empty in the columns of M.
    identity = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (B, H, K, K))
    empty = jnp.zeros((B, H, K, V), jnp.float32)
    map_writes = None
    if write is not None:
        map_writes = jnp.concatenate([write, jnp.zeros((B, T, H, K), write.dtype)], -1)
    _, columns = delta_scan(
        q,
        k,
        jnp.concatenate([v, jnp.zeros((B, T, H, K), v.dtype)], -1),
        beta,
        log_decay,
        erase=erase,
        write=map_writes,
        initial_state=jnp.concatenate([empty, identity], -1),
        segment_ids=segment_ids,
        scale=scale,
        l2_norm=l2_norm,
        return_final_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
        interpret=interpret,
    )
    is_start = jnp.zeros((B, T), bool)
    if segment_ids is not None:
        is_start = segment_starts_on_axis(segment_ids, False, axis_name)
    first_state = empty if initial_state is None else initial_state
    first_state = varying_like(first_state.astype(columns.dtype), columns)
    is_start = varying_like(is_start, columns)
    before, after = _exchange_states(columns, first_state, is_start, axis_name)

    # Now from the right state. A document that starts here sees nothing of the devices before.
    starts_empty = is_start[:, 0, None, None, None]
    o = delta_scan(
        q,
        k,
        v,
        beta,
        log_decay,
        erase=erase,
        write=write,
        initial_state=jnp.where(starts_empty, 0.0, before),
        segment_ids=segment_ids,
        scale=scale,
        l2_norm=l2_norm,
        chunk_size=chunk_size,
        implementation=implementation,
        interpret=interpret,
    )
    assert isinstance(o, Array)
    return (o, after) if return_final_state else o


def _exchange_states(
    columns: Float[Array, "B H K _"],
    first_state: Float[Array, "B H K V"],
    is_start: Bool[Array, "B T"],
    axis_name: str,
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H K V"]]:
    """Applies the maps of all devices, in order.

    Args:
      columns: N and M of this device, side by side.
      first_state: the state before the whole sequence.
      is_start: where a document starts among this device's tokens.
      axis_name: the mesh axis.

    Returns:
      The state before this device's first token, and the one after the whole sequence. The latter
      is the same on all devices.
    """
    num_devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    V = first_state.shape[-1]
    # Past a start nothing of the state before is left: selected, for 0 times NaN is NaN.
    forgets = is_start.any(1)[:, None, None, None]
    all_columns, all_forgets = jax.lax.all_gather((columns, forgets), axis_name)

    running = first_state
    before = jnp.zeros_like(running)
    for i in range(num_devices):
        before = jnp.where(device == i, running, before)
        written = all_columns[i, ..., :V]
        kept = jnp.einsum(
            "bhkj,bhjv->bhkv",
            all_columns[i, ..., V:],
            running,
            precision="highest",
        )
        running = written + jnp.where(all_forgets[i], 0.0, kept)

    # All devices have the same sum, but only a psum makes it known as such to shard_map.
    after = jnp.where(device == num_devices - 1, running, 0.0)
    return before, jax.lax.psum(after, axis_name)
