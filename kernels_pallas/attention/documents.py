"""What a document of a packed row is: a maximal run of tokens with equal segment ids.

An id that comes back later is another document, as in `linear_scan`. So ids may be integers of any
width and sign; what counts is where they change.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int


def document_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... for the documents of every row, int32."""
    # Without x64 jax would cut int64 down to int32, and different ids could become equal.
    numpy_or_jax = np if isinstance(segment_ids, np.ndarray) else jnp
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = numpy_or_jax.pad(begins, ((0, 0), (1, 0)))
    return jnp.asarray(numpy_or_jax.cumsum(begins, axis=1, dtype=np.int32))
