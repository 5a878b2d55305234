"""Small experts beside a frozen feed-forward (Soft-MoA, arXiv 2402.00828).

    logits = x phi                                     cosines times a scale, with `normalize`
    slots  = softmax over tokens of logits, times x
    y      = softmax over slots of logits, times (gelu(slots W_down + b) W_up + c)

As Soft MoE, with bottlenecks for experts. W_up and c start from 0: nothing is added at first. With
`slots=0` there are no slots, and y is the sum of all bottlenecks of the token itself.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config.soft_adapters import SoftAdaptersConfig
from gatedjax.layers.documents import documents_of, is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.moe.soft import mixed_softly, slot_logits
from gatedjax.layers.parameters import parameter
from gatedjax.layers.token_info import TokenInfo
from kernels_pallas.common.opaque import opaque


def bottlenecks(
    slots: Float[Array, "B E s M"],
    down: Float[Array, "E M F"],
    down_bias: Float[Array, "E F"],
    up: Float[Array, "E F M"],
    up_bias: Float[Array, "E M"],
) -> Float[Array, "B E s M"]:
    """`gelu(slots W_down + b) W_up + c` of each expert.

    Args:
      slots: what they work on.
      down, down_bias: into the bottleneck.
      up, up_bias: out of it.
    """
    hidden = jnp.einsum("besm,emf->besf", slots, down) + down_bias[:, None]
    hidden = jax.nn.gelu(hidden.astype(jnp.float32), approximate=False).astype(slots.dtype)
    return jnp.einsum("besf,efm->besm", hidden, up) + up_bias[:, None]


class SoftAdapters(nn.Module):
    """What is added to a feed-forward's output.

    Attributes:
      config: of the adapters.
      init_std: of the matrices into the bottlenecks.
      dtype: of the activations.
    """

    config: SoftAdaptersConfig
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None,
    ) -> Float[Array, "B T M"]:
        """`x`: the feed-forward's input, zeros for padding."""
        c = self.config
        width = x.shape[-1]
        down = self._stack("down", ("embed", "mlp"), (width, c.hidden), self.init_std)
        down_bias = self._stack("down_bias", ("mlp_bias",), (c.hidden,), 0.0)
        # Where parameters are made in the same program, the compiler sees that these are all zeros.
        up = opaque(self._stack("up", ("mlp", "embed"), (c.hidden, width), 0.0))
        up_bias = opaque(self._stack("up_bias", ("embed_act",), (width,), 0.0))
        experts = functools.partial(
            bottlenecks,
            down=down,
            down_bias=down_bias,
            up=up,
            up_bias=up_bias,
        )
        tokens = x.astype(self.dtype)
        if not c.slots:
            of_experts = (x.shape[0], c.number, *x.shape[1:])
            y = jnp.sum(experts(jnp.broadcast_to(tokens[:, None], of_experts)), axis=1)
            return without_padding(y, is_token(info))
        logits = self._slot_logits(x)
        y, dispatch, combine = mixed_softly(tokens, logits, documents_of(info), experts)
        record(self, "dispatch", dispatch)
        record(self, "combine", combine)
        return y

    def _slot_logits(self, x: Float[Array, "B T M"]) -> Float[Array, "B T E s"]:
        c = self.config
        phi = parameter(
            self,
            "phi",
            axes=["embed", "router", None],
            shape=[x.shape[-1], c.number, c.slots],
            init=nn.initializers.glorot_normal(in_axis=0, out_axis=(1, 2)),
        )
        if c.normalize:
            ones = nn.initializers.ones
            return slot_logits(x, phi, parameter(self, "scale", axes=[], shape=[], init=ones))
        return jnp.einsum("btm,mes->btes", x.astype(jnp.float32), phi)

    def _stack(
        self,
        name: str,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        std: float,
    ) -> Array:
        """A parameter of every expert, in the dtype of the activations.

        Args:
          name: of it.
          axes: of one expert's.
          shape: of one expert's.
          std: of its start; 0 for zeros.
        """
        init = nn.initializers.normal(std) if std else nn.initializers.zeros
        number = self.config.number
        stack = parameter(self, name, axes=["expert", *axes], shape=[number, *shape], init=init)
        return stack.astype(self.dtype)


def adapter_flops(config: SoftAdaptersConfig, width: int, seq_len: int) -> float:
    """Of one token: three products of tokens and slots, and a part of the experts' work; without
    slots the work of all of them.

    Args:
      config: of the adapters.
      width: of the model.
      seq_len: tokens that share the slots.
    """
    if not config.slots:
        return 4.0 * width * config.hidden * config.number
    slots = config.number * config.slots
    return 6.0 * width * slots + 4.0 * width * config.hidden * slots / seq_len
