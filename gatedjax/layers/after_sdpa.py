"""What stands between the attention op and the gate on its output: a skip, a norm or an activation.

    o = o + alpha_h v            value_skip, alpha a learned number of every head, 1 at the start
    o = f(o)                     after_sdpa: RMSNorm, LayerNorm or SiLU, every head by itself
    y = o sigmoid(gate_logits)   the gate, where there is one

RMSNorm and SiLU in place of a gate are those of table 3 of arXiv 2505.06708; a norm bounds the
output of normalizers without a denominator (2507.23632); the skip is the identity of shaped
attention (2306.17759).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.norm import LayerNorm, RMSNorm
from gatedjax.layers.parameters import parameter


class AfterSDPA(nn.Module):
    """`config.value_skip`, then `config.after_sdpa`. Norms share their scale among heads."""

    config: GatedAttentionConfig
    eps: float

    @nn.compact
    def __call__(
        self,
        o: Float[Array, "B T H D"],
        v: Float[Array, "B T Hk D"],
    ) -> Float[Array, "B T H D"]:
        """The op's output o, changed; v are the values of the same tokens."""
        c = self.config
        if c.value_skip:
            alpha = parameter(
                self,
                "value_skip",
                axes=["heads"],
                shape=[c.num_heads],
                init=nn.initializers.ones,
            )
            o = _with_skip(o, v, alpha)
        if c.after_sdpa == "rms_norm":
            return RMSNorm(self.eps, axis_name="head_dim", name="norm")(o)
        if c.after_sdpa == "layer_norm":
            return LayerNorm(self.eps, "head_dim", name="norm")(o)
        if c.after_sdpa == "silu":
            return jax.nn.silu(o.astype(jnp.float32)).astype(o.dtype)
        return o


def _with_skip(
    o: Float[Array, "B T H D"],
    v: Float[Array, "B T Hk D"],
    alpha: Float[Array, " H"],
) -> Float[Array, "B T H D"]:
    """o + alpha v in float32; returned in o's dtype."""
    # Query head h has the values of the key head h // (H / Hk).
    B, T, H, D = o.shape
    by_group = o.astype(jnp.float32).reshape(B, T, v.shape[2], -1, D)
    weight = alpha.reshape(v.shape[2], -1, 1)
    added = by_group + weight * v.astype(jnp.float32)[:, :, :, None]
    return added.reshape(B, T, H, D).astype(o.dtype)
