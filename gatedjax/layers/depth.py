"""Where a layer stands in a model: RWKV-7 starts by it, floors of forget gates rise with it."""

from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float


@struct.dataclass
class Depth:
    """What a layer is told of its place, and what the first layer hands on to all others.

    Attributes:
      index: of the layer: 0, 1, 2 ... A traced number where layers run in a loop.
      first_values: the values, of all heads, of the first layer that shares them; zeros up to
        that layer. None where no layer does.
      first: the index of that layer.
      num_layers: of the model.
      decay_floors: below which forget gates do not fall, of every layer; None where no layer has
        one.
    """

    index: ArrayLike
    first_values: Float[Array, "B T M"] | None = None
    first: int = struct.field(pytree_node=False, default=0)
    num_layers: int = struct.field(pytree_node=False, default=1)
    decay_floors: Float[Array, "L H K"] | None = None


# Of a layer that is called by itself.
ALONE = Depth(index=0)
