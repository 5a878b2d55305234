"""Scans that go on from a state, over rows with padding at their end."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class ScanInputs(NamedTuple):
    """Of a scan that goes on from a state, over rows with documents and padding."""

    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hk V"]
    log_decay: Float[Array, "B T ..."] | None
    state: Float[Array, "B H K _"]
    segment_ids: Int[Array, "B T"]


def past_padding(
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    log_decay: Float[Array, "..."] | None,
    state: Float[Array, "B H K _"],
    segment_ids: Int[Array, "B T"],
) -> ScanInputs:
    """A scan whose state at the end is the one after each row's last token.

    Padding writes nothing, forgets nothing and ends no document: the state passes it unchanged.

    Args:
      k, v: keys and values.
      log_decay: None, of heads or of tokens.
      state: after the tokens before, of segment 1.
      segment_ids: numbered, with padding at the end of rows (`token_info.arranged`).
    """
    is_token = segment_ids != 0
    k = jnp.where(is_token[:, :, None, None], k, 0)
    v = jnp.where(is_token[:, :, None, None], v, 0)
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (*segment_ids.shape, log_decay.shape[0]))
        of_token = is_token.reshape(*is_token.shape, *[1] * (log_decay.ndim - 2))
        log_decay = jnp.where(of_token, log_decay, 0)
    # A row that begins with another document forgets the one before.
    begins = segment_ids[:, 0] > 1
    state = jnp.where(begins[:, None, None, None], 0, state)
    last_segment = jnp.max(segment_ids, axis=1, keepdims=True)
    segment_ids = jnp.where(is_token, segment_ids, last_segment)
    return ScanInputs(k, v, log_decay, state, segment_ids)
