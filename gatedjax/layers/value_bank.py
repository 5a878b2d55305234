"""MoVE (arXiv 2601.22887): a bank of value vectors of every token, shared by all layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.errors import require
from gatedjax.layers.gate_values import record
from gatedjax.layers.projection import Projection


def mixed_values(
    v: Float[Array, "B T Hk D"],
    vectors: Float[Array, "B T S Hk D"],
    gates: Float[Array, "B T Hk S+1"],
) -> Float[Array, "B T Hk D"]:
    """`g_0 v + sum_i g_i e_i` for every token and head, in float32; returned in v's dtype.

    Args:
      v: the layer's own values.
      vectors: what the bank holds for the tokens.
      gates: of the own value, then of the bank's.
    """
    own = v.astype(jnp.float32) * gates[..., :1]
    of_bank = jnp.einsum("bths,btshd->bthd", gates[..., 1:], vectors.astype(jnp.float32))
    return (own + of_bank).astype(v.dtype)


class ValueBankMix(nn.Module):
    """A layer's values and the bank's vectors, by gates 2 sigmoid(x W): all 1 at the start."""

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        v: Float[Array, "B T Hk D"],
        x: Float[Array, "B T M"],
        vectors: Float[Array, "B T S Hk D"] | None,
    ) -> Float[Array, "B T Hk D"]:
        """The mixed values.

        Args:
          v: the layer's own values.
          x: the layer's input.
          vectors: what the bank holds for the tokens; a model looks them up.
        """
        require(
            vectors is not None and vectors.shape[3:] == v.shape[2:],
            "info.bank_values",
            None if vectors is None else vectors.shape,
            f"[B, T, slots, {v.shape[2]}, {v.shape[3]}]: a model with a value_bank looks them up",
        )
        assert vectors is not None
        axes = {"kv_heads": v.shape[2], "head_dim": vectors.shape[2] + 1}
        logits = Projection(
            {"embed": x.shape[-1]},
            axes,
            0.0,
            self.dtype,
            kernel_init=nn.initializers.zeros,
            name="gate",
        )(x)
        gates = 2.0 * jax.nn.sigmoid(logits.astype(jnp.float32))
        record(self, "value_gates", gates)
        return mixed_values(v, vectors, gates)
