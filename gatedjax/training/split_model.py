"""A dense model's gated MLPs as experts, and the router that stands before all layers (Read-ME,
arXiv 2410.19123): configuration and parameters. `split_experts.py` is the command.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import (
    GatedMLPConfig,
    ModelConfig,
    RouterConfig,
    SharedRouterConfig,
    SparseMoEConfig,
)
from gatedjax.data import Batch
from gatedjax.errors import require
from gatedjax.layers.moe.channel_experts import Channels, expert_matrices, split_channels
from gatedjax.layers.moe.shared_router import NAME as SHARED_ROUTER
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel

# Activations of gated MLPs that experts have too.
OF_EXPERTS = ("silu", "gelu", "clamped_swiglu")


class Split(NamedTuple):
    """A model whose feed-forwards are experts, and its router, which is not yet part of it."""

    model: ModelConfig
    params: PyTree
    router: ModelConfig
    router_params: PyTree

    @property
    def whole(self) -> tuple[ModelConfig, PyTree]:
        """The model with its router inside, and its parameters."""
        return with_router(self.model), {**self.params, SHARED_ROUTER: self.router_params}


def require_splittable(model: ModelConfig) -> None:
    """InputError unless all feed-forwards are gated MLPs of a model without prefix and suffix."""
    for block in model.blocks:
        ffn = block.feed_forward
        key = f"--from: feed-forward of layer {block.layers[0]}"
        require(isinstance(ffn, GatedMLPConfig), key, ffn.kind, "gated_mlp")
        assert isinstance(ffn, GatedMLPConfig)
        is_plain = not ffn.bias and not ffn.norm and not ffn.adapters.number
        require(is_plain, key, "bias, norm or adapters", "none of them")
        known = ffn.activation in OF_EXPERTS
        require(known, f"{key}.activation", ffn.activation, " or ".join(OF_EXPERTS))
        require(block.is_repeated, "--from", f"layer {block.layers[0]} in a prefix", "none")
    require(not model.lora.rank, "--from: config.model.lora.rank", model.lora.rank, "0")
    require(model.task == "lm", "--from: config.model.task", model.task, "lm")


def split_model(model: ModelConfig, channels: Mapping[int, Channels]) -> ModelConfig:
    """The configuration with sparse layers, each of its own size, in one period.

    Args:
      model: the dense one.
      channels: of every layer.
    """
    ffns = {}
    for layer, of_layer in channels.items():
        dense = model.layer(layer)[1]
        assert isinstance(dense, GatedMLPConfig)
        # As `require_splittable` has seen.
        assert dense.activation in ("silu", "gelu", "clamped_swiglu")
        ffns[f"split_{layer}"] = SparseMoEConfig(
            num_experts=len(of_layer.own),
            experts_per_token=1,
            hidden=of_layer.own.shape[1],
            activation=dense.activation,
            swiglu_limit=dense.swiglu_limit,
            router=RouterConfig(selection="given", weighting="uniform"),
            shared_hidden=of_layer.permanent.size,
            shared_gate=False,
            balance_loss=0.0,
            z_loss=0.0,
        )
    mixers = tuple(model.pattern[i % len(model.pattern)] for i in range(model.num_layers))
    new = {"pattern": mixers, "ffns": FrozenDict(ffns), "ffn_pattern": tuple(ffns)}
    return _replaced(model, new)


def with_router(model: ModelConfig) -> ModelConfig:
    """The split model with the router before all layers, of one layer."""
    head_dim = 16 if model.width % 16 == 0 else model.width
    router = SharedRouterConfig(
        num_layers=1,
        num_heads=model.width // head_dim,
        head_dim=head_dim,
        hidden=2 * model.width,
    )
    return _replaced(model, {"shared_router": router})


def _replaced(model: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**{**vars(model), **changes})


def split_params(
    model: ModelConfig,
    params: PyTree,
    channels: Mapping[int, Channels],
) -> PyTree:
    """The parameters of `split_model` with what the dense model has.

    Args:
      model: the dense one.
      params: of it.
      channels: of every layer.
    """
    flat = {path: x for path, x in flatten_dict(params).items() if path[0] != "periods"}
    for block in model.blocks:
        of_block = flatten_dict(params["periods"][block.name])
        for place, layer in enumerate(block.layers):
            own = {path: x[place] for path, x in of_block.items()}
            gate, up, down = (own.pop(("ffn", name, "kernel")) for name in ("gate", "up", "down"))
            split = expert_matrices(gate, up, down, channels[layer])
            own |= {("ffn", *path): x for path, x in split.items()}
            # Given experts need no logits; they are in the log of loads.
            count = len(channels[layer].own)
            own["ffn", "router", "kernel"] = jnp.zeros((model.width, count))
            flat |= {("periods", f"layer_{layer}", *path): x[None] for path, x in own.items()}
    return unflatten_dict(flat)


def fresh_split(model: ModelConfig, params: PyTree, kept: Mapping[int, np.ndarray]) -> Split:
    """The experts as they are in the dense model, and a router that starts from its embeddings."""
    channels = {layer: split_channels(of_layer) for layer, of_layer in kept.items()}
    new = split_model(model, channels)
    router = with_router(new).router_model
    assert router is not None
    tokens = jnp.zeros((1, 1), jnp.int32)
    of_router: Any = jax.jit(LanguageModel(router).init)(jax.random.key(0), tokens)["params"]
    of_router = {**nn.meta.unbox(of_router), "embedding": params["embedding"]}
    count = len(next(iter(kept.values())))
    router_params = {"model": of_router, "out": jnp.zeros((model.width, count))}
    return Split(new, split_params(model, params, channels), router, router_params)


def router_logits(router: ModelConfig, params: PyTree, batch: Batch) -> Float[Array, "B T E"]:
    """Of the experts, from the tokens alone."""
    inputs = (batch.tokens, batch.positions, batch.segment_ids)
    output: Any = LanguageModel(router).apply({"params": params["model"]}, *inputs)
    return output[0].astype(jnp.float32) @ params["out"]
