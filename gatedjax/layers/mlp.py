"""Dense feed-forwards: gated (SwiGLU, GEGLU, arXiv 2002.05202), not gated, and none at all."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedMLPConfig, MLPConfig, NoFeedForwardConfig
from gatedjax.layers.activations import activated, gated_product, gates_of
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.moe.soft_adapters import SoftAdapters, adapter_flops
from gatedjax.layers.neuron_gate import NeuronGate
from gatedjax.layers.norm import LayerNorm
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo

# Of the norm inside an Activator's product.
NORM_EPS = 1e-5


def _project(
    layer: "GatedMLP | MLP",
    x: Float[Array, "B T _"],
    in_axes: dict[str, int],
    out_axes: dict[str, int],
    name: str,
) -> Float[Array, "B T _"]:
    """`x` times the layer's matrix `name`, plus a bias if the layer has them.

    Args:
      layer: of which the matrix is a submodule.
      x: activations.
      in_axes, out_axes: as of `Projection`.
      name: of the matrix.
    """
    return Projection(
        in_axes,
        out_axes,
        layer.init_std,
        layer.dtype,
        has_bias=layer.config.bias,
        name=name,
    )(x)


def _with_adapters(
    layer: "GatedMLP | MLP",
    y: Float[Array, "B T M"],
    x: Float[Array, "B T M"],
    info: TokenInfo | None,
) -> Float[Array, "B T M"]:
    """`y`, plus what the layer's adapters make of its input, if it has some.

    Args:
      layer: of which they are a submodule.
      y: the layer's output without them.
      x: its input, zeros for padding.
      info: about the tokens.
    """
    if not layer.config.adapters.number:
        return y
    adapters = SoftAdapters(layer.config.adapters, layer.init_std, layer.dtype, name="adapters")
    return y + adapters(x, info)


class GatedMLP(FeedForward):
    """`(activation(x W_gate) * (x W_up)) W_down`, with biases if `bias`.

    With `norm` both factors pass one LayerNorm (Activator, arXiv 2405.15953).
    """

    config: GatedMLPConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T E"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        c = self.config
        # Zeros in give zeros out, and no NaN of padding gets into the matrices' gradients.
        mask = is_token(info)
        x = without_padding(x, mask)
        width = {"embed": x.shape[-1]}
        hidden = {"mlp": c.hidden}
        # Two projections, not one cut in half: each is cut over devices along its own columns.
        gate_logits = _project(self, x, width, hidden, "gate")
        up = _project(self, x, width, hidden, "up")
        record(self, "gates", gates_of(gate_logits, c.activation, c.swiglu_limit))
        if c.norm:
            norm = LayerNorm(NORM_EPS, "mlp_bias", name="norm")
            gate = norm(activated(gate_logits, c.activation))
            h = gate * norm(up)
        else:
            h = gated_product(gate_logits, up, c.activation, c.swiglu_limit)
        record(self, "channels", h)
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        y = _project(self, h, hidden, width, "down")
        if c.bias or c.norm:
            y = without_padding(y, mask)
        return _with_adapters(self, y, x, info), {}, router_logits

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 6 * width * self.config.hidden + adapter_flops(self.config.adapters, width, seq_len)


class MLP(FeedForward):
    """`activation(x W_up) W_down`, with biases if `bias`."""

    config: MLPConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T E"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        c = self.config
        # As in `GatedMLP`: nothing of padding goes in, and zeros come out.
        mask = is_token(info)
        x = without_padding(x, mask)
        width = {"embed": x.shape[-1]}
        hidden = {"mlp": c.hidden}
        up = _project(self, x, width, hidden, "up")
        h = activated(up, c.activation)
        if c.neuron_gate != "none":
            h = NeuronGate(c, name="neuron_gate")(h)
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        y = _project(self, h, hidden, width, "down")
        if c.bias:
            y = without_padding(y, mask)
        return _with_adapters(self, y, x, info), {}, router_logits

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 4 * width * self.config.hidden + adapter_flops(self.config.adapters, width, seq_len)


class NoFeedForward(FeedForward):
    """Nothing: a block that is a mixer alone. A model does without its norm, too."""

    config: NoFeedForwardConfig

    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        router_logits: Float[Array, "B T E"] | None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        return jnp.zeros_like(x), {}, router_logits

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 0.0
