"""RWKV-7's time mixing (arXiv 2503.14456) on `kernels_pallas.delta_scan.rwkv7_scan`."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jaxtyping import Float

from gatedjax.config import RWKV7Config
from gatedjax.errors import require
from gatedjax.layers import rwkv7_starts as starts
from gatedjax.layers.base import Mixer
from gatedjax.layers.conv import previous_inputs
from gatedjax.layers.depth import ALONE, Depth
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import layer_norm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.scan_or_step import rwkv7_scan_or_step
from gatedjax.layers.token_info import TokenInfo

# Log decays lie between this and 0: exp(-exp(-0.5)) = 0.545 is the strongest decay.
STRONGEST_LOG_DECAY = -float(np.exp(-0.5))
# Removal keys are divided by at least this.
LEAST_LENGTH = 1e-12


@struct.dataclass
class RWKV7Cache:
    """The matrix state of every head, and the last input, which the next token looks back at."""

    state: Float[Array, "... B H K V"]
    last_input: Float[Array, "... B 1 M"]


def shifted(
    x: Float[Array, "B T M"],
    previous: Float[Array, "B T M"],
    amount: Float[Array, " M"],
) -> Float[Array, "B T M"]:
    """Between a token (amount 0) and the one before it (1), in every channel, float32."""
    own = x.astype(jnp.float32)
    return own + (previous.astype(jnp.float32) - own) * amount


def bounded_log_decay(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """`-exp(-0.5) sigmoid(logits)`, float32."""
    return STRONGEST_LOG_DECAY * jax.nn.sigmoid(logits.astype(jnp.float32))


def removal_direction(k: Float[Array, "..."], scale: Float[Array, "H K"]) -> Float[Array, "..."]:
    """`k scale` divided by its length in every head, float32."""
    scaled = k.astype(jnp.float32) * scale
    square = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled * lax.rsqrt(jnp.maximum(square, LEAST_LENGTH**2))


def group_norm(
    o: Float[Array, "B T H V"],
    scale: Float[Array, "H V"],
    bias: Float[Array, "H V"],
    eps: float,
) -> Float[Array, "B T H V"]:
    """LayerNorm within each head, in float32.

    Args:
      o: outputs of the heads.
      scale: of each channel.
      bias: of each channel.
      eps: added to the variance.
    """
    return layer_norm(o.astype(jnp.float32), scale, bias, eps)


class RWKV7(Mixer):
    """Token shift, a delta rule that removes by one key and writes by another, bonus, gate.

    Matrices start as published, not from `init_std`.
    """

    takes_pieces: ClassVar[bool] = True
    shares_values: ClassVar[bool] = True

    config: RWKV7Config

    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: RWKV7Cache | None = None,
    ) -> tuple[Float[Array, "B T M"], RWKV7Cache | None]:
        y, cache, _ = self.with_values(x, info, cache)
        return y, cache

    @nn.compact
    def with_values(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: RWKV7Cache | None = None,
    ) -> tuple[Float[Array, "B T M"], RWKV7Cache | None, Float[Array, "B T M"]]:
        c = self.config
        require(
            x.shape[-1] == c.width,
            "num_heads",
            c.num_heads,
            f"num_heads x head_dim = {x.shape[-1]}, the width of the input",
        )
        depth = ALONE if info.depth is None else info.depth
        last_input = None if cache is None else cache.last_input
        previous, last_input = previous_inputs(x, info.segment_ids, last_input)

        def looking_back(name: str, power: float) -> Float[Array, "B T M"]:
            """The input of what is called `name`: a mixture of a token and the one before."""
            start = starts.shift(power * starts.from_one_to_almost_zero(depth))
            amount = self._of_channels(f"{name}_shift", start)
            return shifted(x, previous, amount).astype(self.dtype)

        r = self._heads("receptance", looking_back("receptance", 0.2), 1.0)
        k = self._heads("key", looking_back("key", 0.7), 0.1)
        value_input = looking_back("value", 0.7)
        v = self._heads("value", value_input, 1.0)

        log_decay = self._log_decay(looking_back("decay", 0.9), depth)
        rate = self._rate(looking_back("rate", 0.9))
        v, first_values = self._with_first_values(v, value_input, depth)
        record(self, "log_decay", log_decay)
        record(self, "gates", rate)

        removal_scale = self._of_heads("removal_scale", starts.removal_scale)
        removal_key = removal_direction(k, removal_scale)
        # A channel that learns fast (rate 1) writes its whole key.
        rate_weight = self._of_heads("rate_weight", starts.constant(1.02))
        k = (k.astype(jnp.float32) * (1.0 + (rate - 1.0) * rate_weight)).astype(self.dtype)

        o, state = rwkv7_scan_or_step(
            r,
            k,
            v,
            log_decay,
            removal_key,
            rate,
            info.segment_ids,
            None if cache is None else cache.state,
            chunk_size=c.chunk_size,
        )
        o = group_norm(
            o,
            self._of_heads("norm_scale", starts.norm_scale(depth)),
            self._of_heads("norm_bias", nn.initializers.zeros),
            c.norm_eps,
        )
        o = o + self._bonus(r, k, v)
        o = o * self._output_gates(looking_back("output_gate", 0.2))
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        y = self._projection("out", heads, {"embed": c.width}, nn.initializers.zeros)(o)
        if state is None:
            return y, None, first_values
        return y, RWKV7Cache(state, last_input), first_values

    # --- parameters

    def _projection(self, name: str, in_axes: dict, out_axes: dict, start) -> Projection:
        return Projection(
            in_axes,
            out_axes,
            self.init_std,
            self.dtype,
            kernel_init=start,
            name=name,
        )

    def _of_channels(self, name: str, start: starts.Initializer) -> Float[Array, " M"]:
        shape = [self.config.width]
        return parameter(self, name, axes=["embed_act"], shape=shape, init=start)

    def _of_heads(self, name: str, start: starts.Initializer) -> Float[Array, "H K"]:
        c = self.config
        shape = [c.num_heads, c.head_dim]
        return parameter(self, name, axes=["heads", "head_dim"], shape=shape, init=start)

    def _heads(self, name: str, x: Array, gain: float) -> Float[Array, "B T H D"]:
        """Receptance, keys or values: one matrix."""
        c = self.config
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        return self._projection(name, {"embed": c.width}, heads, starts.orthogonal(gain))(x)

    def _low_rank(
        self,
        name: str,
        x: Float[Array, "B T M"],
        rank: int,
        activation=None,
    ) -> Float[Array, "B T H D"]:
        """Two matrices with `rank` channels between them, float32. Zero at the start."""
        c = self.config
        low = {"rank": rank}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        zeros = nn.initializers.zeros
        x = self._projection(f"{name}_down", {"embed": c.width}, low, zeros)(x)
        if activation is not None:
            x = activation(x.astype(jnp.float32))
        gain = 0.1 * max(rank / c.width, 1.0) ** 0.5
        y = self._projection(f"{name}_up", low, heads, starts.orthogonal(gain))(x)
        return y.astype(jnp.float32)

    # --- the gates

    def _log_decay(self, x: Array, depth: Depth) -> Float[Array, "B T H K"]:
        logits = self._low_rank("decay", x, self.config.decay_rank, jnp.tanh)
        return bounded_log_decay(logits + self._of_heads("decay_bias", starts.decay_bias(depth)))

    def _rate(self, x: Array) -> Float[Array, "B T H K"]:
        """The in-context learning rate: how much of what is found under a key is removed."""
        logits = self._low_rank("rate", x, self.config.rate_rank)
        return jax.nn.sigmoid(logits + self._of_heads("rate_bias", starts.rate_bias))

    def _with_first_values(
        self,
        v: Float[Array, "B T H V"],
        x: Float[Array, "B T M"],
        depth: Depth,
    ) -> tuple[Float[Array, "B T H V"], Float[Array, "B T M"]]:
        """The values, part of them the first layer's, and the values of the first layer.

        The first layer has the parameters too, as in the published code, and no use for them.
        """
        flat = v.reshape(*v.shape[:2], -1)
        first = flat
        if depth.first_values is not None:
            is_first = jnp.asarray(depth.index) == depth.first
            first = jnp.where(is_first, flat, depth.first_values.astype(flat.dtype))
        logits = self._low_rank("value_gate", x, self.config.value_rank)
        gates = jax.nn.sigmoid(logits + self._of_heads("value_bias", starts.value_bias))
        record(self, "value_gates", gates)
        own = v.astype(jnp.float32)
        mixed = own + (first.reshape(v.shape).astype(jnp.float32) - own) * gates
        return mixed.astype(v.dtype), first

    def _output_gates(self, x: Array) -> Float[Array, "B T H V"]:
        """Not between 0 and 1: the sigmoid is between the two matrices."""
        gates = self._low_rank(
            "output_gate",
            x,
            self.config.output_gate_rank,
            jax.nn.sigmoid,
        )
        record(self, "output_gates", gates)
        return gates

    def _bonus(self, r: Array, k: Array, v: Array) -> Float[Array, "B T H V"]:
        """What a token gets of itself past the state and its norm: `(r . bonus . k) v`."""
        bonus = self._of_heads("bonus", starts.constant(-0.04))
        product = r.astype(jnp.float32) * k.astype(jnp.float32) * bonus
        return jnp.sum(product, axis=-1, keepdims=True) * v.astype(jnp.float32)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> RWKV7Cache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        state = jnp.zeros((batch, c.num_heads, c.head_dim, c.head_dim), jnp.float32)
        return RWKV7Cache(state, jnp.zeros((batch, 1, c.width), self.dtype))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        ranks = c.decay_rank + c.rate_rank + c.value_rank + c.output_gate_rank
        # Receptance, key, value and the output; four pairs of matrices.
        projections = 2 * width * (4 * c.width) + 2 * ranks * (width + c.width)
        # The recurrence itself: what is removed is found and taken out, what is new is written and
        # read: 2 K V each per head. Chunkwise forms do more; that is their overhead.
        return projections + 8 * c.width * c.head_dim
