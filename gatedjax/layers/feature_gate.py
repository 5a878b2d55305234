"""A feature of another kind, such as an image's, in a frozen model's attention (ImageBind-LLM).

    f = bind(feature)                     a network that ends in the model's width
    o_h + tanh(g_h) ((f + q) W_V)_h       for every head h of every token

q is a learned vector of the layer and g starts at 0: at first the model is what it was, to the bit
(arXiv 2309.03905). W_V is the frozen layer's own.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.layers.activations import gated_product
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection

NORM_EPS = 1e-6


def with_feature(
    o: Float[Array, "B T H V"],
    values: Float[Array, "B H V"],
    gate: Float[Array, " H"],
) -> Float[Array, "B T H V"]:
    """`o + tanh(gate) values`, in float32, in o's dtype.

    Args:
      o: the heads' outputs of each token.
      values: of the feature, one for all tokens of a row.
      gate: of each head; at 0 it returns o.
    """
    added = jnp.tanh(gate.astype(jnp.float32))[:, None] * values.astype(jnp.float32)
    return (o.astype(jnp.float32) + added[:, None]).astype(o.dtype)


class FeatureGate(nn.Module):
    """The gate of one layer of attention.

    Attributes:
      init_std: of the learned vector.
    """

    init_std: float = 0.02

    @nn.compact
    def __call__(
        self,
        o: Float[Array, "B T H V"],
        feature: Float[Array, "B M"],
        value_kernel: Float[Array, "M Hk V"],
    ) -> Float[Array, "B T H V"]:
        """
        Args:
          o: what the layer's heads return, before the output matrix.
          feature: what the bind network makes.
          value_kernel: W_V of the layer; a value head serves the query heads of its group.
        """
        width = feature.shape[-1]
        heads = o.shape[2]
        normal = nn.initializers.normal(self.init_std)
        query = parameter(self, "query", axes=("embed_act",), shape=(width,), init=normal)
        gate = parameter(
            self,
            "gate",
            axes=("heads",),
            shape=(heads,),
            init=nn.initializers.zeros,
        )
        record(self, "gates", jnp.tanh(gate))
        values = jnp.einsum("bm,mhv->bhv", feature + query.astype(feature.dtype), value_kernel)
        values = jnp.repeat(values, heads // values.shape[1], axis=1)
        return with_feature(o, values, gate)


class BindNetwork(nn.Module):
    """A projection to the model's width, then blocks of `x + SwiGLU(RMSNorm(x))`.

    Attributes:
      width: of the model.
      hidden: of each SwiGLU.
      blocks: how many.
      init_std: of the matrices.
      dtype: of the activations.
    """

    width: int
    hidden: int
    blocks: int = 3
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, feature: Float[Array, "B F"]) -> Float[Array, "B M"]:
        given = {"init_std": self.init_std, "dtype": self.dtype}
        outer = {"embed": self.width}
        inner = {"mlp": self.hidden}
        x = Projection({"embed": feature.shape[-1]}, {"embed_act": self.width}, **given, name="in")(
            feature
        )
        for i in range(self.blocks):
            y = RMSNorm(NORM_EPS, name=f"norm_{i}")(x)
            gate = Projection(outer, inner, **given, name=f"gate_{i}")(y)
            up = Projection(outer, inner, **given, name=f"up_{i}")(y)
            product = gated_product(gate, up, "silu")
            x = x + Projection(inner, outer, **given, name=f"down_{i}")(product)
        return x
