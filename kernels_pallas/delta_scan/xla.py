"""`delta_scan` without Pallas: chunks in parallel, states in sequence.

Memory is linear in T, forward and backward. The sequence is split into groups of a few chunks. A
`lax.scan` over groups carries the state; inside a group everything that does not need the state
(scores, inverses) is computed for all chunks together, and only the changes W and the state go from
chunk to chunk. The forward pass keeps the state at the start of each group; the backward pass goes
over the groups from the last to the first, recomputes a group from that state and differentiates it
with `jax.vjp`.

A matmul with a mask or a decay of 0 lets a NaN through, since 0 * NaN is NaN: into other documents,
and back to earlier tokens. So a group whose results are not all finite is computed once more, token
by token as the reference does, where nothing multiplies what it must not see.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from kernels_pallas.common.chunks import (
    Grouping,
    grouping,
    join_groups,
    split_into_chunks,
    split_into_groups,
)
from kernels_pallas.common.finite import any_nonfinite
from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.common.opaque import opaque
from kernels_pallas.delta_scan import tile
from kernels_pallas.delta_scan.inputs import (
    DeltaInputs,
    DeltaOptions,
    DeltaStepInputs,
    DeltaStepOptions,
)
from kernels_pallas.delta_scan.normalize import l2_normalized
from kernels_pallas.delta_scan.reference import recurrence_in_blocks
from kernels_pallas.linear_scan.reference import segment_starts
from kernels_pallas.linear_scan.tile import LOG_ZERO

# Names of `checkpoint_name`, for policies that save these arrays instead of recomputing the op.
OUT_NAME = "delta_scan_out"
STATES_NAME = "delta_scan_states"

# Tokens whose states are kept together where a group is computed token by token. The whole group's
# would take more memory than everything else: T1024 H4 K = V = 64 53 MiB in place of 7.
CAREFUL_BLOCK = 16


class Plan(NamedTuple):
    """The static arguments of the recurrence."""

    scale: float
    l2_norm: bool
    groups: Grouping
    out_dtype: jnp.dtype


class Tokens(NamedTuple):
    """The arrays that run along T. Any T: padding is inside."""

    q: Float[Array, "B T Hq K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B T H"] | None
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None
    erase: Float[Array, "B T H K"] | None
    write: Float[Array, "B T H V"] | None
    starts: Bool[Array, "B T"] | None


def delta_scan(
    inputs: DeltaInputs,
    options: DeltaOptions,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """As `api.delta_scan`, with the initial state given. Returns (o, final state)."""
    initial_state = inputs.initial_state
    assert initial_state is not None
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids, reverse=False)
    # The arrays along T come first in DeltaInputs, in the order of Tokens.
    tokens = Tokens(*inputs[:7], starts=starts)
    groups = grouping(inputs.q.shape[1], options.chunk_size)
    plan = Plan(
        scale=options.scale,
        l2_norm=options.l2_norm,
        groups=groups,
        out_dtype=inputs.v.dtype,
    )
    return _scan(plan, tokens, initial_state)


# --- the recurrence over groups, and its derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    plan: Plan,
    tokens: Tokens,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Returns (o in plan.out_dtype, final state). The state's dtype is that of the computation."""
    (o, final_state), _ = _forward(plan, tokens, state, save=False)
    return o, final_state


def _forward(
    plan: Plan,
    tokens: Tokens,
    state: Array,
    save: bool,
) -> tuple[tuple[Array, Array], Array | None]:
    """Returns (o, final state), and if `save` the states before each group [N, B, H, K, V]."""
    # See `common/opaque.py`: XLA on CPU must not see that an empty state is a broadcast.
    tokens, state = opaque((tokens, state))

    def step(state, group):
        o, new_state = _checked_group(plan, group, state)
        saved_state = state if save else None
        return new_state, (o.astype(plan.out_dtype), saved_state)

    groups = split_into_groups(plan.groups, tokens)
    final_state, (o, states) = jax.lax.scan(step, state, groups)
    T = tokens.q.shape[1]
    return (join_groups(o, T), final_state), states


def _forward_saving(plan: Plan, tokens: Tokens, state: Array):
    (o, final_state), states = _forward(plan, tokens, state, save=True)
    outputs = (checkpoint_name(o, OUT_NAME), final_state)
    residuals = (tokens, checkpoint_name(states, STATES_NAME))
    return outputs, residuals


def _backward(plan: Plan, residuals, cotangents):
    tokens, states = residuals
    tokens, states, (do, dfinal_state) = opaque((tokens, states, cotangents))

    def step(dstate, group_arrays):
        group, state, do = group_arrays
        cotangents = (do.astype(state.dtype), dstate)
        dgroup, dstate = _checked(
            _group_gradient(plan, _group, group, state, cotangents),
            lambda: _group_gradient(plan, _token_by_token, group, state, cotangents),
        )
        return dstate, dgroup

    groups = split_into_groups(plan.groups, tokens)
    do = split_into_groups(plan.groups, do)
    dstate, dgroups = jax.lax.scan(
        step,
        dfinal_state,
        (groups, states, do),
        reverse=True,
    )
    T = tokens.q.shape[1]
    dtokens = jax.tree.map(lambda x: join_groups(x, T), dgroups)
    return dtokens, dstate


_scan.defvjp(_forward_saving, _backward)


def _group_gradient(
    plan: Plan,
    compute: Callable,
    group: Tokens,
    state: Array,
    cotangents: tuple[Array, Array],
) -> tuple[Tokens, Array]:
    """The cotangents of a group's tokens and of the state before it, by `compute`'s derivative."""
    starts = group.starts

    def run(floats: Tokens, state):
        return compute(plan, floats._replace(starts=starts), state)

    # `starts` are bools: they take no part in the derivative.
    floats = group._replace(starts=None)
    _, vjp = jax.vjp(run, floats, state)
    return vjp(cotangents)


# --- non-finite numbers


def _checked_group(plan: Plan, group: Tokens, state: Array) -> tuple[Array, Array]:
    """`_group`, token by token where its results are not finite."""
    return _checked(
        _group(plan, group, state),
        lambda: _token_by_token(plan, group, state),
    )


def _checked[Tree](results: Tree, careful: Callable[[], Tree]) -> Tree:
    """`results` if all of their numbers are finite, else those of `careful`."""
    # Not `finite.if_bad`: its loop has no second derivative, and this path has one.
    is_bad = any_nonfinite(*jax.tree.leaves(results))
    return jax.lax.cond(is_bad, careful, lambda: results)


def _token_by_token(plan: Plan, group: Tokens, state: Array) -> tuple[Array, Array]:
    """As `_group`, by the recurrence."""
    options = DeltaStepOptions(scale=plan.scale, l2_norm=plan.l2_norm)
    o, new_state = recurrence_in_blocks(
        group[:7],
        group.starts,
        state,
        options,
        block_length=min(plan.groups.chunk, CAREFUL_BLOCK),
    )
    return o.astype(state.dtype), new_state


# --- one group of chunks. Arrays are [B, H, n, C, D]: n chunks of C tokens


def _group(
    plan: Plan,
    group: Tokens,
    state: Array,
) -> tuple[Array, Array]:
    """Returns (o [B, L, H, V], new state [B, H, K, V]), both in the state's dtype."""
    dtype = state.dtype
    H = state.shape[1]
    # 16-bit inputs are exact in one bfloat16 or TF32 pass where such a pass is the default; float32
    # inputs are not. The inverse wants more than its inputs: see `tile.inverse`.
    is_wide = group.q.dtype.itemsize > 2
    precision = "highest" if is_wide else None
    precision_of_inverse = "highest" if is_wide else "high"

    def in_chunks(x: Array) -> Array:
        return split_into_chunks(plan.groups, x, H).astype(dtype)

    q = in_chunks(group.q)
    k = in_chunks(group.k)
    v = in_chunks(group.v)
    if plan.l2_norm:
        q = l2_normalized(q)
        k = l2_normalized(k)
    q = q * plan.scale
    beta = None if group.beta is None else in_chunks(group.beta[..., None])
    erase = _weighted(k, beta) if group.erase is None else in_chunks(group.erase)
    write_weight = beta if group.write is None else in_chunks(group.write)
    written = _weighted(v, write_weight)

    terms = _chunk_terms(plan, group, q, erase, k, precision)
    inverse = tile.inverse(terms.erase_scores, precision_of_inverse)

    # The one sequential part: what each chunk changes, and the state before it.
    changes = []
    states_before = []
    for n in range(plan.groups.chunks):
        states_before.append(state)
        found = jnp.einsum(
            "bhck,bhkv->bhcv",
            terms.erases[:, :, n],
            state,
            precision=precision,
        )
        change = tile.solve(
            precision,
            terms.erase_scores[:, :, n],
            inverse[:, :, n],
            written[:, :, n] - found,
        )
        changes.append(change)
        update = jnp.einsum(
            "bhck,bhcv->bhkv",
            terms.writes[:, :, n],
            change,
            precision=precision,
        )
        # total is [.., K] or [.., 1]: a decay of the rows of S.
        state = terms.total[:, :, n, :, None] * state + update

    # A token reads its own change, too: the diagonal of A_q.
    diagonal = jnp.sum(q * k, axis=-1)
    read_scores = terms.read_scores + diagonal[..., None] * jnp.eye(plan.groups.chunk, dtype=dtype)
    from_chunk = jnp.einsum(
        "bhnij,bhnjv->bhniv",
        read_scores,
        jnp.stack(changes, 2),
        precision=precision,
    )
    from_state = jnp.einsum(
        "bhnck,bhnkv->bhncv",
        terms.reads,
        jnp.stack(states_before, 2),
        precision=precision,
    )
    o = from_chunk + from_state
    B, _, _, _, V = o.shape
    o = o.reshape(B, H, -1, V)
    # [B, H, L, V] -> [B, L, H, V]
    return jnp.moveaxis(o, 1, 2), state


def _weighted(x: Array, weight: Array | None) -> Array:
    # api.py has checked that there is a weight: beta, or one of its own.
    assert weight is not None
    return weight * x


def _chunk_terms(
    plan: Plan,
    group: Tokens,
    q: Array,
    erase: Array,
    k: Array,
    precision: str | None,
) -> tile.ChunkTerms:
    """The terms of every chunk, by the function for this kind of decay."""
    if group.log_decay is None and group.starts is None:
        return tile.undecayed(q, erase, k, precision)
    if group.log_decay is None:
        assert group.starts is not None
        # Segments without decay: a scalar decay of 0 or -inf, the same for all heads.
        log_decay = jnp.zeros((*group.starts.shape, 1), q.dtype)
    else:
        log_decay = jnp.maximum(group.log_decay.astype(q.dtype), LOG_ZERO)
    if group.starts is not None:
        # [B, L] -> [B, L, 1] or [B, L, 1, 1]
        ones = (1,) * (log_decay.ndim - 2)
        starts = group.starts.reshape(*group.starts.shape, *ones)
        # A NaN at a start is kept: the recurrence multiplies the empty state by it.
        log_decay = jnp.where(starts & ~jnp.isnan(log_decay), LOG_ZERO, log_decay)

    heads = log_decay.shape[2]
    if log_decay.ndim == 4:
        log_decay = split_into_chunks(plan.groups, log_decay, heads)
        return tile.vector_decay(q, erase, k, log_decay, precision)
    log_decay = split_into_chunks(plan.groups, log_decay[..., None], heads)[..., 0]
    return tile.scalar_decay(q, erase, k, log_decay, precision)


# --- one token


def delta_scan_step(
    inputs: DeltaStepInputs,
    options: DeltaStepOptions,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """As `api.delta_scan_step`: returns (o, new state)."""
    state = opaque(inputs.state)
    dtype = state.dtype
    H = state.shape[1]
    q = repeat_heads(inputs.q, H).astype(dtype)
    k = repeat_heads(inputs.k, H).astype(dtype)
    v = inputs.v.astype(dtype)
    if options.l2_norm:
        q = l2_normalized(q)
        k = l2_normalized(k)
    beta = None if inputs.beta is None else inputs.beta.astype(dtype)[..., None]
    erase = _weighted(k, beta) if inputs.erase is None else inputs.erase.astype(dtype)
    write_weight = beta if inputs.write is None else inputs.write.astype(dtype)
    written = _weighted(v, write_weight)

    if inputs.log_decay is not None:
        decay = jnp.exp(inputs.log_decay.astype(dtype))
        # [B, H] or [B, H, K] -> [B, H, 1 or K, 1]
        state = decay.reshape(*decay.shape[:2], -1, 1) * state
    found = jnp.einsum("bhk,bhkv->bhv", erase, state, precision="highest")
    change = written - found
    new_state = state + k[..., :, None] * change[..., None, :]
    o = options.scale * jnp.einsum("bhk,bhkv->bhv", q, new_state, precision="highest")
    return o.astype(inputs.v.dtype), new_state
