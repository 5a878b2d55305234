"""What every layer is told about the tokens, besides their vectors."""

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int


@struct.dataclass
class TokenInfo:
    """Positions, documents and ids of the tokens of a batch.

    Attributes:
      positions: position of each token within its document (rotary embeddings).
      segment_ids: which document of a packed row each token belongs to; None when a row is one
        document.
      tokens: their ids (routers that go by a hash of them); None for vectors that come from
        elsewhere.
      lora_weights: weights of low-rank experts, from a first pass of the whole model (X-LoRA); None
        if each layer makes its own.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    tokens: Int[Array, "B T"] | None = None
    lora_weights: Float[Array, "B T E"] | None = None


def default_info(x: Float[Array, "B T M"]) -> TokenInfo:
    """Every row is one document: positions 0, 1, 2 ..."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    return TokenInfo(jnp.broadcast_to(positions, x.shape[:2]))
