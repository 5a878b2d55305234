"""`linear_scan` without Pallas: chunks in parallel, states in sequence.

Memory is linear in T, forward and backward. The sequence is split into groups of a few chunks. A
`lax.scan` over groups carries the state; inside a group the chunks are computed together (large
batched matmuls) and only the state update goes from chunk to chunk. The forward pass keeps the
state at the start of each group. The backward pass is a scan over groups from the last to the first
that recomputes a group from that state and differentiates it with `jax.vjp`. So the gate gradient
includes the state's term by construction, and no sum over T is ever differenced.
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
from kernels_pallas.common.padding import padded, power_of_two, round_up
from kernels_pallas.linear_scan import tile
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last
from kernels_pallas.linear_scan.reference import segment_starts

# Names of `checkpoint_name`, for policies that save these arrays instead of recomputing the op.
OUT_NAME = "linear_scan_out"
STATES_NAME = "linear_scan_states"

DEFAULT_CHUNK = 64
MAX_CHUNKS_IN_GROUP = 4


class Plan(NamedTuple):
    """The static arguments of the recurrence."""

    inclusive: bool
    scale: float
    chunk: int  # tokens in a chunk
    chunks: int  # chunks in a group
    out_dtype: jnp.dtype


class Tokens(NamedTuple):
    """The arrays that run along T, in the order of the recurrence. Any T: padding is inside."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    log_decay: Float[Array, "#B T H"] | Float[Array, "#B T H K"] | None
    starts: Bool[Array, "B T"] | None


def linear_scan(
    inputs: ScanInputs,
    options: ScanOptions,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K Vs"]]:
    """As `api.linear_scan`, with the initial state given. Returns (o, final state).

    Reduces `reverse` (a flip) and `normalize` (a column of ones) to the one recurrence of `_scan`.
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
    if options.reverse:
        tokens = jax.tree.map(_flip_time, tokens)

    # From here on the recurrence runs from the first token to the last.
    chunk, chunks = _chunks_and_groups(inputs.q.shape[1], options.chunk_size)
    plan = Plan(
        inclusive=options.inclusive,
        scale=options.scale,
        chunk=chunk,
        chunks=chunks,
        # Numerator and denominator keep float32 until they are divided.
        out_dtype=initial_state.dtype if options.normalize else out_dtype,
    )
    o, final_state = _scan(plan, tokens, inputs.bonus, initial_state)
    if options.reverse:
        o = _flip_time(o)
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), final_state


def _flip_time(x: Array) -> Array:
    return jnp.flip(x, 1)


def _chunks_and_groups(T: int, chunk_size: int | None) -> tuple[int, int]:
    """Tokens in a chunk and chunks in a group.

    For every rank of log_decay within 10 to 20 % of the fastest on CPU: groups of one chunk cost up
    to 1.6 x, groups of sixteen up to 1.8 x. Groups are made equal, so that there is less than one
    chunk of padding per group.
    """
    chunk = min(chunk_size or DEFAULT_CHUNK, power_of_two(T))
    num_chunks = -(-T // chunk)
    num_groups = -(-num_chunks // MAX_CHUNKS_IN_GROUP)
    chunks_in_group = -(-num_chunks // num_groups)
    return chunk, chunks_in_group


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
        o, new_state = _group(plan, group, bonus, state)
        saved_state = state if save else None
        return new_state, (o.astype(plan.out_dtype), saved_state)

    groups = _split_into_groups(plan, tokens)
    final_state, (o, states) = jax.lax.scan(step, state, groups)
    T = tokens.q.shape[1]
    return (_join_groups(o, T), final_state), states


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
        starts = group.starts

        def run(floats: Tokens, bonus, state):
            group = floats._replace(starts=starts)
            return _group(plan, group, bonus, state)

        # `starts` are bools: they take no part in the derivative.
        floats = group._replace(starts=None)
        _, vjp = jax.vjp(run, floats, bonus, state)
        dgroup, dbonus_of_group, dstate = vjp((do.astype(state.dtype), dstate))
        dbonus = jax.tree.map(jnp.add, dbonus, dbonus_of_group)
        return (dstate, dbonus), dgroup

    def zeros_of(x: Array) -> Array:
        return varying_like(jnp.zeros_like(x), dfinal_state)

    # Maps over trees: None where there is no bonus.
    dbonus = jax.tree.map(zeros_of, bonus)
    groups = _split_into_groups(plan, tokens)
    do = _split_into_groups(plan, do)
    (dstate, dbonus), dgroups = jax.lax.scan(
        step,
        (dfinal_state, dbonus),
        (groups, states, do),
        reverse=True,
    )
    T = tokens.q.shape[1]
    dtokens = jax.tree.map(lambda x: _join_groups(x, T), dgroups)
    return dtokens, dbonus, dstate


_scan.defvjp(_forward_saving, _backward)


def _split_into_groups(plan: Plan, arrays):
    """[B, T, ...] -> [N, B, L, ...] for a tree of arrays, with L tokens in each of N groups.

    Zeros at the end: tokens that write nothing and do not decay the state.
    """
    L = plan.chunk * plan.chunks

    def split(x: Array) -> Array:
        B, T, *rest = x.shape
        x = padded(x, 1, round_up(T, L))
        # Groups first: `lax.scan` runs over axis 0.
        groups = x.reshape(B, -1, L, *rest)
        return jnp.moveaxis(groups, 1, 0)

    return jax.tree.map(split, arrays)


def _join_groups(x: Array, T: int) -> Array:
    """[N, B, L, ...] -> [B, T, ...]."""
    _, B, _, *rest = x.shape
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(B, -1, *rest)[:, :T]


# --- one group of chunks. Arrays are [B, H, n, C, D]: n chunks of C tokens


def _group(
    plan: Plan,
    group: Tokens,
    bonus: Array | None,
    state: Array,
) -> tuple[Array, Array]:
    """Returns (o [B, L, H, V], new state [B, H, K, V]), both in the state's dtype."""
    H = group.q.shape[2]
    dtype = state.dtype
    # 16-bit inputs are exact in one bfloat16 or TF32 pass where such a pass is the default; float32
    # inputs are not.
    precision = "highest" if group.q.dtype.itemsize > 2 else None
    q = _split_into_chunks(plan, group.q, H).astype(dtype)
    k = _split_into_chunks(plan, group.k, H).astype(dtype)
    v = _split_into_chunks(plan, group.v, H).astype(dtype)
    q = q * plan.scale

    scores, reads, writes, total = _chunk_terms(
        plan,
        group,
        q,
        k,
        precision,
    )
    if plan.inclusive or bonus is not None:
        weight = None
        if not plan.inclusive:
            assert bonus is not None
            weight = bonus.astype(dtype)[:, None, None, :]
        diagonal = tile.diagonal_scores(q, k, weight)
        # The tile's scores are strictly lower triangular.
        scores = scores + diagonal[..., None] * jnp.eye(plan.chunk, dtype=dtype)

    # The one sequential part: the state before each chunk.
    updates = jnp.einsum(
        "bhnck,bhncv->bhnkv",
        writes,
        v,
        precision=precision,
    )
    states_before = []
    for n in range(plan.chunks):
        states_before.append(state)
        # total is [.., K] or [.., 1]: a decay of the rows of S.
        state = total[:, :, n, :, None] * state + updates[:, :, n]

    from_chunk = jnp.einsum(
        "bhnij,bhnjv->bhniv",
        scores,
        v,
        precision=precision,
    )
    from_state = jnp.einsum(
        "bhnck,bhnkv->bhncv",
        reads,
        jnp.stack(states_before, 2),
        precision=precision,
    )
    o = from_chunk + from_state
    B, H, _, _, V = o.shape
    o = o.reshape(B, H, -1, V)
    # [B, H, L, V] -> [B, L, H, V]
    return jnp.moveaxis(o, 1, 2), state


def _chunk_terms(
    plan: Plan,
    group: Tokens,
    q: Array,
    k: Array,
    precision: str | None,
) -> tuple[Array, Array, Array, Array]:
    """`tile.ChunkTerms` of every chunk, by the function for this kind of decay."""
    if group.log_decay is None and group.starts is None:
        return tile.undecayed(q, k, precision)
    if group.log_decay is None:
        assert group.starts is not None
        # Segments without decay: a scalar decay of 0 or -inf, the same for all heads.
        log_decay = jnp.zeros((*group.starts.shape, 1), q.dtype)
    else:
        log_decay = jnp.maximum(group.log_decay.astype(q.dtype), tile.LOG_ZERO)
    log_read = log_decay if plan.inclusive else jnp.zeros_like(log_decay)
    if group.starts is not None:
        # [B, L] -> [B, L, 1] or [B, L, 1, 1]
        ones = (1,) * (log_decay.ndim - 2)
        starts = group.starts.reshape(*group.starts.shape, *ones)
        log_decay = jnp.where(starts, tile.LOG_ZERO, log_decay)
        log_read = jnp.where(starts, tile.LOG_ZERO, log_read)

    H = log_decay.shape[2]
    if log_decay.ndim == 4:
        log_decay = _split_into_chunks(plan, log_decay, H)
        log_read = _split_into_chunks(plan, log_read, H)
        return tile.vector_decay(q, k, log_decay, log_read, precision)
    log_decay = _split_into_chunks(plan, log_decay[..., None], H)[..., 0]
    log_read = _split_into_chunks(plan, log_read[..., None], H)[..., 0]
    return tile.scalar_decay(q, k, log_decay, log_read, precision)


def _split_into_chunks(plan: Plan, x: Array, num_heads: int) -> Array:
    """[B, L, heads, D] -> [B, num_heads, n, C, D].

    Heads are repeated over one group only, never over T.
    """
    B, _, heads, D = x.shape
    x = x.reshape(B, plan.chunks, plan.chunk, heads, D)
    # [B, n, C, heads, D] -> [B, heads, n, C, D]
    x = jnp.moveaxis(x, 3, 1)
    return jnp.repeat(x, num_heads // heads, axis=1)


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
    k = _repeat_heads(inputs.k, H).astype(dtype)
    v = _repeat_heads(v, H).astype(dtype)

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


def _repeat_heads(x: Array, num_heads: int) -> Array:
    """[B, heads, D] -> [B, num_heads, D]."""
    return jnp.repeat(x, num_heads // x.shape[1], axis=1)
