"""RWKV-6's time mixing, "Finch", and RWKV-5's, "Eagle" (arXiv 2404.05892), on
`kernels_pallas.linear_scan`.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import RWKV6Config
from gatedjax.errors import require
from gatedjax.layers import rwkv7_starts as starts
from gatedjax.layers.base import Mixer
from gatedjax.layers.conv import previous_inputs, uniform
from gatedjax.layers.depth import ALONE, Depth
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rwkv7 import group_norm, shifted
from gatedjax.layers.scan_or_step import scan_or_step
from gatedjax.layers.token_info import TokenInfo

# What has a token shift of its own, in the order of the parameters: the name, and the power of the
# place of a channel, over that of the others.
SHIFTED = {
    "receptance": 0.5,
    "decay": 1.0,
    "key": 1.0,
    "value": 1.0,
    "output_gate": 0.5,
}
# The second matrix of each pair starts between minus this and this.
SMALL = 0.01


@struct.dataclass
class RWKV6Cache:
    """The matrix state of every head, and the last input, which the next token looks back at."""

    state: Float[Array, "... B H K V"]
    last_input: Float[Array, "... B 1 M"]


def double_exponential_log_decay(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """`-exp(logits)`: a decay of exp(-exp(logits)), float32."""
    return -jnp.exp(logits.astype(jnp.float32))


def shift_amounts(
    low: Float[Array, "B T N r"],
    up: Float[Array, "N r M"],
) -> list[Float[Array, "B T M"]]:
    """How much more of the token before each of N mixtures has than it has of any token, in every
    channel, float32.

    Args:
      low: what a token has to say about it, in few channels.
      up: from them to all channels.
    """
    amounts = []
    for i in range(up.shape[0]):
        of_token = jnp.matmul(
            low[:, :, i],
            up[i].astype(low.dtype),
            preferred_element_type=jnp.float32,
        )
        amounts.append(of_token)
    return amounts


class RWKV6(Mixer):
    """Token shifts that depend on the token, a decay of every channel, a bonus, a gate.

    Without the ranks of shifts and decays, RWKV-5: both are parameters alone. Parameters start as
    published, not from `init_std`.
    """

    takes_pieces: ClassVar[bool] = True

    config: RWKV6Config

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: RWKV6Cache | None = None,
    ) -> tuple[Float[Array, "B T M"], RWKV6Cache | None]:
        c = self.config
        require(
            x.shape[-1] == c.width,
            "num_heads",
            c.num_heads,
            f"num_heads x value_dim = {x.shape[-1]}, the width of the input",
        )
        keys = {"heads": c.num_heads, "head_dim": c.key_dim}
        values = {"heads": c.num_heads, "head_dim": c.value_dim}
        depth = ALONE if info.depth is None else info.depth
        last_input = None if cache is None else cache.last_input
        previous, last_input = previous_inputs(x, info.segment_ids, last_input)
        mixed = self._mixtures(x, previous, depth)

        r = self._heads("receptance", mixed["receptance"], keys, 1.0)
        k = self._heads("key", mixed["key"], keys, 0.1)
        v = self._heads("value", mixed["value"], values, 1.0)
        log_decay = self._log_decay(mixed.get("decay"), r.shape, keys, depth)
        record(self, "log_decay", log_decay)
        o, state = scan_or_step(
            r,
            k,
            v,
            log_decay,
            info.segment_ids,
            None if cache is None else cache.state,
            scale=1.0,
            bonus=self._of_heads("bonus", keys, starts.rwkv6_bonus(depth)),
            inclusive=False,
            chunk_size=c.chunk_size,
        )
        o = group_norm(
            o,
            self._of_heads("norm_scale", values, starts.norm_scale(depth)),
            self._of_heads("norm_bias", values, nn.initializers.zeros),
            c.norm_eps,
        )
        logits = self._heads("output_gate", mixed["output_gate"], values, 0.1)
        gates = jax.nn.silu(logits.astype(jnp.float32))
        record(self, "output_gates", gates)
        width = {"embed": x.shape[-1]}
        y = self._projection("out", values, width, nn.initializers.zeros)(o * gates)
        if state is None:
            return y, None
        return y, RWKV6Cache(state, last_input)

    def _mixtures(
        self,
        x: Float[Array, "B T M"],
        previous: Float[Array, "B T M"],
        depth: Depth,
    ) -> dict[str, Float[Array, "B T M"]]:
        """The input of everything in `SHIFTED`: between a token and the one before it. None for a
        decay that no token has a say in.
        """
        names = [name for name in SHIFTED if name != "decay" or self.config.decay_rank]
        power = starts.from_one_to_almost_zero(depth)
        of_token = [0.0] * len(names)
        if self.config.shift_rank:
            of_token = self._shifts_of_token(x, previous, len(names), power)
        powers = [power * SHIFTED[name] for name in names]
        less = [0.3 * starts.from_zero_to_one(depth) * (name == "value") for name in names]
        bias = parameter(
            self,
            "shift_bias",
            axes=["gates", "embed_act"],
            shape=[len(names), x.shape[-1]],
            init=starts.shifts(powers, less),
        )
        return {
            name: shifted(x, previous, common + more).astype(self.dtype)
            for name, common, more in zip(names, bias, of_token)
        }

    def _shifts_of_token(
        self,
        x: Float[Array, "B T M"],
        previous: Float[Array, "B T M"],
        count: int,
        power: float | Array,
    ) -> list[Float[Array, "B T M"]]:
        """What a token itself says of its `count` mixtures, by a mixture of the same two."""
        width = x.shape[-1]
        rank = self.config.shift_rank
        amount = parameter(
            self,
            "shift",
            axes=["embed_act"],
            shape=[width],
            init=starts.shift(power),
        )
        down = self._projection(
            "shift_down",
            {"embed": width},
            {"rank": count * rank},
            nn.initializers.zeros,
        )
        low = down(shifted(x, previous, amount))
        low = jnp.tanh(low.astype(jnp.float32)).astype(self.dtype)
        low = low.reshape(*low.shape[:2], count, rank)
        up = parameter(
            self,
            "shift_up",
            axes=["gates", "rank", "embed"],
            shape=[count, rank, width],
            init=partial(uniform, bound=SMALL),
        )
        return shift_amounts(low, up)

    def _log_decay(
        self,
        x: Float[Array, "B T M"] | None,
        shape: tuple[int, ...],
        heads: dict[str, int],
        depth: Depth,
    ) -> Float[Array, "B T H K"]:
        """Of every token and key channel, `shape`, from `x`; None: the same of every token."""
        bias = self._of_heads("decay_bias", heads, starts.rwkv6_decay_bias(depth))
        if x is None:
            return jnp.broadcast_to(double_exponential_log_decay(bias), shape)
        low = {"rank": self.config.decay_rank}
        width = {"embed": x.shape[-1]}
        x = self._projection("decay_down", width, low, nn.initializers.zeros)(x)
        x = jnp.tanh(x.astype(jnp.float32))
        logits = self._projection("decay_up", low, heads, partial(uniform, bound=SMALL))(x)
        return double_exponential_log_decay(logits.astype(jnp.float32) + bias)

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

    def _heads(
        self,
        name: str,
        x: Float[Array, "B T M"],
        heads: dict[str, int],
        gain: float,
    ) -> Float[Array, "B T H D"]:
        """One matrix, to heads; it starts orthogonal, times `gain`."""
        return self._projection(name, {"embed": x.shape[-1]}, heads, starts.orthogonal(gain))(x)

    def _of_heads(
        self,
        name: str,
        heads: dict[str, int],
        start: starts.Initializer,
    ) -> Float[Array, "H D"]:
        return parameter(self, name, axes=list(heads), shape=list(heads.values()), init=start)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> RWKV6Cache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        state = jnp.zeros((batch, c.num_heads, c.key_dim, c.value_dim), jnp.float32)
        return RWKV6Cache(state, jnp.zeros((batch, 1, c.width), self.dtype))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        keys = c.num_heads * c.key_dim
        values = c.num_heads * c.value_dim
        # Receptance and key; value, gate and the output.
        projections = 2 * width * (2 * keys + 3 * values)
        count = len(SHIFTED) if c.decay_rank else len(SHIFTED) - 1
        shifts = 2 * count * c.shift_rank * 2 * width
        decay = 2 * c.decay_rank * (width + keys)
        # The recurrence itself: k^T v is written and S is read, 2 K V each per head. Chunkwise
        # forms do more; that is their overhead.
        return projections + shifts + decay + 4 * keys * c.value_dim
