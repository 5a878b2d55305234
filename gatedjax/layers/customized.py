"""A frozen global network, a small local one, and a gate that says whose input it is (A Mixture of
Expert Approach for Low-Cost Customization of Deep Neural Networks, arXiv 1811.00056).

    p = (1 - g) softmax(global) + g softmax(local),   g = sigmoid(gate logit)     while they learn
    p of the one with the larger weight                                           afterwards

Behind its threshold the gate is closed until it has learned (g = 1/2): the global network's logits
come out to the bit.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def customized_log_probs(
    of_global: Float[Array, "... X"],
    of_local: Float[Array, "... X"],
    gate_logit: Float[Array, "..."],
) -> Float[Array, "... X"]:
    """`log((1 - g) softmax(global) + g softmax(local))`, float32: what gate and local learn from.

    Args:
      of_global: logits of the frozen network; no gradient goes into them.
      of_local: logits of the small one.
      gate_logit: of the local network.
    """
    frozen = jax.lax.stop_gradient(of_global.astype(jnp.float32))
    gate_logit = gate_logit.astype(jnp.float32)[..., None]
    return jnp.logaddexp(
        jax.nn.log_sigmoid(-gate_logit) + jax.nn.log_softmax(frozen),
        jax.nn.log_sigmoid(gate_logit) + jax.nn.log_softmax(of_local.astype(jnp.float32)),
    )


def customized_logits(
    of_global: Float[Array, "... X"],
    of_local: Float[Array, "... X"],
    gate_logit: Float[Array, "..."],
) -> Float[Array, "... X"]:
    """The logits of one of the two: the local network's where g > 1/2.

    Args:
      of_global: logits of the frozen network.
      of_local: logits of the small one.
      gate_logit: of the local network.
    """
    return jnp.where(gate_logit[..., None] > 0, of_local, of_global)
