"""X-LoRA's first pass.

The experts' weights come from the model's own last hidden states without experts.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import LoRAMixtureConfig
from gatedjax.layers.moe.lora import xlora_weights
from gatedjax.layers.parameters import parameter


def no_weights(tokens: Int[Array, "B T"], config: LoRAMixtureConfig) -> Float[Array, "B T E"]:
    """Weights by which no expert adds anything: those of the first pass itself."""
    return jnp.zeros((*tokens.shape, config.num_experts), jnp.float32)


def first_pass_weights(
    model: Any,
    config: LoRAMixtureConfig,
    tokens: Int[Array, "B T"],
    *inputs: Any,
) -> tuple[Float[Array, "B T E"], Any]:
    """The weights of low-rank experts for every token, the same in all layers.

    X-LoRA, arXiv 2402.07148. Gradients end at the classifier.

    Args:
      model: the `LanguageModel` that asks, inside its own call.
      config: the mixture.
      tokens: the tokens.
      inputs: the further arguments of the model's call: positions, segments, caches of this pass.

    Returns:
      The weights, and the caches of the first pass.
    """
    classifier = parameter(
        model,
        "lora_classifier",
        axes=["embed", "router"],
        shape=[model.config.width, config.num_experts],
        init=nn.initializers.normal(model.config.init_std),
    )
    if model.is_initializing():
        return no_weights(tokens, config), None
    # A module of its own, so that what the layers record is of the second pass alone.
    without_experts = type(model)(
        model.config,
        without_experts=True,
        parent=None,
    )
    variables = jax.lax.stop_gradient({"params": model.variables["params"]})
    output: Any = without_experts.apply(variables, tokens, *inputs)
    hidden, caches, _ = output
    weights = xlora_weights(
        hidden,
        classifier,
        config.temperature,
        config.experts_per_token,
    )
    return weights, caches
