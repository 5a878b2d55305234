"""One decoding step of `linear_scan` on TPU: every state is read once, written once, in place.

    S' = diag(exp(g)) S + k^T v
    o = scale q S'                            inclusive
    o = scale (q S + (q bonus k) v)           exclusive

A step is bound by moving the states. Everything else is packed into one small array of rows by XLA,
and the arithmetic is element-wise, in float32, so nothing is rounded by the matrix unit.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import LANES, SUBLANES, VMEM_LIMIT, in_hbm, interpret_params
from kernels_pallas.linear_scan.inputs import StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last

# The states of a grid step; input and output, each twice in flight: 8 MiB of VMEM.
STATE_BYTES_IN_STEP = 2**21


def unsupported(inputs: StepInputs, options: StepOptions) -> str | None:
    """Why this backend cannot take one decoding step, or None when it can."""
    if any(x is not None and x.dtype == jnp.float64 for x in inputs):
        return "does not compute in float64"
    return None


def linear_scan_step(
    inputs: StepInputs,
    options: StepOptions,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K Vs"]]:
    """As `api.linear_scan_step`: returns (o, new state)."""
    B, H, K = inputs.q.shape
    out_dtype = inputs.v.dtype
    v = inputs.v
    if options.normalize:
        v = append_ones(v)
    q = repeat_heads(inputs.q.astype(jnp.float32), H)
    k = repeat_heads(inputs.k.astype(jnp.float32), H)
    v = repeat_heads(v.astype(jnp.float32), H)
    # The bonus's part below is scaled too.
    q = q * options.scale

    # q, k and the decay as rows of one array, a register high.
    rows = [q, k]
    is_decayed = inputs.log_decay is not None
    if inputs.log_decay is not None:
        decay = jnp.exp(inputs.log_decay.astype(jnp.float32))
        if decay.ndim == 2:
            # One decay for all channels of a head.
            decay = decay[..., None]
        rows.append(jnp.broadcast_to(decay, (B, H, K)))
    # [B, H, 2 or 3, K], padded to whole registers.
    packed = jnp.stack(rows, axis=2)
    missing_rows = SUBLANES - packed.shape[2]
    missing_lanes = -K % LANES
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, missing_rows), (0, missing_lanes)))

    read, new_state = update_states(
        packed,
        v[:, :, None],
        inputs.state,
        is_decayed,
        options.inclusive,
        interpret,
    )
    o = read[:, :, 0]
    if inputs.bonus is not None:
        bonus = inputs.bonus.astype(jnp.float32)[None]
        # The exclusive read of the token's own write.
        o += jnp.sum(q * bonus * k, axis=-1, keepdims=True) * v
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), new_state


def update_states(
    rows: Float[Array, "B H 8 lanes"],
    v: Float[Array, "B H 1 V"],
    state: Float[Array, "B H K V"],
    is_decayed: bool,
    inclusive: bool,
    interpret: bool,
    erases: bool = False,
) -> tuple[Float[Array, "B H 1 V"], Float[Array, "B H K V"]]:
    """Runs the kernel.

    The grid is (blocks of B, blocks of heads); a step holds as many states as fit. A loop over them
    multiplies and adds whole states, with the rows transposed so that each is a column of K.

    Args:
      rows: q, k and the decay, if `is_decayed`; the erase key of the delta rule is the fourth row.
      v: the values.
      state: the states, which are updated in place.
      is_decayed: whether there is a decay.
      inclusive: whether q reads the new state.
      interpret: run in interpret mode.
      erases: whether what the erase key finds in the decayed state is taken from v (`delta_scan`).

    Returns:
      (q S' or q S, S').
    """
    B, H, K, V = state.shape
    # Blocks divide B and H, so that no step is partly outside.
    max_states = max(1, STATE_BYTES_IN_STEP // (K * V * 4))
    heads = _largest_divisor(H, max_states)
    batch = _largest_divisor(B, max_states // heads)

    def kernel(rows_ref, v_ref, state_ref, o_ref, new_state_ref):
        def update(i, _):
            # Row and head of the block.
            index = i // heads, i % heads
            # [8, K padded] -> [K, 8]: q, k and the decay as columns beside a state [K, V].
            columns = jnp.transpose(rows_ref[index])[:K]
            q = columns[:, :1]
            k = columns[:, 1:2]
            decay = columns[:, 2:3]
            old_state = state_ref[index]
            decayed = old_state * decay if is_decayed else old_state
            change = v_ref[index]
            if erases:
                erase = columns[:, 3:4]
                change -= jnp.sum(erase * decayed, axis=0, keepdims=True)
            new_state = decayed + k * change
            new_state_ref[index] = new_state
            read_state = new_state if inclusive else old_state
            o_ref[index] = jnp.sum(q * read_state, axis=0, keepdims=True)
            return 0

        jax.lax.fori_loop(0, batch * heads, update, 0, unroll=8)

    def spec(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((batch, heads, *shape), lambda b, h: (b, h, 0, 0))

    compiler_params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel"),
        vmem_limit_bytes=VMEM_LIMIT,
    )
    # Five operations for an element of the state, which is read and written once; two to erase.
    num_moved = 2 * state.size + rows.size + 2 * v.size
    cost = pl.CostEstimate(
        flops=(7 if erases else 5) * state.size,
        transcendentals=0,
        bytes_accessed=4 * num_moved,
    )
    run = pl.pallas_call(
        kernel,
        grid=(B // batch, H // heads),
        in_specs=[spec(SUBLANES, rows.shape[3]), spec(1, V), spec(K, V)],
        out_specs=[spec(1, V), spec(K, V)],
        out_shape=[like(v, v.shape, v.dtype), like(state, state.shape, state.dtype)],
        # The state, input 2, becomes output 1.
        input_output_aliases={2: 1},
        compiler_params=compiler_params,
        cost_estimate=cost,
        interpret=interpret_params(interpret, state),
        name="delta_scan_step" if erases else "linear_scan_step",
    )
    return run(rows, v, in_hbm(state, interpret))


def _largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)
