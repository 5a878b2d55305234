"""X-LoRA's first pass.

The experts' weights come from the model's own last hidden states without experts: for every token
and every layer with such experts a set of its own (the layer-wise scalings of arXiv 2402.07148).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import BlockConfig, LoRAMixtureConfig, ModelConfig
from gatedjax.layers.moe.lora import xlora_weights
from gatedjax.layers.parameters import parameter


def mixture_blocks(config: ModelConfig) -> list[BlockConfig]:
    """The blocks whose experts get their weights from the first pass."""
    if config.lora.num_experts:
        return list(config.blocks)
    blocks = []
    for block in config.blocks:
        ffn = block.feed_forward
        if isinstance(ffn, LoRAMixtureConfig) and ffn.first_pass:
            blocks.append(block)
    return blocks


def mixture_layers(config: ModelConfig) -> list[int]:
    """The numbers of all layers whose experts get their weights from the first pass."""
    return sorted(layer for block in mixture_blocks(config) for layer in block.layers)


def num_mixtures(config: ModelConfig) -> int:
    """L, how many layers of the whole model get their weights from the first pass."""
    return len(mixture_layers(config))


def no_weights(tokens: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T L E"]:
    """Weights by which no expert adds anything: those of the first pass itself."""
    assert config.first_pass is not None
    sizes = (num_mixtures(config), config.first_pass.num_experts)
    return jnp.zeros((*tokens.shape, *sizes), jnp.float32)


def weights_by_block(
    config: ModelConfig,
    weights: Float[Array, "B T L E"] | None,
) -> dict[str, Float[Array, "P B T E"]] | None:
    """The weights of each block, stacked over the block's layers; None if there are none."""
    if weights is None:
        return None
    place_of = {layer: place for place, layer in enumerate(mixture_layers(config))}
    by_block = {}
    for block in mixture_blocks(config):
        of_layers = [weights[:, :, place_of[layer]] for layer in block.layers]
        by_block[block.name] = jnp.stack(of_layers)
    return by_block


def first_pass_weights(
    model: Any,
    tokens: Int[Array, "B T"],
    *inputs: Any,
) -> tuple[Float[Array, "B T L E"], Any]:
    """The weights of low-rank experts for every token, in every layer that has them.

    X-LoRA, arXiv 2402.07148. Gradients end at the classifier.

    Args:
      model: the `LanguageModel` that asks, inside its own call.
      tokens: the tokens.
      inputs: the further arguments of the model's call: positions, segments, caches of this pass.

    Returns:
      The weights, and the caches of the first pass.
    """
    config = model.config
    mixture = config.first_pass
    # One matrix for each layer, stacked as layers are: Muon takes each by itself.
    classifier = parameter(
        model,
        "lora_classifier",
        axes=["layers", "embed", "router"],
        shape=[num_mixtures(config), config.width, mixture.num_experts],
        init=nn.initializers.normal(config.init_std),
    )
    if model.is_initializing():
        return no_weights(tokens, config), None
    # A module of its own, so that what the layers record is of the second pass alone.
    without_experts = type(model)(
        config,
        without_experts=True,
        training=model.training,
        parent=None,
    )
    variables = jax.lax.stop_gradient({"params": model.variables["params"]})
    output: Any = without_experts.apply(variables, tokens, *inputs)
    hidden, caches, _ = output
    weights = [
        xlora_weights(
            hidden,
            of_layer,
            mixture.temperature,
            mixture.experts_per_token,
        )
        for of_layer in classifier
    ]
    return jnp.stack(weights, axis=2), caches
