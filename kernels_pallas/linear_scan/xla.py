"""`linear_scan` without Pallas: chunks in parallel, states in sequence, memory linear in T both ways.

The sequence is cut into groups of a few chunks. A `lax.scan` over groups carries the state; inside a group the chunks
are computed together (large batched matmuls) and only the state update walks from chunk to chunk. The forward pass
keeps the state at the start of each group; the backward pass is a scan over groups from the last to the first that
recomputes a group from that state and differentiates it with `jax.vjp`. So the gate gradient includes the state's
term by construction, and no sum over T is ever differenced.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts

OUT_NAME = "linear_scan_out"
STATES_NAME = "linear_scan_states"
DEFAULT_CHUNK = 64
MAX_CHUNKS_IN_GROUP = 4


class Plan(NamedTuple):
    """What of a call is static. `chunks` is the number of chunks in a group."""

    inclusive: bool
    scale: float
    chunk: int
    chunks: int
    out_dtype: jnp.dtype


class Inputs(NamedTuple):
    """The arrays that run along T, in the order of the recurrence: any T, padded inside."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    log_decay: Float[Array, "#B T H"] | Float[Array, "#B T H K"] | None
    starts: Bool[Array, "B T"] | None


def linear_scan(inputs: ScanInputs, options: ScanOptions) -> tuple[Array, Array]:
    """As `api.linear_scan`, with the state given and log_decay None, [B, T, H] or [B, T, H, K] (B may be 1).

    Brings `reverse` and `normalize` to the one recurrence of `_scan`: a flip, and a column of ones.
    """
    q, k, v, log_decay, bonus, initial_state, segment_ids = inputs
    inclusive, scale, reverse, normalize, chunk_size, _ = options
    out_dtype = v.dtype
    if normalize:
        v = append_ones(v)
    starts = None if segment_ids is None else segment_starts(segment_ids, reverse)
    tokens = Inputs(q, k, v, log_decay, starts)
    if reverse:
        tokens = jax.tree.map(lambda x: jnp.flip(x, 1), tokens)
    chunk, chunks = _cut(tokens, chunk_size)
    # The two halves of a ratio keep float32 until they are divided.
    plan = Plan(
        inclusive,
        1.0 if normalize else scale,
        chunk,
        chunks,
        initial_state.dtype if normalize else out_dtype,
    )
    o, final_state = _scan(plan, tokens, bonus, initial_state)
    if reverse:
        o = jnp.flip(o, 1)
    return (divide_by_last(o).astype(out_dtype) if normalize else o), final_state


def _cut(inputs: Inputs, chunk_size: int | None) -> tuple[int, int]:
    """Tokens in a chunk and chunks in a group: for every rank of log_decay within 10 to 20 % of the fastest on CPU.

    Groups of one chunk cost up to 1.6 x, groups of sixteen up to 1.8 x. Groups are made equal, so that padding stays
    below a chunk a group.
    """
    T = inputs.q.shape[1]
    chunk = min(chunk_size or DEFAULT_CHUNK, 1 << (T - 1).bit_length())
    num_chunks = -(-T // chunk)
    num_groups = -(-num_chunks // MAX_CHUNKS_IN_GROUP)
    return chunk, -(-num_chunks // num_groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    plan: Plan, inputs: Inputs, bonus: Float[Array, "H K"] | None, state: Float[Array, "B H K V"]
):
    """Returns (o [B, T, H, V] in plan.out_dtype, final state). The state's dtype is the dtype of computation."""
    (o, final_state), _ = _forward(plan, inputs, bonus, state, save=False)
    return o, final_state


def _forward(plan: Plan, inputs: Inputs, bonus, state, save: bool):
    inputs, state = opaque((inputs, state))

    def step(state, group):
        o, new_state = _group(plan, group, bonus, state)
        return new_state, (o.astype(plan.out_dtype), state if save else None)

    final_state, (o, states) = jax.lax.scan(step, state, _split(plan, inputs))
    return (_join(o, inputs.q.shape[1]), final_state), states


def _forward_saving(plan: Plan, inputs: Inputs, bonus, state):
    (o, final_state), states = _forward(plan, inputs, bonus, state, save=True)
    outputs = checkpoint_name(o, OUT_NAME), final_state
    return outputs, (inputs, bonus, checkpoint_name(states, STATES_NAME))


def _backward(plan: Plan, residuals, cotangents):
    inputs, bonus, states = residuals
    inputs, states, (do, dstate) = opaque((inputs, states, cotangents))

    def step(carry, x):
        dstate, dbonus = carry
        group, state, do = x
        starts = group.starts

        def run(group, bonus, state):
            return _group(plan, group._replace(starts=starts), bonus, state)

        _, vjp = jax.vjp(run, group._replace(starts=None), bonus, state)
        dgroup, dbonus_here, dstate = vjp((do.astype(state.dtype), dstate))
        return (dstate, jax.tree.map(jnp.add, dbonus, dbonus_here)), dgroup

    no_bonus = jax.tree.map(lambda x: varying_like(jnp.zeros_like(x), dstate), bonus)
    groups, do = _split(plan, inputs), _split(plan, do)
    (dstate, dbonus), dgroups = jax.lax.scan(
        step, (dstate, no_bonus), (groups, states, do), reverse=True
    )
    return jax.tree.map(lambda x: _join(x, inputs.q.shape[1]), dgroups), dbonus, dstate


_scan.defvjp(_forward_saving, _backward)


def _split(plan: Plan, arrays):
    """[B, T, ...] -> [N, B, L, ...], L tokens a group. Zeros at the end: an undecayed token that writes nothing."""
    length = plan.chunk * plan.chunks

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def _join(x: Array, length: int) -> Array:
    """[N, B, L, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _group(plan: Plan, group: Inputs, bonus, state):
    """A group of chunks: returns (o [B, L, H, V], new state), in the state's dtype. `Inputs` of length L."""
    H, dtype = group.q.shape[2], state.dtype
    # 16-bit inputs are exact in one bfloat16 or TF32 pass where such a pass is the default; float32 inputs are not.
    precision = "highest" if group.q.dtype.itemsize > 2 else None
    q, k, v = (_chunks(plan, x, H).astype(dtype) for x in group[:3])
    q = q * plan.scale
    scores, reads, writes, total = _tile(plan, group, q, k, precision)
    if plan.inclusive or bonus is not None:
        weight = None if plan.inclusive else bonus.astype(dtype)[:, None, None, :]
        scores = scores + tile.own_scores(q, k, weight)[..., None] * jnp.eye(
            plan.chunk, dtype=dtype
        )
    matmul = partial(jnp.einsum, precision=precision)
    updates = matmul("bhnck,bhncv->bhnkv", writes, v)
    state_reads = []
    for n in range(plan.chunks):
        state_reads.append(state)
        state = total[:, :, n, :, None] * state + updates[:, :, n]
    o = matmul("bhnij,bhnjv->bhniv", scores, v) + matmul(
        "bhnck,bhnkv->bhncv", reads, jnp.stack(state_reads, 2)
    )
    return jnp.moveaxis(o.reshape(*o.shape[:2], -1, o.shape[-1]), 1, 2), state


def _tile(plan: Plan, group: Inputs, q, k, precision):
    """Calls the tile that the kind of decay asks for. [B, H, n, C, K] arrays."""
    if group.log_decay is None and group.starts is None:
        return tile.undecayed(q, k, precision)
    if group.log_decay is None:
        log_decay = jnp.zeros((*group.starts.shape, 1), q.dtype)
    else:
        log_decay = jnp.maximum(group.log_decay.astype(q.dtype), tile.LOG_ZERO)
    log_read = log_decay if plan.inclusive else jnp.zeros_like(log_decay)
    if group.starts is not None:
        starts = group.starts.reshape(*group.starts.shape, *(1,) * (log_decay.ndim - 2))
        log_decay, log_read = (jnp.where(starts, tile.LOG_ZERO, x) for x in (log_decay, log_read))
    if log_decay.ndim == 4:
        log_decay, log_read = (_chunks(plan, x, x.shape[2]) for x in (log_decay, log_read))
        return tile.vector_decay(q, k, log_decay, log_read, precision)
    log_decay, log_read = (
        _chunks(plan, x[..., None], x.shape[2])[..., 0] for x in (log_decay, log_read)
    )
    return tile.scalar_decay(q, k, log_decay, log_read, precision)


def _chunks(plan: Plan, x: Array, num_heads: int) -> Array:
    """[B, L, Hx, D] -> [B, H, n, C, D]: heads repeated over one group only, never over T."""
    B, _, heads, D = x.shape
    x = jnp.moveaxis(x.reshape(B, plan.chunks, plan.chunk, heads, D), 3, 1)
    return jnp.repeat(x, num_heads // heads, axis=1)


def linear_scan_step(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hv, V], state [B, H, K, V]. Returns (o [B, H, V], new state)."""
    q, k, v, log_decay, bonus, state = inputs
    inclusive, scale, normalize = options
    H, dtype, out_dtype = q.shape[1], state.dtype, v.dtype
    v, state = opaque((v, state))
    if normalize:
        v, scale = append_ones(v), 1.0
    q, k, v = (jnp.repeat(x, H // x.shape[1], axis=1).astype(dtype) for x in (q, k, v))
    q = q * scale
    new_state = k[..., :, None] * v[..., None, :]
    if log_decay is None:
        new_state += state
    else:
        decay = jnp.exp(log_decay.astype(dtype))
        new_state += decay.reshape(*decay.shape[:2], -1, 1) * state
    o = jnp.einsum("bhk,bhkv->bhv", q, new_state if inclusive else state, precision="highest")
    if bonus is not None:  # the token's own write, without an array as large as the state
        o += tile.own_scores(q, k, bonus.astype(dtype))[..., None] * v
    return (divide_by_last(o) if normalize else o).astype(out_dtype), new_state
