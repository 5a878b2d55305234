"""Decays of a chunkwise scan on GPU, before and behind the kernels: padded logs, their sums, and
what each log receives on the way back. `linear_scan` and `delta_scan` decay alike.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded
from kernels_pallas.linear_scan.gpu.plan import Plan, padded_tokens
from kernels_pallas.linear_scan.gpu.tile import SUBTOTAL
from kernels_pallas.linear_scan.tile import LOG_ZERO, running_sums


class Decays(NamedTuple):
    """What the chunk-parallel kernels read of the decays. Batch and channels may have size 1.

    Attributes:
      logs: vector decays, as in memory.
      subtotals: sums of SUBTOTAL neighbors of `clamped_logs`, as in memory.
      log_total: of a whole chunk.
      sums: scalar decays: the four rows of sums of `tile.scalar_mask`.
      read_factor, write_factor: scalar decays: start of the chunk -> read, write -> its end.
      starts: vector decays only: 1 where the state is reset.
    """

    logs: Float[Array, "_ T H K"] | None = None
    subtotals: Float[Array, "_ T8 H K"] | None = None
    log_total: Float[Array, "_ H N _"] | None = None
    sums: Float[Array, "_ H N 4 C"] | None = None
    read_factor: Float[Array, "_ H N C"] | None = None
    write_factor: Float[Array, "_ H N C"] | None = None
    starts: Float[Array, "B T"] | None = None

    @property
    def total(self) -> Array | None:
        """The decay of each chunk as the scan kernel reads it: [B, H, N, K], or [B, H, N]."""
        if self.log_total is None:
            return None
        log_total = self.log_total
        if self.logs is None:
            log_total = log_total[..., 0]
        return jnp.exp(log_total)


def padded_logs(
    plan: Plan,
    x: Float[Array, "B T H _"],
    log_decay: Array | None,
    starts: Bool[Array, "B T"] | None,
) -> Array | None:
    """`Inputs.logs`. Differentiable.

    Args:
      plan: the plan of the call.
      x: an array that has the heads of the decays.
      log_decay: as the caller gave it, or None where segments alone decay.
      starts: True where the state is reset before the token.
    """
    if plan.decay == "none":
        return None
    if plan.decay == "vector":
        assert log_decay is not None
        return padded_tokens(plan.T, log_decay, plan.K)
    if log_decay is None:
        # Segments alone.
        zeros = jnp.zeros((1, *x.shape[1:3]), jnp.float32)
        log_decay = varying_like(zeros, x)
    logs = jnp.maximum(log_decay.astype(jnp.float32), LOG_ZERO)
    if starts is not None:
        # The lesser of the two, so that a log that is NaN remains one.
        logs = jnp.where(starts[:, :, None], jnp.minimum(logs, LOG_ZERO), logs)
    heads_first = jnp.swapaxes(logs, 1, 2)
    return plan.in_order(padded(heads_first, 2, plan.T), 2)


def decays_of(plan: Plan, logs: Array | None, starts: Array | None) -> Decays:
    """What the kernels read, of the `logs` and `starts` of `Inputs`.

    Beside q these arrays are small: 1/8 of the logs, or a few numbers a token.
    """
    if plan.decay == "none":
        return Decays()
    assert logs is not None
    if plan.decay == "vector":
        return _vector_decays(plan, logs, starts)
    return _scalar_decays(plan, logs, starts)


def _vector_decays(
    plan: Plan,
    logs: Array,
    starts: Array | None,
) -> Decays:
    rows, _, H, K = logs.shape
    is_start = None
    if starts is not None:
        is_start = plan.in_order(starts, 1)[:, :, None, None] > 0
    # As the kernels do it: never an array of its own.
    clamped = clamped_logs(logs.astype(jnp.float32), is_start)
    eights = clamped.reshape(rows, -1, SUBTOTAL, H, K)
    subtotals = eights.sum(2)
    log_total = subtotals.reshape(rows, plan.chunks, -1, H, K).sum(2)
    log_total = jnp.swapaxes(plan.in_order(log_total, 1), 1, 2)
    return Decays(logs=logs, subtotals=subtotals, starts=starts, log_total=log_total)


def _scalar_decays(
    plan: Plan,
    logs: Array,
    starts: Array | None,
) -> Decays:
    def in_chunks(rows: Array) -> Array:
        return rows.reshape(*rows.shape[:2], plan.chunks, plan.chunk)

    logs = in_chunks(logs)
    reads = logs
    if not plan.inclusive:
        # An exclusive read includes nothing of its own log, but the reset of its segment.
        reads = jnp.zeros_like(logs)
        if starts is not None:
            is_start = in_chunks(starts[:, None]) > 0
            log_zero = jnp.asarray(LOG_ZERO, logs.dtype)
            reads = jnp.where(is_start, log_zero, reads)
            logs = jnp.broadcast_to(logs, reads.shape)
    # Coarse and fine parts, [2, B, H, N, C] each.
    reads, ends = running_sums(logs, reads)
    last = ends[..., -1:]
    return Decays(
        sums=jnp.moveaxis(jnp.concatenate([reads, ends]), 0, 3),
        read_factor=jnp.exp(reads.sum(0)),
        write_factor=jnp.exp((last - ends).sum(0)),
        log_total=last.sum(0),
    )


def clamped_logs(
    logs: Float[Array, "*axes"],
    is_start: Bool[Array, "*broadcast"] | None,
) -> Float[Array, "*axes"]:
    """Logs no less than LOG_ZERO, and LOG_ZERO where a segment starts. NaN and +inf remain."""
    # Comparisons, which are false for NaN: Triton's maximum would leave NaN out.
    is_zero = logs < LOG_ZERO
    if is_start is not None:
        is_zero = is_zero | (is_start & (logs < jnp.inf))
    return jnp.where(is_zero, jnp.asarray(LOG_ZERO, logs.dtype), logs)


def dlogs_of(plan: Plan, logs: Array | None, through: dict[str, Array]) -> Array | None:
    """What each log receives. The formula is `gpu.tile.vector_dlogs`.

    The kernel has done it for vector decays. For scalar ones it left four numbers of each token, in
    blocks of K.
    """
    if plan.decay != "scalar":
        return through.get("dlogs")
    assert logs is not None
    of_tokens = through["rows"].sum(3)
    # [B, H, N, C] each.
    readers, writers, writes, total = jnp.moveaxis(of_tokens, 3, 0)
    later = jnp.triu(jnp.ones((plan.chunk, plan.chunk), jnp.float32), 1)
    balance = readers - writers

    def summed(which: Array, rows: Array) -> Array:
        return jnp.einsum("ij,...j->...i", which, rows, precision="highest")

    own = balance if plan.inclusive else -writers
    dlogs = total + summed(later, balance) + summed(later.T, writes) + own
    dlogs = dlogs.reshape(*dlogs.shape[:2], plan.T)
    if logs.shape[0] == 1:
        # One row of logs for the whole batch.
        return dlogs.sum(0, keepdims=True)
    return dlogs
