"""FinalMLP (arXiv 2304.00902): two MLPs behind gates on their features, and a product of both.

    e_n = e * 2 sigmoid(MLP_n(context_n))                 n = 1, 2; e: the embeddings of all fields
    x, y = MLP'_1(e_1), MLP'_2(e_2)
    logit = w_x x + w_y y + b + sum_h x_h W_h y_h         over the slices of heads

For tables: a row is an integer for each field, as in the prediction of clicks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.errors import require
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection


def bilinear_fusion(
    x: Float[Array, "B D"],
    y: Float[Array, "B E"],
    of_x: Float[Array, " D"],
    of_y: Float[Array, " E"],
    of_both: Float[Array, "H D/H E/H"],
) -> Float[Array, " B"]:
    """`w_x x + w_y y + sum_h x_h W_h y_h`.

    Args:
      x, y: the two streams.
      of_x, of_y: the linear parts.
      of_both: a matrix for each head, between its slices of the two.
    """
    heads = of_both.shape[0]
    slices_x = x.reshape(x.shape[0], heads, -1)
    slices_y = y.reshape(y.shape[0], heads, -1)
    products = jnp.einsum("bhd,hde,bhe->b", slices_x, of_both, slices_y)
    return x @ of_x + y @ of_y + products


class FinalMLP(nn.Module):
    """The logit of a click, of rows of categorical fields.

    Attributes:
      sizes: how many values each field has.
      embedding_dim: of a field's value.
      hidden: widths of both MLPs.
      gate_hidden: of the MLPs that make gates.
      num_heads: of the fusion; divides the last width.
      contexts: for each stream the fields that its gates depend on; (): a learned vector instead,
        the same for all rows.
    """

    sizes: tuple[int, ...]
    embedding_dim: int = 8
    hidden: tuple[int, ...] = (64, 64)
    gate_hidden: int = 32
    num_heads: int = 2
    contexts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @nn.compact
    def __call__(self, fields: Int[Array, "B F"]) -> Float[Array, " B"]:
        require(
            fields.shape[1] == len(self.sizes),
            "fields",
            fields.shape,
            f"{len(self.sizes)} of each row, as in sizes",
        )
        D, H = self.hidden[-1], self.num_heads
        require(D % H == 0, "num_heads", H, f"a divisor of the last width {D}")
        embedded = self._embedded(fields, "embedding", tuple(range(len(self.sizes))))
        streams: list[Array] = []
        for n, context in enumerate(self.contexts):
            gated = embedded * self._gates(fields, n, context, embedded.shape[-1])
            for i, width in enumerate(self.hidden):
                gated = self._dense(gated, f"stream_{n}_{i}", width)
                # Nothing follows the last matrix but the fusion.
                gated = jax.nn.relu(gated)
            streams.append(gated)
        zeros, xavier = nn.initializers.zeros, nn.initializers.xavier_normal()
        of_x = parameter(self, "of_x", [None, None], [D, 1], xavier)[:, 0]
        of_y = parameter(self, "of_y", [None, None], [D, 1], xavier)[:, 0]
        of_both = parameter(self, "of_both", [None, None, None], [H, D // H, D // H], xavier)
        bias = parameter(self, "bias", [], [], zeros)
        first, second = streams
        return bilinear_fusion(first, second, of_x, of_y, of_both) + bias

    def _embedded(
        self,
        fields: Int[Array, "B F"],
        name: str,
        which: tuple[int, ...],
    ) -> Float[Array, "B _"]:
        """The vectors of some fields, side by side."""
        vectors = []
        for field in which:
            table = parameter(
                self,
                f"{name}_{field}",
                axes=[None, None],
                shape=[self.sizes[field], self.embedding_dim],
                init=nn.initializers.normal(0.1),
            )
            vectors.append(jnp.take(table, fields[:, field], axis=0, mode="clip"))
        return jnp.concatenate(vectors, axis=-1)

    def _gates(
        self,
        fields: Int[Array, "B F"],
        stream: int,
        context: tuple[int, ...],
        width: int,
    ) -> Float[Array, "#B _"]:
        """From 0 to 2, 1 where the MLP says nothing.

        Args:
          fields: of the rows.
          stream: its number.
          context: fields that the gates depend on.
          width: how many gates.
        """
        if context:
            seen = self._embedded(fields, f"context_{stream}", context)
        else:
            zeros = nn.initializers.zeros
            seen = parameter(self, f"context_{stream}", [None], [self.embedding_dim], zeros)[None]
        h = jax.nn.relu(self._dense(seen, f"gate_{stream}_hidden", self.gate_hidden))
        gates = 2 * jax.nn.sigmoid(self._dense(h, f"gate_{stream}", width))
        record(self, "gates", gates)
        return gates

    def _dense(self, x: Array, name: str, width: int) -> Array:
        return Projection(
            {"embed": x.shape[-1]},
            {"mlp": width},
            0.0,
            jnp.float32,
            kernel_init=nn.initializers.xavier_normal(),
            has_bias=True,
            name=name,
        )(x)
