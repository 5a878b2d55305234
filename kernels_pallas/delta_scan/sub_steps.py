"""Rules that are several steps of `delta_scan` a token: RWKV-7 and DeltaProduct.

A token becomes n tokens, its sub-steps, one after the other in T. The decay belongs to the first of
them and the query to the last, whose outputs are kept. A scan over n T tokens costs n times one
over T; there is no kernel of its own for these rules.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.checks import check_float, check_shape
from kernels_pallas.delta_scan.api import delta_scan, delta_scan_step
from kernels_pallas.delta_scan.sharded import delta_scan_sharded


def rwkv7_scan(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    removal_key: Float[Array, "B T H K"],
    rate: Float[Array, "B T H K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = 1.0,
    axis_name: str | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """RWKV-7: S_t = (D_t - (removal . rate)^T removal) S_{t-1} + k^T v, o_t = scale q_t S_t.

    The removal reads the state before its decay. Sub-step 1 decays and erases by the key
    removal / decay, which undoes the decay of what it reads; sub-step 2 writes k^T v. RWKV-7's
    decays are at least exp(-exp(-0.5)) = 0.545, so the division is harmless.

    Args:
      q, k, v: receptance, replacement key and value.
      log_decay: natural logs of the decays, from -0.6065 to 0.
      removal_key: kappa, of length one.
      rate: the in-context learning rate a of each channel, in [0, 1].
      segment_ids: as in `delta_scan`.
      scale: a number; RWKV-7 uses 1.
      axis_name: inside `shard_map`, the mesh axis over which T is split (`delta_scan_sharded`).
      **options: initial_state, return_final_state, chunk_size, implementation and interpret of
        `delta_scan`.

    Returns:
      As `delta_scan`.

    Raises:
      ValueError: as `delta_scan`.

    Source: arXiv 2503.14456, equation 16.
    """
    op = "rwkv7_scan"
    for name, x in {"log_decay": log_decay, "removal_key": removal_key, "rate": rate}.items():
        check_shape(op, name, x, k.shape)
        check_float(op, name, x)
    nothing = jnp.zeros_like
    log_decay, erase = _decay_and_erase(log_decay, removal_key)
    write = jnp.ones(v.shape, log_decay.dtype)
    return _over_sub_steps(
        op,
        q,
        keys=[(removal_key * rate).astype(k.dtype), k],
        values=[nothing(v), v],
        log_decays=[log_decay, nothing(log_decay)],
        segment_ids=segment_ids,
        erase=_interleaved([erase, nothing(erase)]),
        write=_interleaved([nothing(write), write]),
        scale=scale,
        axis_name=axis_name,
        **options,
    )


def rwkv7_scan_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
    log_decay: Float[Array, "B H K"],
    removal_key: Float[Array, "B H K"],
    rate: Float[Array, "B H K"],
    *,
    scale: float | None = 1.0,
    **options: Any,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `rwkv7_scan`, for decoding: the same formula and arguments without T.

    Args:
      q, k, v, log_decay, removal_key, rate, scale: as in `rwkv7_scan`.
      state: as `rwkv7_scan` returns it.
      **options: implementation and interpret of `delta_scan_step`.

    Returns:
      (o, new state), as `delta_scan_step`.

    Raises:
      ValueError: as `delta_scan_step`.
    """
    op = "rwkv7_scan_step"
    for name, x in {"log_decay": log_decay, "removal_key": removal_key, "rate": rate}.items():
        check_shape(op, name, x, k.shape)
        check_float(op, name, x)
    log_decay, erase = _decay_and_erase(log_decay, removal_key)
    write = jnp.ones(v.shape, log_decay.dtype)
    # Decay and removal; nothing is read.
    _, state = delta_scan_step(
        jnp.zeros_like(q),
        (removal_key * rate).astype(k.dtype),
        jnp.zeros_like(v),
        state,
        log_decay=log_decay,
        erase=erase,
        write=write,
        **options,
    )
    return delta_scan_step(
        q,
        k,
        v,
        state,
        erase=jnp.zeros_like(erase),
        write=write,
        scale=scale,
        **options,
    )


def _decay_and_erase(log_decay: Array, removal_key: Array) -> tuple[Array, Array]:
    """The log decay, at least float32, and the key that erases after it as before it."""
    dtype = jnp.promote_types(jnp.float32, log_decay.dtype)
    log_decay = log_decay.astype(dtype)
    return log_decay, removal_key.astype(dtype) * jnp.exp(-log_decay)


def delta_product_scan(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T n Hk K"],
    v: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """(Gated) DeltaProduct: n steps of the delta rule a token, a product of n reflections.

    Args:
      q: queries.
      k, v, beta: n keys, values and strengths a token. beta goes up to 2.
      log_decay: as in `delta_scan`, applied once a token, before its first step.
      segment_ids: as in `delta_scan`.
      **options: every other option of `delta_scan`.

    Returns:
      As `delta_scan`.

    Raises:
      ValueError: as `delta_scan`.

    Source: arXiv 2502.10297.
    """
    op = "delta_product_scan"
    if k.ndim != 5 or k.shape[2] != v.shape[2]:
        raise ValueError(
            f"{op}: k: got shape {k.shape}, expected [B, T, n, Hk, K] for v of shape {v.shape}"
        )
    num_steps = k.shape[2]
    log_decays = None
    if log_decay is not None:
        log_decays = [log_decay] + [jnp.zeros_like(log_decay)] * (num_steps - 1)
    return _over_sub_steps(
        op,
        q,
        keys=[k[:, :, i] for i in range(num_steps)],
        values=[v[:, :, i] for i in range(num_steps)],
        log_decays=log_decays,
        segment_ids=segment_ids,
        beta=_interleaved([beta[:, :, i] for i in range(num_steps)]),
        **options,
    )


def delta_product_scan_step(
    q: Float[Array, "B Hq K"],
    k: Float[Array, "B n Hk K"],
    v: Float[Array, "B n H V"],
    state: Float[Array, "B H K V"],
    beta: Float[Array, "B n H"],
    log_decay: Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `delta_product_scan`, for decoding: the same formula and arguments without T.

    Args:
      q, k, v, beta, log_decay: as in `delta_product_scan`.
      state: as `delta_product_scan` returns it.
      **options: scale, l2_norm, implementation and interpret of `delta_scan_step`.

    Returns:
      (o, new state), as `delta_scan_step`.

    Raises:
      ValueError: as `delta_scan_step`.
    """
    op = "delta_product_scan_step"
    if k.ndim != 4 or k.shape[1] != v.shape[1]:
        raise ValueError(
            f"{op}: k: got shape {k.shape}, expected [B, n, Hk, K] for v of shape {v.shape}"
        )
    o = None
    for i in range(k.shape[1]):
        # Every step reads; the output of the last one is kept.
        o, state = delta_scan_step(
            q,
            k[:, i],
            v[:, i],
            state,
            beta[:, i],
            log_decay if i == 0 else None,
            **options,
        )
    assert o is not None
    return o, state


def _over_sub_steps(
    op: str,
    q: Array,
    keys: list[Array],
    values: list[Array],
    log_decays: list[Array] | None,
    segment_ids: Array | None,
    axis_name: str | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`delta_scan` over the sub-steps of all tokens; outputs of each token's last one."""
    num_steps = len(keys)
    if q.ndim != 4:
        raise ValueError(f"{op}: q: got shape {q.shape}, expected [B, T, H, K]")
    # Only the last sub-step is read.
    queries = [jnp.zeros_like(q)] * (num_steps - 1) + [q]
    if segment_ids is not None:
        # A document starts at the first sub-step of its first token.
        segment_ids = jnp.repeat(segment_ids, num_steps, axis=1)
    scan = delta_scan
    if axis_name is not None:
        # Each device has all the sub-steps of its tokens.
        scan = partial(delta_scan_sharded, axis_name=axis_name)
    result = scan(
        _interleaved(queries),
        _interleaved(keys),
        _interleaved(values),
        log_decay=None if log_decays is None else _interleaved(log_decays),
        segment_ids=segment_ids,
        **options,
    )
    last = slice(num_steps - 1, None, num_steps)
    if isinstance(result, tuple):
        o, final_state = result
        return o[:, last], final_state
    return result[:, last]


def _interleaved(sub_steps: list[Array]) -> Array:
    """n arrays [B, T, ...] -> [B, n T, ...], the sub-steps of a token side by side."""
    together = jnp.stack(sub_steps, axis=2)
    B, T, n, *rest = together.shape
    return together.reshape(B, n * T, *rest)
