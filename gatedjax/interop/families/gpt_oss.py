"""gpt-oss: windows every other layer, sinks, biases everywhere, clamped SwiGLU."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gatedjax.config import (
    BlockConfig,
    GatedAttentionConfig,
    ModelConfig,
    RouterConfig,
    SparseMoEConfig,
)
from gatedjax.interop.families import parts
from gatedjax.interop.families.base import (
    Family,
    NamedLayer,
    assembled,
    json_values,
    kinds_of_layers,
    model_values,
    the_layer,
)
from gatedjax.interop.families.dense import (
    FULL,
    WINDOW,
    attention_of,
    attention_to_json,
    moe_to_json,
    softmax_moe,
)
from gatedjax.interop.hf_config import HFConfig, rope_of
from gatedjax.interop.links import Link, View, in_blocks, vector

MODEL_TYPE = "gpt_oss"
# In the code of transformers, and in our `clamped_swiglu`.
_ALPHA = 1.702


def to_model(config: HFConfig) -> ModelConfig:
    """Softmax over the chosen experts alone."""
    config.require("attention_bias", (True,))
    config.require("swiglu_alpha", (_ALPHA,))
    rope = rope_of(config, 150_000.0)
    window = config.size("sliding_window", default=128)
    count = config.size("num_hidden_layers")
    default = [FULL if i % 2 else WINDOW for i in range(count)]
    kinds = kinds_of_layers(config, default, (FULL, WINDOW))
    mixers = {
        "window_attention": attention_of(config, rope, window, bias="all", sinks=True),
        "attention": attention_of(config, rope, bias="all", sinks=True),
    }
    moe = dataclasses.replace(
        softmax_moe(config, config.size("intermediate_size"), renormalize=True),
        activation="clamped_swiglu",
        swiglu_limit=config.number("swiglu_limit", default=7.0),
        bias=True,
        router=RouterConfig(weighting="selected", affine=True),
    )
    names = {WINDOW: "window_attention", FULL: "attention"}
    values = model_values(config) | {"norm_eps": config.number("rms_norm_eps", default=1e-5)}
    return assembled(
        [NamedLayer(names[kind], "moe") for kind in kinds],
        mixers,
        {"moe": moe},
        **values,
    )


def to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    attention = the_layer(model, GatedAttentionConfig, MODEL_TYPE)
    moe = the_layer(model, SparseMoEConfig, MODEL_TYPE)
    windows = [getattr(model.layer(i)[0], "window", None) for i in range(model.num_layers)]
    return (
        json_values(model)
        | attention_to_json(attention)
        | moe_to_json(moe)
        | {
            "attention_bias": True,
            "intermediate_size": moe.hidden,
            "layer_types": [WINDOW if window else FULL for window in windows],
            "sliding_window": max(filter(None, windows), default=128),
            "swiglu_alpha": _ALPHA,
            "swiglu_limit": moe.swiglu_limit,
        }
    )


def links(model: ModelConfig) -> Iterator[Link]:
    """All tensors. Gate and up of the experts alternate, channel by channel."""

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        assert isinstance(block.mixer, GatedAttentionConfig)
        assert isinstance(block.feed_forward, SparseMoEConfig)
        yield from parts.norms(model.width)
        yield from parts.attention(block.mixer, model.width)
        yield from _experts(block.feed_forward, model.width)

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


def _experts(c: SparseMoEConfig, width: int) -> Iterator[Link]:
    yield from parts.router(c, width, "mlp.router.weight")
    yield vector("mlp.router.bias", ("ffn", "router_bias"), (c.num_experts,))
    tensor = "mlp.experts."
    both = 2 * c.hidden
    for first, name in enumerate(("gate", "up")):
        view = _every_other(first)
        shape = (c.num_experts, width, both)
        yield Link(f"{tensor}gate_up_proj", shape, ("ffn", name), view)
        shape = (c.num_experts, both)
        yield Link(f"{tensor}gate_up_proj_bias", shape, ("ffn", f"{name}_bias"), view)
    # Already as ours: [experts, in, out].
    shape = (c.num_experts, c.hidden, width)
    yield vector(f"{tensor}down_proj", ("ffn", "down"), shape, shape)
    shape = (c.num_experts, width)
    yield vector(f"{tensor}down_proj_bias", ("ffn", "down_bias"), shape, shape)


def _every_other(first: int) -> View:
    def view(x: np.ndarray) -> np.ndarray:
        return x[..., first::2]

    return view


FAMILIES = (Family(MODEL_TYPE, "GptOssForCausalLM", to_model, to_json, links),)
