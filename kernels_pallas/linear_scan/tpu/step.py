"""One decoding step of `linear_scan` on TPU: every state is read once, written once, in place.

    S' = diag(exp(g)) S + k^T v;  o = scale q S', or exclusive scale (q S + (q bonus k) v)

A step is bound by moving the states: everything else is packed into one small row array by XLA, and the arithmetic is
element-wise, in float32, so nothing is rounded by the matrix unit.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import VMEM_LIMIT, in_hbm
from kernels_pallas.linear_scan.inputs import StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last

STATE_BYTES_IN_STEP = 2**21  # a grid step's states; in and out, each twice in flight: 8 MiB
ROWS, LANES = 8, 128


def unsupported(inputs: StepInputs, options: StepOptions) -> str | None:
    """Why this backend cannot take one decoding step, or None when it can."""
    if any(x is not None and x.dtype == jnp.float64 for x in inputs):
        return "does not compute in float64"
    return None


def linear_scan_step(
    inputs: StepInputs, options: StepOptions, *, interpret: bool = False
) -> tuple[Array, Array]:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hv, V], state [B, H, K, V]. Returns (o [B, H, V], new state)."""
    q, k, v, log_decay, bonus, state = inputs
    inclusive, scale, normalize = options
    (B, H, K), out_dtype = q.shape, v.dtype
    if normalize:
        v, scale = append_ones(v), 1.0
    q, k, v = (jnp.repeat(x.astype(jnp.float32), H // x.shape[1], axis=1) for x in (q, k, v))
    q = q * scale
    rows = [q, k]
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(jnp.float32))
        rows.append(jnp.broadcast_to(decay[..., None] if decay.ndim == 2 else decay, (B, H, K)))
    rows = jnp.stack(rows, axis=2)
    padding = ((0, 0), (0, 0), (0, ROWS - rows.shape[2]), (0, -K % LANES))
    read, new_state = _call(
        jnp.pad(rows, padding), v[:, :, None], state, log_decay is not None, inclusive, interpret
    )
    o = read[:, :, 0]
    if bonus is not None:
        o += jnp.sum(q * bonus.astype(jnp.float32) * k, axis=-1, keepdims=True) * v
    return (divide_by_last(o) if normalize else o).astype(out_dtype), new_state


def _call(
    rows: Array, v: Array, state: Array, decayed: bool, inclusive: bool, interpret
) -> tuple[Array, Array]:
    """(q S' or q S [B, H, 1, V], S'). rows [B, H, 8, K padded]: q, k and, if `decayed`, the decay."""
    B, H, K, V = state.shape
    most = max(1, STATE_BYTES_IN_STEP // (K * V * 4))
    heads = max(n for n in range(1, min(H, most) + 1) if H % n == 0)
    batch = max(n for n in range(1, min(B, most // heads) + 1) if B % n == 0)

    def kernel(rows_ref, v_ref, state_ref, o_ref, new_ref):
        def one(i, _):
            where = i // heads, i % heads
            columns = jnp.transpose(rows_ref[where])[:K]
            old = state_ref[where]
            new = old * columns[:, 2:3] if decayed else old
            new = new + columns[:, 1:2] * v_ref[where]
            new_ref[where] = new
            o_ref[where] = jnp.sum(
                columns[:, :1] * (new if inclusive else old), axis=0, keepdims=True
            )
            return 0

        jax.lax.fori_loop(0, batch * heads, one, 0, unroll=8)

    spec = lambda *shape: pl.BlockSpec((batch, heads, *shape), lambda b, h: (b, h, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=(B // batch, H // heads),
        in_specs=[spec(ROWS, rows.shape[3]), spec(1, V), spec(K, V)],
        out_specs=[spec(1, V), spec(K, V)],
        out_shape=[like(x, x.shape, x.dtype) for x in (v, state)],
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            5 * state.size, 0, 4 * (2 * state.size + rows.size + 2 * v.size)
        ),
        interpret=interpret,
        name="linear_scan_step",
    )(rows, v, in_hbm(state, interpret))
