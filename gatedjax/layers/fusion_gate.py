"""Two streams of tokens, each of which takes from the other what its gate lets through.

    g_a = sigmoid([a | b] W_a + c_a)
    a' = g_a a + (1 - g_a) b V_a            and b' likewise, from the same a and b

The local form of bi-hierarchical fusion (arXiv 2504.04770): between layers of a language model of
proteins and of a network on their structure, token by token, in both directions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.layers.gate_values import record
from gatedjax.layers.projection import Projection


def fused(
    own: Float[Array, "..."],
    other: Float[Array, "..."],
    gate_logits: Float[Array, "..."],
) -> Float[Array, "..."]:
    """`g own + (1 - g) other` with g = sigmoid(gate_logits), in float32, in own's dtype.

    Args:
      own: what a gate of 1 keeps.
      other: what a gate of 0 puts in its place.
      gate_logits: before the sigmoid.
    """
    gate = jax.nn.sigmoid(gate_logits.astype(jnp.float32))
    return (gate * own + (1 - gate) * other).astype(own.dtype)


class FusionGate(nn.Module):
    """Both streams after a gate each; their widths may differ.

    Attributes:
      init_std: of the matrices.
      dtype: of the activations.
    """

    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        a: Float[Array, "B T M"],
        b: Float[Array, "B T N"],
    ) -> tuple[Float[Array, "B T M"], Float[Array, "B T N"]]:
        return self._taken(a, b, "a"), self._taken(b, a, "b")

    def _taken(self, own: Array, other: Array, name: str) -> Array:
        both = jnp.concatenate([own, other], axis=-1)
        width = {"embed_act": own.shape[-1]}
        given = {"init_std": self.init_std, "dtype": self.dtype}
        gate = Projection(
            {"embed": both.shape[-1]}, width, **given, has_bias=True, name=f"gate_{name}"
        )
        values = Projection({"embed": other.shape[-1]}, width, **given, name=f"value_{name}")
        logits = gate(both)
        record(self, "gates", jax.nn.sigmoid(logits))
        return fused(own, values(other), logits)
