"""The decays of the layer's scans: LION's, one a head or one a token and head, and ViG's.

The parameters are the layer's own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo


def lion_decay(
    layer: Mixer,
    number: int,
    x: Array,
    info: TokenInfo,
) -> Float[Array, "H"] | Float[Array, "B T H"]:
    """LION's log decay along one order: sigmoid(a_h), or 1 - sigmoid(x W + b)."""
    c = layer.config
    name = "decay" if number == 0 else f"decay_{number + 1}"
    if c.decay == "constant":
        logits = parameter(
            layer,
            name,
            axes=["heads"],
            shape=[c.num_heads],
            init=nn.initializers.normal(1.0),
        )
        return jax.nn.log_sigmoid(logits)
    log_decay = jax.nn.log_sigmoid(-layer._per_head(name, x, c.num_heads, has_bias=True))
    if info.grid is not None:
        # Nothing is forgotten at a class token.
        is_on_grid = jnp.arange(x.shape[1]) >= info.grid.extra
        log_decay = jnp.where(is_on_grid[:, None], log_decay, 0.0)
    record(layer, "log_decay" if number == 0 else f"log_decay_{number + 1}", log_decay)
    return log_decay


def vector_decays(layer: Mixer, x: Float[Array, "B T M"]) -> tuple[Array, Array]:
    """ViG's two log decays of every key channel, logsigmoid(x W1 W2 + b) / temperature."""
    c = layer.config
    width = {"embed": x.shape[-1]}
    rank = {"rank": c.decay_rank}
    low = Projection(width, rank, layer.init_std, layer.dtype, name="decay_down")(x)
    decays = []
    for direction in ("forward", "backward"):
        logits = Projection(
            rank,
            {"heads": c.num_heads, "head_dim": c.key_dim},
            layer.init_std,
            layer.dtype,
            has_bias=True,
            name=f"{direction}_decay",
        )(low)
        log_decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / c.decay_temperature
        record(layer, f"{direction}_log_decay", log_decay)
        decays.append(log_decay)
    return decays[0], decays[1]
