"""The gate of gated attention (arXiv 2505.06708, section 2.2): scores, and how they meet a tensor."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.projection import Projection, parameter


def gate_score(logits: Float[Array, "..."], activation: str) -> Float[Array, "..."]:
    """The activation of a gate, in float32. ns_sigmoid is the study's non-sparse 0.5 + 0.5 sigmoid, in [0.5, 1]."""
    logits = logits.astype(jnp.float32)
    return {
        "sigmoid": jax.nn.sigmoid,
        "silu": jax.nn.silu,
        "ns_sigmoid": lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),
        "identity": lambda x: x,
    }[activation](logits)


def apply_gate(
    y: Float[Array, "..."], logits: Float[Array, "..."], activation: str, mode: str
) -> Float[Array, "..."]:
    """`y * score` or, for the additive mode, `y + score`; in float32, returned in y's dtype."""
    score = gate_score(logits, activation)
    y32 = y.astype(jnp.float32)
    return (y32 + score if mode == "additive" else y32 * score).astype(y.dtype)


class GateLogits(nn.Module):
    """Pre-activation scores, from the layer's input or from a constant.

    `axes` names the gated tensor's axes after [B, T]: `{"heads": H, "head_dim": D}`, or `{"embed_act": M}` at the
    output. Head-wise scores have size 1 in place of the channels. Shared scores are averaged over the heads (the
    parameters are not fewer, as in the study) and have size 1 in place of the heads.
    """

    config: GatedAttentionConfig
    axes: dict[str, int]
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T ..."]:
        axes = dict(self.axes)
        if self.config.gate_granularity == "headwise":
            axes["head_dim"] = 1
        if self.config.gate_input == "constant":
            # Zero at the start: sigmoid gives 0.5 everywhere, the study's input-independent variant.
            logits = parameter(
                self, "constant", list(axes), list(axes.values()), nn.initializers.zeros
            )[None, None]
        else:
            logits = Projection(
                {"embed": x.shape[-1]}, axes, self.std, self.dtype, name="projection"
            )(x)
        logits = jnp.mean(logits, axis=2, keepdims=True) if self.config.gate_shared else logits
        self.sow("probes", "score", gate_score(logits, self.config.gate_activation))
        return logits
