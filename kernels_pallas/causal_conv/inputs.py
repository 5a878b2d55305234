"""The arrays of a call of `causal_conv`."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int


class ConvInputs(NamedTuple):
    """The arrays of a call; what a call does not have is None."""

    x: Float[Array, "B T F"]
    # The weights of a token's last W inputs, its own last.
    kernel: Float[Array, "W F"]
    bias: Float[Array, " F"] | None
    segment_ids: Int[Array, "B T"] | None
