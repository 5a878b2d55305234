"""The recurrence of `linear_scan`, one token at a time: the readable truth that every fast path is tested against.

Heads are repeated, the state is read after every token and autodiff keeps all of it: slow and large, by intention.
Computes in float32, or in float64 when an input is float64.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import DENOMINATOR_FLOOR


def linear_scan_step(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hv, V], state [B, H, K, V]. Returns (o [B, H, V], new state)."""
    q, k, v, log_decay, bonus, state = inputs
    inclusive, scale, normalize = options
    H, dtype, out_dtype = q.shape[1], state.dtype, v.dtype
    q, k, v = q.astype(dtype), _repeat_heads(k, H).astype(dtype), _repeat_heads(v, H).astype(dtype)
    if normalize:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    write = k[..., :, None] * v[..., None, :]
    decayed = state if log_decay is None else _decay(log_decay, dtype) * state
    new_state = decayed + write
    if inclusive:
        read = new_state
    else:
        read = state if bonus is None else state + bonus.astype(dtype)[:, :, None] * write
    o = jnp.einsum("bhk,bhkv->bhv", q, read)
    if normalize:
        o = o[..., :-1] / jnp.maximum(jnp.abs(o[..., -1:]), DENOMINATOR_FLOOR)
    else:
        o = scale * o
    return o.astype(out_dtype), new_state


def linear_scan(inputs: ScanInputs, options: ScanOptions) -> tuple[Array, Array]:
    """As `api.linear_scan`, with the state given and log_decay None, [B, T, H] or [B, T, H, K] (B may be 1)."""
    q, k, v, log_decay, bonus, initial_state, segment_ids = inputs
    reverse = options.reverse
    step_options = StepOptions(options.inclusive, options.scale, options.normalize)
    B, T = q.shape[:2]
    starts = (
        jnp.zeros((B, T), bool) if segment_ids is None else segment_starts(segment_ids, reverse)
    )

    def step(state, token):
        *token, start = token
        state = jnp.where(start[:, None, None, None], 0.0, state)
        o, state = linear_scan_step(StepInputs(*token, bonus, state), step_options)
        return state, o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, starts))
    final_state, o = jax.lax.scan(step, initial_state, tokens, reverse=reverse)
    return jnp.moveaxis(o, 0, 1), final_state


def segment_starts(segment_ids: Array, reverse: bool) -> Array:
    """bool [B, T]: where the state is emptied before the token. Not at the first token met: it owns initial_state."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (0, 1) if reverse else (1, 0)))


def _decay(log_decay: Array, dtype) -> Array:
    """[B, H] or [B, H, K], to a factor that broadcasts over the state [B, H, K, V]."""
    decay = jnp.exp(log_decay.astype(dtype))
    return decay.reshape(*decay.shape[:2], -1, 1)


def _repeat_heads(x: Array, num_heads: int) -> Array:
    return jnp.repeat(x, num_heads // x.shape[1], axis=1)
