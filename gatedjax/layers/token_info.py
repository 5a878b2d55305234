"""What every mixer is told about the tokens it sees, besides their vectors."""

from flax import struct
from jax import Array
from jaxtyping import Float, Int


@struct.dataclass
class TokenInfo:
    """Where the tokens stand.

    positions: position of each token within its document (rotary embeddings).
    segment_ids: which document of a packed row each token belongs to; None when a row is one document.
    tokens: their ids (routers that go by a hash of them); None for vectors that come from elsewhere.
    lora_weights: of low-rank experts, from a first pass of the whole model (X-LoRA); None if each layer makes its own.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    tokens: Int[Array, "B T"] | None = None
    lora_weights: Float[Array, "B T n"] | None = None
