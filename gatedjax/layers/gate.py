"""The gate of gated attention (arXiv 2505.06708, section 2.2).

Its logits, its activation, its effect.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig, MLAConfig
from gatedjax.errors import require
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection

# Of the weights of a gate that a trained model is given, as published for OPT (arXiv 2306.12929).
FINE_TUNING_STD = 0.001


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
    "softplus": jax.nn.softplus,
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


class SplitGate(NamedTuple):
    """The logits of a gate on the output of the attention: one of the two, or none.

    in_op: of a gate that is the op's own epilogue, for all heads.
    after: of a gate on the op's result.
    """

    in_op: Float[Array, "B T H _"] | None = None
    after: Float[Array, "#B #T _ _"] | None = None


def split_gate(
    gate_logits: Float[Array, "#B #T _ _"] | None,
    config: GatedAttentionConfig | MLAConfig,
    q: Float[Array, "B T H _"],
) -> SplitGate:
    """Who applies a gate on the output of the attention: the op, if it is the op's sigmoid."""
    if gate_logits is None:
        return SplitGate()
    if isinstance(config, GatedAttentionConfig) and not config.gates_in_op:
        return SplitGate(after=gate_logits)
    if config.gate_mode != "multiplicative" or config.gate_activation != "sigmoid":
        return SplitGate(after=gate_logits)
    # Shared logits have one head; the kernel wants all of them.
    shape = (*q.shape[:3], gate_logits.shape[-1])
    return SplitGate(in_op=jnp.broadcast_to(gate_logits, shape))


def apply_split_gate(
    o: Float[Array, "B T H V"],
    gate: SplitGate,
    config: GatedAttentionConfig | MLAConfig,
) -> Float[Array, "B T H V"]:
    """The op's result and the gate that it has not applied."""
    if gate.after is None:
        return o
    return apply_gate(o, gate.after, config.gate_activation, config.gate_mode)


class GateLogits(nn.Module):
    """The gate's logits, from the layer's input or from a constant.

    `axes` names the gated tensor's axes after [B, T]: `{"heads": H, "head_dim": D}`, or
    `{"embed_act": M}` at the output. Head-wise logits have size 1 in place of the channels. Shared
    ones are averaged over the heads (the parameters are not fewer, as in the study) and have size 1
    in place of the heads.
    """

    config: GatedAttentionConfig | MLAConfig
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


def head_slices(
    x: Float[Array, "B T M"],
    num_heads: int,
) -> Float[Array, "B T H S"]:
    """The layer's input, cut into as many neighboring slices of channels as there are heads."""
    width = x.shape[-1]
    require(width % num_heads == 0, "num_heads", num_heads, f"a divisor of the width {width}")
    return x.reshape(*x.shape[:2], num_heads, width // num_heads)


class HeadGateLogits(nn.Module):
    """One logit for every token and head, with a bias that says what the gate is at the start.

    From the whole token, or from the head's own slice of it by one vector a head, or by a small MLP
    a head (Quantizable Transformers, arXiv 2306.12929, section 4.2).
    """

    config: GatedAttentionConfig
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T H 1"]:
        c = self.config
        heads = {"heads": c.num_heads}
        std = FINE_TUNING_STD if c.gate_fine_tuning else self.init_std
        if c.gate_input == "head":
            slices = head_slices(x.astype(self.dtype), c.num_heads)
            slices = nn.with_logical_constraint(slices, ("batch", "length", "heads", None))
            if c.gate_hidden is not None:
                slices = self._hidden(slices, std, c.gate_hidden)
            weights = self._of_heads("weights", slices.shape[-1:], std)
            logits = jnp.einsum("bths,hs->bth", slices, weights)
        else:
            width = {"embed": x.shape[-1]}
            logits = Projection(width, heads, std, self.dtype, name="projection")(x)
        start = 0.5 if c.gate_start is None else c.gate_start
        bias = parameter(
            self,
            "bias",
            axes=["heads"],
            shape=[c.num_heads],
            init=nn.initializers.constant(math.log(start / (1.0 - start))),
        )
        return (logits + bias.astype(self.dtype))[..., None]

    def _hidden(
        self,
        slices: Float[Array, "B T H S"],
        std: float,
        size: int,
    ) -> Float[Array, "B T H F"]:
        """The hidden layer of every head's MLP."""
        weights = self._of_heads("hidden_weights", (slices.shape[-1], size), std)
        bias = self._of_heads("hidden_bias", (size,), 0.0)
        return jax.nn.relu(jnp.einsum("bths,hsf->bthf", slices, weights) + bias)

    def _of_heads(self, name: str, shape: tuple[int, ...], std: float) -> Float[Array, "H ..."]:
        value = parameter(
            self,
            name,
            axes=["heads", *[None] * len(shape)],
            shape=[self.config.num_heads, *shape],
            init=nn.initializers.normal(std),
        )
        return value.astype(self.dtype)
