"""What mixers on a scan do with their tokens: a scan, or one step of decoding."""

from jax import Array
from jaxtyping import Float

from gatedjax.layers.documents import without_padding
from gatedjax.layers.on_mesh import rwkv7_scan_on_mesh, scan_on_mesh
from gatedjax.layers.past_padding import past_padding
from kernels_pallas.delta_scan import rwkv7_scan_step
from kernels_pallas.linear_scan import linear_scan_step


def scan_or_step(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    log_decay: Float[Array, "..."] | None,
    segment_ids: Array | None,
    state: Float[Array, "B H K _"] | None,
    *,
    chunk_size: int | None,
    scale: float | None = None,
    normalize: bool = False,
    bonus: Float[Array, "H K"] | None = None,
    inclusive: bool = True,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K _"] | None]:
    """The output of every token, and the state after the last one if one was given.

    Args:
      q, k, v, log_decay, segment_ids: as `kernels_pallas.linear_scan`.
      state: of a cache, before the first token. With it a single token is one step of decoding, and
        padding at the end of a row leaves its state as it is.
      chunk_size, scale, normalize, bonus, inclusive: of the scan.

    Returns:
      (o, the state or None).
    """
    if state is not None and segment_ids is not None:
        k, v, log_decay, state, segment_ids = past_padding(
            k,
            v,
            log_decay,
            state,
            segment_ids,
        )
    if state is not None and q.shape[1] == 1:
        # A decay of tokens has a time axis; RetNet's constant [H] has none.
        has_time = log_decay is not None and log_decay.ndim > 1
        o, state = linear_scan_step(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            state,
            log_decay[:, 0] if has_time else log_decay,
            scale=scale,
            normalize=normalize,
            bonus=bonus,
            inclusive=inclusive,
        )
        return o[:, None], state
    return scan_on_mesh(
        q,
        k,
        v,
        log_decay,
        segment_ids,
        state,
        scale=scale,
        normalize=normalize,
        bonus=bonus,
        inclusive=inclusive,
        chunk_size=chunk_size,
    )


def rwkv7_scan_or_step(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    removal_key: Float[Array, "B T H K"],
    rate: Float[Array, "B T H K"],
    segment_ids: Array | None,
    state: Float[Array, "B H K V"] | None,
    *,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """`scan_or_step` of RWKV-7's rule.

    Args:
      q, k, v, log_decay, removal_key, rate, segment_ids: as `kernels_pallas.delta_scan.rwkv7_scan`.
      state: of a cache, before the first token; None without one.
      chunk_size: static argument of the scan.

    Returns:
      (o, the state or None).
    """
    if state is not None and segment_ids is not None:
        # A removal key of zeros removes nothing.
        removal_key = without_padding(removal_key, segment_ids != 0)
        k, v, padded_decay, state, segment_ids = past_padding(
            k,
            v,
            log_decay,
            state,
            segment_ids,
        )
        assert padded_decay is not None
        log_decay = padded_decay
    arrays = (q, k, v, log_decay, removal_key, rate)
    if state is not None and q.shape[1] == 1:
        q, k, v, *gates = (y[:, 0] for y in arrays)
        o, state = rwkv7_scan_step(q, k, v, state, *gates)
        return o[:, None], state
    return rwkv7_scan_on_mesh(*arrays, segment_ids, state, chunk_size=chunk_size)
