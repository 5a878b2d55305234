"""`linear_scan` with its tokens cut over a mesh axis: for sequences longer than one device holds.

Every device scans its own tokens from an empty state. What it missed is linear in the state that the devices before it
leave, so it is added afterwards: only states and their decays are exchanged, forward and backward.

    S_first = S left by the devices before, decayed by those between;   o_t += scale q_t exp(logs met so far) S_first

Every exponent is a sum of logs <= 0: no decay overflows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.api import linear_scan
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts

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
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    reverse: bool = False,
    normalize: bool = False,
    return_final_state: bool = False,
    **how,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`linear_scan` inside `shard_map`, T cut over the mesh axis `axis_name`; the arguments and results of this device.

    `initial_state` and the final state belong to the whole sequence and are the same on all of the axis. `how` is
    chunk_size, implementation and interpret. The exchange is one all-gather of [B, H, K, V] float32 states.

    Raises:
      ValueError, NotImplementedError: as `linear_scan`.
    """
    out_dtype, scale = v.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    if (
        normalize
    ):  # the two halves of a ratio: added up over devices, in float32, before they are divided
        v, scale = append_ones(v.astype(jnp.float32)), 1.0
    o, state = linear_scan(
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
        **how,
    )
    met = _logs_met(q, log_decay, _starts(segment_ids, reverse, axis_name), inclusive, reverse)
    first = jnp.zeros_like(state) if initial_state is None else initial_state.astype(state.dtype)
    before, after = _states_of_the_axis(
        met.total, state, varying_like(first, state), axis_name, reverse
    )
    precision = "highest" if q.dtype.itemsize > 2 else None
    reads = scale * q.astype(before.dtype) * jnp.exp(met.by_reads)
    missed = jnp.einsum("bthk,bhkv->bthv", reads, before, precision=precision)
    o = o.astype(missed.dtype) + missed
    o = (divide_by_last(o) if normalize else o).astype(out_dtype)
    return (o, after) if return_final_state else o


class _Met(NamedTuple):
    by_reads: Float[Array, "#B T #H #K"]  # logs from the device's first token to a token's read
    total: Float[Array, "#B #H #K"]  # and to its last token


def _starts(segment_ids: Array | None, reverse: bool, axis_name: str) -> Array | None:
    """bool [B, T], also where a device's first token begins a segment; never for the sequence's first."""
    if segment_ids is None:
        return None
    size, own = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    edge, neighbor, step, first = (-1, 0, -1, size - 1) if reverse else (0, -1, 1, 0)
    sent = segment_ids[:, neighbor]
    before = jax.lax.ppermute(
        sent, axis_name, [(i, i + step) for i in range(size) if 0 <= i + step < size]
    )
    return (
        segment_starts(segment_ids, reverse)
        .at[:, edge]
        .set((segment_ids[:, edge] != before) & (own != first))
    )


def _logs_met(
    q: Array, log_decay: Array | None, starts: Array | None, inclusive: bool, reverse: bool
) -> _Met:
    T = q.shape[1]
    if log_decay is None:
        logs = jnp.zeros((1, T, 1, 1))
    else:
        logs = (
            jnp.broadcast_to(log_decay, (1, T, len(log_decay)))
            if log_decay.ndim == 1
            else log_decay
        )
        logs = logs[..., None] if logs.ndim == 3 else logs
    logs = jnp.maximum(logs.astype(jnp.promote_types(jnp.float32, logs.dtype)), tile.LOG_ZERO)
    emptied = 0.0
    if starts is not None:
        starts = starts[:, :, None, None]
        logs, emptied = (
            jnp.where(starts, tile.LOG_ZERO, logs),
            jnp.where(starts, tile.LOG_ZERO, 0.0),
        )
    sums = _running_sums(logs, reverse)
    total = sums[:, 0] if reverse else sums[:, -1]
    if inclusive:
        return _Met(sums, total)
    shifted = jnp.pad(sums, ((0, 0), (0, 1) if reverse else (1, 0), (0, 0), (0, 0)))
    return _Met((shifted[:, 1:] if reverse else shifted[:, :-1]) + emptied, total)


def _running_sums(logs: Array, reverse: bool) -> Array:
    """Along axis 1. Matmuls in chunks: XLA's cumsum of a long axis is slow on TPU."""
    B, T, *rest = logs.shape
    x = jnp.pad(logs, ((0, 0), (0, -T % CHUNK), (0, 0), (0, 0))).reshape(B, -1, CHUNK, *rest)
    ones = jnp.ones((CHUNK, CHUNK), logs.dtype)
    inside = jnp.einsum(
        "ij,bnj...->bni...", jnp.triu(ones) if reverse else jnp.tril(ones), x, precision="highest"
    )
    ones = jnp.ones((x.shape[1], x.shape[1]), logs.dtype)
    before = jnp.triu(ones, 1) if reverse else jnp.tril(ones, -1)
    chunks_before = jnp.einsum("ij,bj...->bi...", before, x.sum(2), precision="highest")
    return (inside + chunks_before[:, :, None]).reshape(B, -1, *rest)[:, :T]


def _states_of_the_axis(
    log_total: Array, state: Array, first: Array, axis_name: str, reverse: bool
):
    """The state before this device's first token, and the one after the sequence's last: the same on all devices."""
    size, own = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    decays, states = jax.lax.all_gather((jnp.exp(log_total)[..., None], state), axis_name)
    running, before = first, jnp.zeros_like(state)
    for i in range(size)[:: -1 if reverse else 1]:
        before = jnp.where(own == i, running, before)
        running = decays[i] * running + states[i]
    is_last = own == (0 if reverse else size - 1)
    return before, jax.lax.psum(jnp.where(is_last, running, 0.0), axis_name)
