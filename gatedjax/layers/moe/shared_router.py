"""Read-ME's router (arXiv 2410.19123): a small causal model of the tokens alone, before all layers.

    experts = argmax of (last hidden states of the router's own model) W_out

One choice a token, for all layers with `router.selection` "given".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.parameters import parameter

# Its parameters lie there among those of the model.
NAME = "shared_router"


class SharedRouter(nn.Module):
    """(tokens, positions, segments, caches) -> (logits of the experts, caches).

    Attributes:
      model: the `LanguageModel` whose hidden states it goes by.
      num_experts: of every sparse layer.
    """

    model: nn.Module
    num_experts: int

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *inputs: Any,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """`inputs` as the model takes them."""
        hidden, caches, _ = self.model(tokens, *inputs)
        out = parameter(
            self,
            "out",
            axes=["embed", "router"],
            shape=[hidden.shape[-1], self.num_experts],
            init=nn.initializers.normal(1.0),
        )
        return hidden.astype(jnp.float32) @ out, caches


def shared_experts(
    model: Any,
    tokens: Int[Array, "B T"],
    *inputs: Any,
) -> tuple[Int[Array, "B T"], Any]:
    """The expert of every token, and the router's caches.

    Args:
      model: the `LanguageModel` that asks, inside its own call.
      tokens: the tokens.
      inputs: the further arguments of the model's call: positions, segments, caches of the router.
    """
    config = model.config
    of_router = type(model)(config.router_model, parent=None)
    if model.is_initializing():
        logits, caches = SharedRouter(of_router, config.given_experts, name=NAME)(tokens, *inputs)
    else:
        # A module of its own, so that nothing that its layers record is taken for the model's.
        router = SharedRouter(of_router, config.given_experts, parent=None)
        params = jax.lax.stop_gradient(model.variables["params"][NAME])
        found: Any = router.apply({"params": params}, tokens, *inputs)
        logits, caches = found
    return jnp.argmax(logits, axis=-1), caches
