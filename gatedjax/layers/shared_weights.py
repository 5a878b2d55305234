"""What attention layers take from one before them: its weights, or its keys and values.

UniAttn (arXiv 2502.00439): several layers with the attention weights of the first of them. Weights
are functions of queries and keys, so those are what is handed on: no [T, T] array exists, and the
keys are cached once. YOCO (2405.05254) and SambaY (2507.06607): several layers with queries of
their own on one cache of keys and values.
"""

import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float


@struct.dataclass
class SharedWeights:
    """What a layer's attention weights are made from, and what they mix.

    Attributes:
      q: queries, as the op takes them.
      k: keys of the same tokens, likewise.
      held: keys of the cache before these tokens; None without a cache.
      cached: keys of the cache with them.
      v: values of the same tokens.
      held_values, cached_values: of the cache, without these tokens and with them.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T Hk D"]
    held: Float[Array, "B S Hk D"] | None = None
    cached: Float[Array, "B S Hk D"] | None = None
    v: Float[Array, "B T Hk V"] | None = None
    held_values: Float[Array, "B S Hk V"] | None = None
    cached_values: Float[Array, "B S Hk V"] | None = None


@struct.dataclass
class ValueCache:
    """The decoding cache of a layer without weights of its own: values alone."""

    # Leading axes: the model stacks the caches of a layer over periods.
    v: Float[Array, "... B S Hk V"]


def compensation_start(
    x: Float[np.ndarray, "N M"],
    lost: Float[np.ndarray, "N M"],
) -> Float[np.ndarray, "M M"]:
    """The start of a layer's compensation: least squares of what sharing takes from its output.

    Args:
      x: inputs of the layer; as published the means over texts, a row for each position.
      lost: the output of the layer with weights of its own, less its output with shared ones.

    Returns:
      The matrix W with the least |x W - lost|, and of those the smallest.
    """
    w, *_ = np.linalg.lstsq(np.asarray(x, np.float64), np.asarray(lost, np.float64), rcond=None)
    return w
