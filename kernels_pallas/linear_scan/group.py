"""One group of chunks in the XLA path of `linear_scan`: outputs, gradients, and NaN among them.

The chunks of a group are computed together, as arrays [B, H, n, C, D] of n chunks of C tokens; only
the state goes from one to the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.common.chunks import Grouping, split_into_chunks
from kernels_pallas.common.finite import cleaned, poisoned
from kernels_pallas.linear_scan import nonfinite, tile


class Plan(NamedTuple):
    """The static arguments of the recurrence."""

    inclusive: bool
    scale: float
    groups: Grouping
    out_dtype: jnp.dtype


class Tokens(NamedTuple):
    """The arrays that run along T, in the order of the recurrence. Any T: padding is inside."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    log_decay: Float[Array, "#B T H"] | Float[Array, "#B T H K"] | None
    starts: Bool[Array, "B T"] | None


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
    q = split_into_chunks(plan.groups, group.q, H).astype(dtype)
    k = split_into_chunks(plan.groups, group.k, H).astype(dtype)
    v = split_into_chunks(plan.groups, group.v, H).astype(dtype)
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
        is_diagonal = jnp.eye(plan.groups.chunk, dtype=bool)
        scores = jnp.where(is_diagonal, diagonal[..., None], scores)
    visible = _visible(plan, group)
    if visible is not None:
        scores = jnp.where(visible.scores, scores, 0.0)
        reads = jnp.where(visible.state, reads, 0.0)
        writes = jnp.where(visible.end, writes, 0.0)

    # The one sequential part: the state before each chunk.
    updates = jnp.einsum(
        "bhnck,bhncv->bhnkv",
        writes,
        v,
        precision=precision,
    )
    states_before = []
    for n in range(plan.groups.chunks):
        states_before.append(state)
        if visible is not None:
            state = jnp.where(visible.unbroken[:, :, n], state, 0.0)
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
    if visible is not None:
        from_state = jnp.where(visible.state, from_state, 0.0)
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
        # The lesser of the two, so that a log that is NaN remains one.
        log_decay = jnp.where(starts, jnp.minimum(log_decay, tile.LOG_ZERO), log_decay)
        log_read = jnp.where(starts, tile.LOG_ZERO, log_read)

    H = log_decay.shape[2]
    if log_decay.ndim == 4:
        log_decay = split_into_chunks(plan.groups, log_decay, H)
        log_read = split_into_chunks(plan.groups, log_read, H)
        return tile.vector_decay(q, k, log_decay, log_read, precision)
    log_decay = split_into_chunks(plan.groups, log_decay[..., None], H)[..., 0]
    log_read = split_into_chunks(plan.groups, log_read[..., None], H)[..., 0]
    return tile.scalar_decay(q, k, log_decay, log_read, precision)


class _Visible(NamedTuple):
    """What of the same segment is seen in the chunks of a group.

    It is selected, not only multiplied by decays that are 0: a product or a state may overflow.
    """

    scores: Bool[Array, "B 1 n C C"]  # whether tokens i and j are of one segment
    state: Bool[Array, "B 1 n C 1"]  # whether token i sees the state before the chunk
    end: Bool[Array, "B 1 n C 1"]  # whether token i is seen after the chunk
    unbroken: Bool[Array, "B 1 n 1 1"]  # whether the state before the chunk is seen after it


def _visible(plan: Plan, group: Tokens) -> _Visible | None:
    """None where the group is of one segment."""
    if group.starts is None:
        return None
    starts = group.starts.astype(jnp.float32)
    starts = starts.reshape(starts.shape[0], 1, plan.groups.chunks, plan.groups.chunk)
    of_chunks = nonfinite.segments(starts[..., None], starts[..., None, :])
    return _Visible(
        scores=of_chunks.is_same,
        state=of_chunks.sees_state > 0,
        end=of_chunks.reaches_end > 0,
        unbroken=of_chunks.is_unbroken > 0,
    )


# --- NaN and Inf: what sees them, and nothing else. See `nonfinite.py`


def group_output(
    plan: Plan,
    group: Tokens,
    bonus: Array | None,
    state: Array,
) -> tuple[Array, Array]:
    """`_group` of what is finite, and NaN for the tokens that see what is not."""
    bad = _bad(group, bonus, state)
    outputs = _group(plan, *_clean(group, bonus, state))

    def with_nan(o: Array, new_state: Array) -> tuple[Array, Array]:
        is_bad = nonfinite.forward(_segments(group), bad, plan.inclusive)
        return poisoned(_per_token(is_bad.o), o), poisoned(is_bad.state, new_state)

    return _if_any(bad, with_nan, outputs)


def group_gradients(
    plan: Plan,
    group: Tokens,
    bonus: Array | None,
    state: Array,
    do: Array,
    dstate: Array,
) -> tuple[Tokens, Array | None, Array]:
    """The cotangents of a group, of the bonus and of the state before it, likewise."""
    bad = _bad(group, bonus, state)._replace(
        cotangent=jnp.moveaxis(nonfinite.bad_elements(do), 2, 1),
        dstate=nonfinite.bad_columns(dstate),
    )
    clean, clean_bonus, clean_state = _clean(group, bonus, state)

    def run(floats: Tokens, bonus, state):
        return _group(plan, floats._replace(starts=group.starts), bonus, state)

    # `starts` are bools: they take no part in the derivative.
    floats = clean._replace(starts=None)
    _, vjp = jax.vjp(run, floats, clean_bonus, clean_state)
    gradients = vjp((cleaned(do), cleaned(dstate)))

    def with_nan(
        dgroup: Tokens,
        dbonus: Array | None,
        dstate_before: Array,
    ) -> tuple[Tokens, Array | None, Array]:
        is_bad = nonfinite.backward(_segments(group), bad, plan.inclusive)
        dlog_decay = dgroup.log_decay
        if dlog_decay is not None:
            is_bad_log = _per_token(is_bad.dlog_decay)
            if dlog_decay.shape[0] == 1:
                # All rows have the same decay.
                is_bad_log = jnp.any(is_bad_log, 0, keepdims=True)
            if dlog_decay.ndim == 3:
                is_bad_log = is_bad_log[..., 0]
            dlog_decay = poisoned(is_bad_log, dlog_decay)
        if dbonus is not None:
            dbonus = poisoned(jnp.any(is_bad.dbonus[..., 0], 0), dbonus)
        dgroup = Tokens(
            q=poisoned(_per_token(is_bad.dq), dgroup.q),
            k=poisoned(_per_shared_head(is_bad.dk, group.k), dgroup.k),
            v=poisoned(_per_shared_head(is_bad.dv, group.v), dgroup.v),
            log_decay=dlog_decay,
            starts=None,
        )
        return dgroup, dbonus, poisoned(is_bad.dstate, dstate_before)

    return _if_any(bad, with_nan, gradients)


def _if_any[*Results](
    bad: nonfinite.Bad,
    with_nan: Callable[[*Results], tuple[*Results]],
    results: tuple[*Results],
) -> tuple[*Results]:
    """`with_nan(*results)` if anything is bad."""
    flags = [jnp.max(x) for x in bad if x is not None]
    return jax.lax.cond(
        jnp.max(jnp.stack(flags)) > 0,
        with_nan,
        lambda *same: same,
        *results,
    )


def _segments(group: Tokens) -> nonfinite.Segments:
    """The segments of the group as one piece: [B or 1, 1, ...]."""
    starts = group.starts
    if starts is None:
        starts = jnp.zeros((1, group.q.shape[1]))
    starts = starts.astype(jnp.float32)[:, None]
    return nonfinite.segments(starts[..., None], starts[..., None, :])


def _bad(group: Tokens, bonus: Array | None, state: Array) -> nonfinite.Bad:
    """What of a group is not finite, as [B, H, L, 1 or V] and [B, H, 1, 1 or V]."""
    H = state.shape[1]

    def heads_first(rows: Array) -> Array:
        """[#B, L, heads, d] -> [#B, H, L, d]."""
        repeated = jnp.repeat(rows, H // rows.shape[2], axis=2)
        return jnp.moveaxis(repeated, 2, 1)

    decay = jnp.zeros((1, 1, 1, 1), jnp.float32)
    if group.log_decay is not None:
        logs = group.log_decay
        logs = logs.reshape(*logs.shape[:3], -1)
        is_bad_log = ~jnp.all(nonfinite.is_good_log(logs), -1, keepdims=True)
        decay = heads_first(is_bad_log.astype(jnp.float32))
    bad_bonus = None
    if bonus is not None:
        bad_bonus = nonfinite.bad_rows(bonus)[None, :, :, None]
    return nonfinite.Bad(
        query=heads_first(nonfinite.bad_rows(group.q)),
        key=heads_first(nonfinite.bad_rows(group.k)),
        value=heads_first(nonfinite.bad_elements(group.v)),
        decay=decay,
        bonus=bad_bonus,
        state=nonfinite.bad_columns(state),
    )


def _clean(
    group: Tokens,
    bonus: Array | None,
    state: Array,
) -> tuple[Tokens, Array | None, Array]:
    """The arrays of a group with 0 in place of what is not finite."""
    log_decay = group.log_decay
    if log_decay is not None:
        log_decay = jnp.where(nonfinite.is_good_log(log_decay), log_decay, 0.0)
    clean = group._replace(
        q=cleaned(group.q),
        k=cleaned(group.k),
        v=cleaned(group.v),
        log_decay=log_decay,
    )
    clean_bonus = None if bonus is None else cleaned(bonus)
    return clean, clean_bonus, cleaned(state)


def _per_token(flags: Bool[Array, "#B H L d"]) -> Bool[Array, "#B L H d"]:
    return jnp.moveaxis(flags, 1, 2)


def _per_shared_head(flags: Bool[Array, "#B H L d"], x: Array) -> Bool[Array, "#B L heads d"]:
    """Of a head that several query heads share: what any of them says."""
    B, H, L, d = flags.shape
    heads = x.shape[2]
    return _per_token(jnp.any(flags.reshape(B, heads, H // heads, L, d), 2))
