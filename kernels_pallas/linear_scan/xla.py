"""`linear_scan` without Pallas: chunks in parallel, states in sequence.

Memory is linear in T, forward and backward. The sequence is split into groups of a few chunks. A
`lax.scan` over groups carries the state; inside a group (`group.py`) the chunks are computed
together (large batched matmuls) and only the state update goes from chunk to chunk. The forward
pass keeps the state at the start of each group. The backward pass is a scan over groups from the
last to the first that recomputes a group from that state and differentiates it with `jax.vjp`. So
the gate gradient includes the state's term by construction, and no sum over T is ever differenced.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from kernels_pallas.common.chunks import grouping, join_groups, split_into_groups
from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.group import Plan, Tokens, group_gradients, group_output
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts

# Names of `checkpoint_name`, for policies that save these arrays instead of recomputing the op.
OUT_NAME = "linear_scan_out"
STATES_NAME = "linear_scan_states"


def linear_scan(
    inputs: ScanInputs,
    options: ScanOptions,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K Vs"]]:
    """As `api.linear_scan`, with the initial state given. Returns (o, final state).

    `normalize` is a column of ones, and a division.
    """
    initial_state = inputs.initial_state
    assert initial_state is not None
    out_dtype = inputs.v.dtype
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids, options.reverse)
    tokens = Tokens(
        q=inputs.q,
        k=inputs.k,
        v=append_ones(inputs.v) if options.normalize else inputs.v,
        log_decay=inputs.log_decay,
        starts=starts,
    )
    # Numerator and denominator keep float32 until they are divided.
    o, final_state = recurrence(
        tokens,
        inputs.bonus,
        initial_state,
        inclusive=options.inclusive,
        scale=options.scale,
        reverse=options.reverse,
        chunk_size=options.chunk_size,
        out_dtype=initial_state.dtype if options.normalize else out_dtype,
    )
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), final_state


def recurrence(
    tokens: Tokens,
    bonus: Float[Array, "H K"] | None,
    state: Float[Array, "B H K V"],
    *,
    inclusive: bool,
    scale: float,
    reverse: bool,
    chunk_size: int | None,
    out_dtype: jnp.dtype,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence, from the first token to the last or with `reverse` the other way.

    Args:
      tokens: what runs along T.
      bonus, inclusive, scale, reverse, chunk_size: as in `api.linear_scan`.
      state: the initial state, in the dtype of the computation.
      out_dtype: of o.

    Returns:
      (o, final state).
    """
    if reverse:
        tokens = jax.tree.map(_flip_time, tokens)
    groups = grouping(tokens.q.shape[1], chunk_size)
    plan = Plan(
        inclusive=inclusive,
        scale=scale,
        groups=groups,
        out_dtype=jnp.dtype(out_dtype),
    )
    o, final_state = _scan(plan, tokens, bonus, state)
    if reverse:
        o = _flip_time(o)
    return o, final_state


def _flip_time(x: Array) -> Array:
    return jnp.flip(x, 1)


# --- the recurrence over groups, and its derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    plan: Plan,
    tokens: Tokens,
    bonus: Float[Array, "H K"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Returns (o in plan.out_dtype, final state). The state's dtype is that of the computation."""
    (o, final_state), _ = _forward(plan, tokens, bonus, state, save=False)
    return o, final_state


def _forward(
    plan: Plan,
    tokens: Tokens,
    bonus: Array | None,
    state: Array,
    save: bool,
) -> tuple[tuple[Array, Array], Array | None]:
    """Returns (o, final state), and if `save` the states before each group [N, B, H, K, V]."""
    # See `common/opaque.py`: XLA on CPU must not see that an empty state is a broadcast.
    tokens, state = opaque((tokens, state))

    def step(state, group):
        o, new_state = group_output(plan, group, bonus, state)
        saved_state = state if save else None
        return new_state, (o.astype(plan.out_dtype), saved_state)

    groups = split_into_groups(plan.groups, tokens)
    final_state, (o, states) = jax.lax.scan(step, state, groups)
    T = tokens.q.shape[1]
    return (join_groups(o, T), final_state), states


def _forward_saving(
    plan: Plan,
    tokens: Tokens,
    bonus: Array | None,
    state: Array,
):
    (o, final_state), states = _forward(
        plan,
        tokens,
        bonus,
        state,
        save=True,
    )
    outputs = (checkpoint_name(o, OUT_NAME), final_state)
    residuals = (tokens, bonus, checkpoint_name(states, STATES_NAME))
    return outputs, residuals


def _backward(plan: Plan, residuals, cotangents):
    tokens, bonus, states = residuals
    tokens, states, (do, dfinal_state) = opaque((tokens, states, cotangents))

    def step(carry, group_arrays):
        dstate, dbonus = carry
        group, state, do = group_arrays
        dgroup, dbonus_of_group, dstate = group_gradients(
            plan,
            group,
            bonus,
            state,
            do.astype(state.dtype),
            dstate,
        )
        dbonus = jax.tree.map(jnp.add, dbonus, dbonus_of_group)
        return (dstate, dbonus), dgroup

    def zeros_of(x: Array) -> Array:
        return varying_like(jnp.zeros_like(x), dfinal_state)

    # Maps over trees: None where there is no bonus.
    dbonus = jax.tree.map(zeros_of, bonus)
    groups = split_into_groups(plan.groups, tokens)
    do = split_into_groups(plan.groups, do)
    (dstate, dbonus), dgroups = jax.lax.scan(
        step,
        (dfinal_state, dbonus),
        (groups, states, do),
        reverse=True,
    )
    T = tokens.q.shape[1]
    dtokens = jax.tree.map(lambda x: join_groups(x, T), dgroups)
    return dtokens, dbonus, dstate


_scan.defvjp(_forward_saving, _backward)


# --- one token


def linear_scan_step(
    inputs: StepInputs,
    options: StepOptions,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K Vs"]]:
    """As `api.linear_scan_step`: returns (o, new state)."""
    H = inputs.q.shape[1]
    dtype = inputs.state.dtype
    out_dtype = inputs.v.dtype
    v, state = opaque((inputs.v, inputs.state))
    if options.normalize:
        v = append_ones(v)
    q = inputs.q.astype(dtype) * options.scale
    k = repeat_heads(inputs.k, H).astype(dtype)
    v = repeat_heads(v, H).astype(dtype)

    # k^T v, then the decayed state.
    new_state = k[..., :, None] * v[..., None, :]
    if inputs.log_decay is None:
        new_state += state
    else:
        decay = jnp.exp(inputs.log_decay.astype(dtype))
        # [B, H] or [B, H, K] -> [B, H, 1 or K, 1]
        decay = decay.reshape(*decay.shape[:2], -1, 1)
        new_state += decay * state
    read = new_state if options.inclusive else state
    o = jnp.einsum("bhk,bhkv->bhv", q, read, precision="highest")
    if inputs.bonus is not None:
        # The token's own write, without an array as large as the state.
        weight = tile.diagonal_scores(q, k, inputs.bonus.astype(dtype))
        o += weight[..., None] * v
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), new_state
