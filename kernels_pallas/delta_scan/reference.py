"""The recurrence of `delta_scan`, one token at a time.

This is the slow truth that every fast path is tested against. Heads are repeated, the state is read
after every token, and autodiff keeps all of the states: slow and large, by intention. Computes in
float32, or in float64 when an input is float64.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.delta_scan.inputs import (
    DeltaInputs,
    DeltaOptions,
    DeltaStepInputs,
    DeltaStepOptions,
)
from kernels_pallas.delta_scan.normalize import l2_normalized
from kernels_pallas.linear_scan.reference import decay_factor, segment_starts


def delta_scan_step(
    inputs: DeltaStepInputs,
    options: DeltaStepOptions,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of the recurrence: returns (o, new state)."""
    state = inputs.state
    dtype = state.dtype
    H = state.shape[1]
    q = repeat_heads(inputs.q, H).astype(dtype)
    k = repeat_heads(inputs.k, H).astype(dtype)
    v = inputs.v.astype(dtype)
    if options.l2_norm:
        q = l2_normalized(q)
        k = l2_normalized(k)

    # The key that reads and erases, and the value that is written.
    if inputs.erase is None:
        assert inputs.beta is not None
        erase = inputs.beta.astype(dtype)[..., None] * k
    else:
        erase = inputs.erase.astype(dtype)
    if inputs.write is None:
        assert inputs.beta is not None
        written = inputs.beta.astype(dtype)[..., None] * v
    else:
        written = inputs.write.astype(dtype) * v

    # S_t = D_t S_{t-1} + k_t^T (u_t - e_t D_t S_{t-1})
    decayed = state
    if inputs.log_decay is not None:
        decayed = decay_factor(inputs.log_decay, dtype) * state
    found = jnp.einsum("bhk,bhkv->bhv", erase, decayed, precision="highest")
    change = written - found
    new_state = decayed + k[..., :, None] * change[..., None, :]
    o = options.scale * jnp.einsum("bhk,bhkv->bhv", q, new_state, precision="highest")
    return o.astype(inputs.v.dtype), new_state


def delta_scan(
    inputs: DeltaInputs,
    options: DeltaOptions,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """As `api.delta_scan`, with the initial state given. Returns (o, final state)."""
    initial_state = inputs.initial_state
    assert initial_state is not None
    # What one token needs of the options.
    step_options = DeltaStepOptions(scale=options.scale, l2_norm=options.l2_norm)
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids, reverse=False)
    return recurrence(inputs[:7], starts, initial_state, step_options)


def recurrence(
    arrays: Sequence[Array | None],
    starts: Bool[Array, "B T"] | None,
    state: Float[Array, "B H K V"],
    options: DeltaStepOptions,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """One token after the other.

    Args:
      arrays: those that run along T, in the order of `DeltaStepInputs`.
      starts: where the state is reset before the token.
      state: before the first token.
      options: of every token.

    Returns:
      (o in v's dtype, the state after the last token).
    """

    def step(state, token):
        arrays, start = token
        if start is not None:
            # A segment starts from an empty state.
            state = jnp.where(start[:, None, None, None], 0.0, state)
        o, new_state = delta_scan_step(DeltaStepInputs(*arrays, state=state), options)
        return new_state, o

    def time_first(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 0)

    tokens = jax.tree.map(time_first, (tuple(arrays), starts))
    final_state, o = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(o, 0, 1), final_state


def recurrence_in_blocks(
    arrays: Sequence[Array | None],
    starts: Bool[Array, "B T"] | None,
    state: Float[Array, "B H K V"],
    options: DeltaStepOptions,
    block_length: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`recurrence` with another backward pass: states before blocks of tokens are kept, and those
    inside of one block at a time. Every program with a fast path has this beside it, for numbers
    that are not finite; the memory for it is set aside whether it is used or not.

    Args:
      arrays, starts, state, options: of `recurrence`.
      block_length: tokens in a block; divides T.

    Returns:
      As `recurrence`.
    """

    def block(state, tokens):
        block_arrays, block_starts = tokens
        o, new_state = recurrence(block_arrays, block_starts, state, options)
        return new_state, o

    def in_blocks(x: Array) -> Array:
        """[B, T, ...] -> [blocks, B, block_length, ...]."""
        blocks = x.reshape(x.shape[0], -1, block_length, *x.shape[2:])
        return jnp.moveaxis(blocks, 1, 0)

    tokens = jax.tree.map(in_blocks, (tuple(arrays), starts))
    final_state, o = jax.lax.scan(jax.checkpoint(block), state, tokens)
    # [blocks, B, block_length, H, V] -> [B, T, H, V]
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:]), final_state
