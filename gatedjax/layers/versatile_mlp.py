"""VersatileFFN (arXiv 2512.14531): one gated MLP, in slices as experts and in loops as depth.

With F(H) = H + MLP(norm(H)) on the residual stream H:

    width   Y_w = H + sum over the best slices of g_k MLP_k(norm(H))
    depth   H_0 = H,  H_l = F(H_{l-1}),  Y_d = H_l with the l that a gate chooses
    y       = lambda Y_w + (1 - lambda) Y_d,  lambda = (L - l) / L

A slice has some hidden channels of the MLP, so all of them share the product that the first loop
makes anyway: width costs one more product with the last matrix. In training l is a hard Gumbel
softmax, and all L loops run. Without noise a loop runs if some token has it.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from gatedjax.config import VersatileMLPConfig
from gatedjax.layers.activations import gated_product
from gatedjax.layers.added_losses import ADDED_LOSSES
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.moe.losses import balance_loss
from gatedjax.layers.moe.state import NAME as STATE
from gatedjax.layers.norm import rms_norm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection, Weights, contract
from gatedjax.layers.stochastic_gate import hard_choice
from gatedjax.layers.token_info import TokenInfo


def slices(c: VersatileMLPConfig) -> Bool[np.ndarray, "E F"]:
    """Which hidden channels each slice has: [floor(k S), floor(k S) + size), the stride S is
    (hidden - size) / (experts - 1).
    """
    size = c.slice_hidden
    stride = (c.hidden - size) / max(c.experts - 1, 1)
    starts = np.floor(np.arange(c.experts) * stride).astype(int)
    channel = np.arange(c.hidden)
    return (channel >= starts[:, None]) & (channel < starts[:, None] + size)


def slice_weights(logits: Float[Array, "... E"], k: int) -> Float[Array, "... E"]:
    """A softmax over the k largest logits, 0 elsewhere."""
    kth = jax.lax.top_k(logits, k)[0][..., -1:]
    return jax.nn.softmax(jnp.where(logits >= kth, logits, -jnp.inf), axis=-1)


class LoopTemperature(nn.Module):
    """The temperature of the loops' noise, which training lowers; none of the parameters."""

    config: VersatileMLPConfig

    @nn.compact
    def __call__(self) -> Float[Array, ""] | float:
        c = self.config
        if not c.anneal_steps:
            return c.temperature
        start = nn.initializers.constant(c.temperature)
        return parameter(self, "temperature", axes=[], shape=[], init=start)


class Matrices(NamedTuple):
    """What slices and loops share: the norm's scale and the three matrices of a gated MLP."""

    scale: Float[Array, " M"]
    gate: Float[Array, "M F"]
    up: Float[Array, "M F"]
    down: Float[Array, "F M"]


def hidden_channels(
    c: VersatileMLPConfig,
    w: Matrices,
    x: Float[Array, "B T M"],
) -> Float[Array, "B T F"]:
    """What the last matrix is multiplied with.

    Args:
      c: the layer.
      w: what slices and loops share.
      x: the residual stream.
    """
    normed = rms_norm(x, w.scale, c.norm_eps).astype(w.up.dtype)
    h = gated_product(contract(normed, w.gate, 1), contract(normed, w.up, 1), c.activation)
    return nn.with_logical_constraint(h, ("batch", "length", "mlp"))


class VersatileMLP(FeedForward):
    """A gated MLP whose slices and repetitions are mixed by what a token needs.

    It sees the residual stream itself; what it returns is added to it.
    """

    sees_stream: ClassVar[bool] = True

    config: VersatileMLPConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T E"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        c = self.config
        mask = is_token(info)
        x = without_padding(x, mask)
        share = self._slices(x, mask)
        loop_logits = self._logits("loop_router", x, c.loops)
        temperature = LoopTemperature(c, name=STATE)()
        key = self.make_rng("router") if self.has_rng("router") else None
        choice = hard_choice(key, loop_logits, temperature)
        loops = choice @ jnp.arange(1, c.loops + 1, dtype=jnp.float32)
        record(self, "loops", loops)
        # In training the gradient of every choice asks for all of them.
        runs_all = self.training or key is not None
        w = self._matrices(x.shape[-1])
        h = hidden_channels(c, w, x)
        y = contract(h, w.down, 1)
        if c.loops == 1:
            return y, {}, router_logits
        # What each number of loops adds to the stream.
        added = y
        depth = choice[..., :1] * y.astype(jnp.float32)
        loops = without_padding(loops, mask)
        for number in range(2, c.loops + 1):

            def once_more(added: Array) -> Array:
                return added + contract(hidden_channels(c, w, x + added), w.down, 1)

            added = _if_needed(runs_all, loops >= number, once_more, added)
            depth = depth + choice[..., number - 1, None] * added.astype(jnp.float32)
        of_width = (c.loops - loops) / c.loops

        def of_slices(h: Array) -> Array:
            channels = share @ jnp.asarray(slices(c), jnp.float32)
            return contract(h * channels.astype(h.dtype), w.down, 1)

        def nothing(h: Array) -> Array:
            return jnp.zeros_like(y)

        if runs_all:
            width = of_slices(h)
        else:
            width = jax.lax.cond(jnp.any(of_width > 0), of_slices, nothing, h)
        of_width = of_width[..., None]
        mixed = of_width * width.astype(jnp.float32) + (1.0 - of_width) * depth
        return mixed.astype(y.dtype), {}, router_logits

    def _slices(
        self,
        x: Float[Array, "B T M"],
        mask: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T E"]:
        """What each slice counts; sows the loss that keeps their loads even."""
        c = self.config
        logits = self._logits("router", x, c.experts)
        share = slice_weights(logits, c.experts_per_token)
        record(self, "expert_weights", share)
        sows = not self.is_initializing() and self.is_mutable_collection(ADDED_LOSSES)
        if sows and c.balance_loss and c.loops > 1:
            is_chosen = without_padding((share > 0).astype(jnp.float32), mask)
            probs = without_padding(jax.nn.softmax(logits, axis=-1), mask)
            tokens = jnp.maximum(jnp.sum(probs), 1.0)
            loss = balance_loss(jnp.sum(is_chosen, (0, 1)), jnp.sum(probs, (0, 1)) / tokens)
            self.sow(ADDED_LOSSES, "slice_balance_loss", c.balance_loss * loss)
        return share

    def _logits(self, name: str, x: Float[Array, "B T M"], count: int) -> Float[Array, "B T E"]:
        width = {"embed": x.shape[-1]}
        return Projection(width, {"router": count}, self.init_std, jnp.float32, name=name)(x)

    def _matrices(self, width: int) -> Matrices:
        outer, inner = {"embed": width}, {"mlp": self.config.hidden}
        scale = parameter(self, "norm_scale", ["embed_act"], [width], nn.initializers.ones)
        std, dtype = self.init_std, self.dtype
        gate = Weights(outer, inner, std, dtype, name="gate")()
        up = Weights(outer, inner, std, dtype, name="up")()
        down = Weights(inner, outer, std, dtype, name="down")()
        return Matrices(scale, gate, up, down)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        """Of all loops and the slices, as in training."""
        return self.flops_with(width, self.config.loops, 1.0)

    @nn.nowrap
    def flops_with(self, width: int, loops: float, with_slices: float) -> float:
        """FLOPs of a token.

        Args:
          width: M.
          loops: how many it has, or their mean over tokens.
          with_slices: 1 for a token of which slices count, 0 for one with all loops; or the
            fraction of tokens of which they do.
        """
        c = self.config
        of_loop = 6 * width * c.hidden
        # Their hidden channels are those of the first loop.
        of_slices = 2 * width * c.hidden if c.loops > 1 else 0
        routers = 2 * width * (c.experts + c.loops)
        return loops * of_loop + with_slices * of_slices + routers


def _if_needed(
    runs_all: bool,
    is_needed: Bool[Array, "B T"],
    once_more: Callable[[Array], Array],
    added: Array,
) -> Array:
    """A further loop; as before where no token has it, if not all of them run.

    Args:
      runs_all: always.
      is_needed: which tokens have it.
      once_more: the loop.
      added: what those before it have added to the stream.
    """

    def as_before(added: Array) -> Array:
        return added

    if runs_all:
        return once_more(added)
    return jax.lax.cond(jnp.any(is_needed), once_more, as_before, added)
