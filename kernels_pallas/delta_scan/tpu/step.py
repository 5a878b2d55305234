"""One decoding step of `delta_scan` on TPU: every state is read once, written once, in place.

    S' = D S + k^T (u - e D S)
    o = scale q S'

The kernel is that of `linear_scan/tpu/step.py`. A step is bound by moving the states; keys and
weights are made by XLA, and the arithmetic is element-wise, in float32.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.common.tpu import LANES, SUBLANES
from kernels_pallas.delta_scan.inputs import DeltaStepInputs, DeltaStepOptions
from kernels_pallas.delta_scan.normalize import l2_normalized
from kernels_pallas.linear_scan.tpu.step import update_states


def unsupported(inputs: DeltaStepInputs) -> str | None:
    """Why this backend cannot take one decoding step, or None when it can."""
    if any(x is not None and x.dtype == jnp.float64 for x in inputs):
        return "does not compute in float64"
    return None


def delta_scan_step(
    inputs: DeltaStepInputs,
    options: DeltaStepOptions,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """As `api.delta_scan_step`: returns (o, new state)."""
    B, H, K, _ = inputs.state.shape
    q = repeat_heads(inputs.q.astype(jnp.float32), H)
    k = repeat_heads(inputs.k.astype(jnp.float32), H)
    v = inputs.v.astype(jnp.float32)
    if options.l2_norm:
        q = l2_normalized(q)
        k = l2_normalized(k)
    erase = _weighted(k, inputs.beta, inputs.erase, is_whole=True)
    written = _weighted(v, inputs.beta, inputs.write, is_whole=False)

    # What belongs to a state as rows of one array, a register high.
    decay = jnp.zeros_like(q)
    if inputs.log_decay is not None:
        decay = jnp.exp(inputs.log_decay.astype(jnp.float32))
        # [B, H] or [B, H, K]
        decay = jnp.broadcast_to(decay.reshape(B, H, -1), (B, H, K))
    rows = [options.scale * q, k, decay, erase]
    packed = jnp.stack(rows, axis=2)
    missing_rows = SUBLANES - len(rows)
    missing_lanes = -K % LANES
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, missing_rows), (0, missing_lanes)))
    read, new_state = update_states(
        packed,
        written[:, :, None],
        inputs.state,
        is_decayed=inputs.log_decay is not None,
        inclusive=True,
        interpret=interpret,
        erases=True,
    )
    return read[:, :, 0].astype(inputs.v.dtype), new_state


def _weighted(
    x: Float[Array, "B H D"],
    beta: Float[Array, "B H"] | None,
    own: Float[Array, "B H D"] | None,
    is_whole: bool,
) -> Float[Array, "B H D"]:
    """beta x, or what was given in its place: all of it (`is_whole`), or the weight of x."""
    if own is None:
        # api.py has checked that there is a weight.
        assert beta is not None
        return beta.astype(jnp.float32)[..., None] * x
    own = own.astype(jnp.float32)
    return own if is_whole else own * x
