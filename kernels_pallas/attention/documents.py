"""What a document of a packed row is: a maximal run of tokens with equal segment ids.

An id that comes back later is another document, as in `linear_scan`. So ids may be integers of any
width and sign; what counts is where they change.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int


def comparable_ids(
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B S"],
) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Ids of queries and of keys of two sequences, int32, equal where they were equal.

    Runs of two sequences do not correspond, so here an id that comes back is the same document.
    """
    widest = max(query_ids.dtype.itemsize, key_ids.dtype.itemsize)
    if widest < 4 or (widest == 4 and query_ids.dtype == key_ids.dtype):
        # Unsigned ones of 32 bits wrap, each to a number of its own.
        return jnp.asarray(query_ids.astype(np.int32)), jnp.asarray(key_ids.astype(np.int32))
    # Others are numbered by their order: of 64 bits, jax may cut half.
    of_numpy = isinstance(query_ids, np.ndarray) and isinstance(key_ids, np.ndarray)
    numpy_or_jax = np if of_numpy else jnp
    T = query_ids.shape[1]
    together = numpy_or_jax.concatenate([query_ids, key_ids], axis=1)
    size = None if of_numpy else together.size
    distinct = np.unique(together) if of_numpy else jnp.unique(together, size=size)
    numbers = numpy_or_jax.searchsorted(distinct, together).astype(np.int32)
    return jnp.asarray(numbers[:, :T]), jnp.asarray(numbers[:, T:])


def document_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... for the documents of every row, int32."""
    # Without x64 jax would cut int64 down to int32, and different ids could become equal.
    numpy_or_jax = np if isinstance(segment_ids, np.ndarray) else jnp
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = numpy_or_jax.pad(begins, ((0, 0), (1, 0)))
    return jnp.asarray(numpy_or_jax.cumsum(begins, axis=1, dtype=np.int32))
