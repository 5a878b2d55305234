"""A learned prefix of keys and values with a gate on its logits (NoRGa, arXiv 2405.14124).

    a = q_i p_j / sqrt(d)                             logits of the prefix
    a + alpha tanh(tau a)                             the non-linear residual gate
    y_i = one softmax over [prefix, tokens]

Tokens are a call of `attention` that also returns its log-sum-exp, so the kernel runs as it is; the
prefix is short, and its part is joined to theirs by `merge_attention`. alpha = 0 is plain prefix
tuning (arXiv 2101.00190).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.layers.parameters import parameter
from gatedjax.sharding import is_cut
from kernels_pallas.attention import attention, merge_attention


def prefix_part(
    q: Float[Array, "B T H K"],
    prefix_k: Float[Array, "_ Hk K"],
    prefix_v: Float[Array, "_ Hk V"],
    alpha: Float[Array, ""] | float,
    tau: Float[Array, ""] | float,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """Attention to the prefix alone, with its log-sum-exp.

    Args:
      q: queries.
      prefix_k, prefix_v: keys and values that every query of every row sees.
      alpha, tau: of the gate.
      scale: what products are multiplied by.

    Returns:
      (y, lse) for `merge_attention`, in float32 (float64 of float64).
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    B, T, H, K = q.shape
    Hk = prefix_k.shape[1]
    # Query head h uses the prefix's head h // G.
    grouped = q.astype(dtype).reshape(B, T, Hk, H // Hk, K)
    a = scale * jnp.einsum("bthgk,phk->bhgtp", grouped, prefix_k.astype(dtype))
    logits = a + alpha * jnp.tanh(tau * a)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    y = jnp.einsum("bhgtp,phv->bthgv", jnp.exp(logits - lse), prefix_v.astype(dtype))
    return y.reshape(B, T, H, -1), lse.reshape(B, H, T)


def prefix_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    prefix_k: Float[Array, "_ Hk K"],
    prefix_v: Float[Array, "_ Hk V"],
    *,
    alpha: Float[Array, ""] | float = 1.0,
    tau: Float[Array, ""] | float = 1.0,
    scale: float | None = None,
    **options: Any,
) -> Float[Array, "B T H V"]:
    """`attention` with a prefix whose logits are gated.

    Args:
      q, k, v: of the tokens.
      prefix_k, prefix_v: learned keys and values that every token sees.
      alpha, tau: of the gate, numbers or learned scalars.
      scale: as of `attention`.
      options: of `attention`, for the tokens: causal, window, segment_ids, sink_logits and so on;
        gates on the output multiply what is returned here.

    Returns:
      y in v's dtype.

    Raises:
      NotImplementedError: a mesh that cuts the tokens of a row.
    """
    if is_cut("length", q.shape[1]):
        raise NotImplementedError("prefix: got tokens that a mesh cuts, expected whole rows")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_tokens, lse = attention(q, k, v, scale=scale, return_lse=True, **options)
    of_prefix = prefix_part(q, prefix_k, prefix_v, alpha, tau, scale)
    y, _ = merge_attention([(of_tokens, lse), of_prefix])
    return y


class GatedPrefix(nn.Module):
    """The parameters of a prefix: `layer(q, k, v)` is `prefix_attention` with them.

    Attributes:
      length: keys of the prefix.
      init_std: they start from.
    """

    length: int
    init_std: float = 0.02

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S Hk K"],
        v: Float[Array, "B S Hk V"],
        **options: Any,
    ) -> Float[Array, "B T H V"]:
        """As `prefix_attention`; alpha and tau are 1 at the start, as in the paper's code."""
        Hk = k.shape[2]
        normal = nn.initializers.normal(self.init_std)
        ones = nn.initializers.ones
        axes = [None, "kv_heads", "head_dim"]
        keys = parameter(self, "keys", axes, [self.length, Hk, k.shape[3]], normal)
        values = parameter(self, "values", axes, [self.length, Hk, v.shape[3]], normal)
        alpha = parameter(self, "alpha", [], [], ones)
        tau = parameter(self, "tau", [], [], ones)
        return prefix_attention(q, k, v, keys, values, alpha=alpha, tau=tau, **options)
