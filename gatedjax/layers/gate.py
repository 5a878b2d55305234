"""The gate of gated attention (arXiv 2505.06708, section 2.2).

Its logits, its activation, its effect.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection


def ns_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The study's non-sparse sigmoid, 0.5 + 0.5 sigmoid(x): in [0.5, 1]."""
    return 0.5 + 0.5 * jax.nn.sigmoid(x)


def identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The gate's logits as they are."""
    return x


GATE_ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "ns_sigmoid": ns_sigmoid,
    "identity": identity,
}


def activated_gate(gate_logits: Float[Array, "..."], activation: str) -> Float[Array, "..."]:
    """The values of a gate, in float32."""
    return GATE_ACTIVATIONS[activation](gate_logits.astype(jnp.float32))


def apply_gate(
    y: Float[Array, "..."],
    gate_logits: Float[Array, "..."],
    activation: str,
    mode: str,
) -> Float[Array, "..."]:
    """`y` times its gate, or plus its gate.

    Args:
      y: what is gated.
      gate_logits: the gate before its activation; broadcast over y.
      activation: a name of `GATE_ACTIVATIONS`.
      mode: "multiplicative" or "additive".

    Returns:
      The gated y, computed in float32, in y's dtype.
    """
    # Float32 until the product: a bfloat16 sigmoid has few values near 1.
    gates = activated_gate(gate_logits, activation)
    y32 = y.astype(jnp.float32)
    gated = y32 + gates if mode == "additive" else y32 * gates
    return gated.astype(y.dtype)


class GateLogits(nn.Module):
    """The gate's logits, from the layer's input or from a constant.

    `axes` names the gated tensor's axes after [B, T]: `{"heads": H, "head_dim": D}`, or
    `{"embed_act": M}` at the output. Head-wise logits have size 1 in place of the channels. Shared
    ones are averaged over the heads (the parameters are not fewer, as in the study) and have size 1
    in place of the heads.
    """

    config: GatedAttentionConfig
    axes: Mapping[str, int]
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "#B #T ..."]:
        # One logit a channel, or one a head: an axis of size 1 is broadcast over the channels.
        axes = dict(self.axes)
        if self.config.gate_granularity == "headwise":
            axes["head_dim"] = 1
        if self.config.gate_input == "constant":
            # Zero at the start: sigmoid gives 0.5 everywhere, the study's input-independent
            # variant.
            constant = parameter(
                self,
                "constant",
                axes=list(axes),
                shape=list(axes.values()),
                init=nn.initializers.zeros,
            )
            logits = constant[None, None]
        else:
            width = {"embed": x.shape[-1]}
            logits = Projection(
                width,
                axes,
                self.init_std,
                self.dtype,
                name="projection",
            )(x)
        if self.config.gate_shared:
            heads_axis = 2
            logits = jnp.mean(logits, axis=heads_axis, keepdims=True)
        return logits
