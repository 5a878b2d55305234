"""The recurrence of `linear_scan`, one token at a time.

This is the slow truth that every fast path is tested against. Heads are repeated, the state is read
after every token, and autodiff keeps all of the states: slow and large, by intention. Computes in
float32, or in float64 when an input is float64.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import away_from_zero


def linear_scan_step(
    inputs: StepInputs,
    options: StepOptions,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K Vs"]]:
    """One token of the recurrence: returns (o, new state)."""
    state = inputs.state
    dtype = state.dtype
    out_dtype = inputs.v.dtype
    H = inputs.q.shape[1]
    # Grouped heads: query head h uses key head h // (H / Hk), and likewise for values.
    q = inputs.q.astype(dtype)
    k = repeat_heads(inputs.k, H).astype(dtype)
    v = repeat_heads(inputs.v, H).astype(dtype)
    if options.normalize:
        ones = jnp.ones_like(v[..., :1])
        v = jnp.concatenate([v, ones], axis=-1)

    # S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, where k_t^T v_t is an outer product [K, V].
    write = k[..., :, None] * v[..., None, :]
    decayed = state
    if inputs.log_decay is not None:
        decayed = decay_factor(inputs.log_decay, dtype) * state
    new_state = decayed + write

    # What the query reads: S_t, or S_{t-1} + diag(bonus) k_t^T v_t.
    if options.inclusive:
        read = new_state
    elif inputs.bonus is None:
        read = state
    else:
        read = state + inputs.bonus.astype(dtype)[None, :, :, None] * write
    o = jnp.einsum("bhk,bhkv->bhv", q, read)

    if options.normalize:
        numerator = o[..., :-1]
        o = numerator / away_from_zero(o[..., -1:])
    else:
        o = options.scale * o
    return o.astype(out_dtype), new_state


def linear_scan(
    inputs: ScanInputs,
    options: ScanOptions,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K Vs"]]:
    """As `api.linear_scan`, with the initial state given. Returns (o, final state)."""
    initial_state = inputs.initial_state
    assert initial_state is not None
    B, T = inputs.q.shape[:2]
    if inputs.segment_ids is None:
        starts = jnp.zeros((B, T), bool)
    else:
        starts = segment_starts(inputs.segment_ids, options.reverse)
    # What one token needs of the options.
    step_options = StepOptions(
        inclusive=options.inclusive,
        scale=options.scale,
        normalize=options.normalize,
    )

    def step(state, token):
        q, k, v, log_decay, start = token
        # A segment starts from an empty state.
        state = jnp.where(start[:, None, None, None], 0.0, state)
        step_inputs = StepInputs(
            q=q,
            k=k,
            v=v,
            log_decay=log_decay,
            bonus=inputs.bonus,
            state=state,
        )
        o, new_state = linear_scan_step(step_inputs, step_options)
        return new_state, o

    def time_first(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 0)

    arrays = (inputs.q, inputs.k, inputs.v, inputs.log_decay, starts)
    tokens = jax.tree.map(time_first, arrays)
    final_state, o = jax.lax.scan(
        step,
        initial_state,
        tokens,
        reverse=options.reverse,
    )
    return jnp.moveaxis(o, 0, 1), final_state


def segment_starts(segment_ids: Int[Array, "B T"], reverse: bool) -> Bool[Array, "B T"]:
    """Where the state is reset before the token.

    Never at the first token of the recurrence (the last one of the row with `reverse`): that token
    reads `initial_state`.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    # Padded with False at the first token of the recurrence.
    first_token = (0, 1) if reverse else (1, 0)
    return jnp.pad(changes, ((0, 0), first_token))


def decay_factor(log_decay: Array, dtype: jnp.dtype) -> Array:
    """[B, H] or [B, H, K], to a factor that broadcasts over the state [B, H, K, V]."""
    decay = jnp.exp(log_decay.astype(dtype))
    B, H = decay.shape[:2]
    return decay.reshape(B, H, -1, 1)
